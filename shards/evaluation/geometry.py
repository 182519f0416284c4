"""The geometry of evaluation windows: how frames are resized, cut into squares, and cropped.

Frames are resized so that the short side is the model's size and cut into two squares at the two
ends, which may overlap; a rectangular model sees whole frames. Whole numbers only; extract/ makes
the windows by it, evaluate/ cuts labels and predictions by it. PAPER "Evaluation"; checked by
tests/parity (08_eval).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DeltatokError

MAX_ASPECT_RATIO = 2.0
KB_CROP = (352, 1216)
"""Height and width of the KITTI benchmark crop, pixels."""

FrameSize = tuple[int, int] | int
"""What a backbone sees, in pixels: height and width, or the side of a square."""


def frame_shape(size: Sequence[int] | int) -> tuple[int, int]:
    """Height and width of a frame size, which a cache.json may hold as a list."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def shown_size(size: Sequence[int] | int) -> str:
    """As it is typed: 448x896, or 512 for a square."""
    height, width = frame_shape(size)
    return str(height) if height == width else f"{height}x{width}"


@dataclass(frozen=True)
class Cut:
    """How frames of one shape are cut: wide left/right, tall top/bottom, None not at all."""

    wide: bool | None
    overlap: bool
    """The two squares share pixels: the long side is less than twice the short one."""


def compute_resize_sizes(
    height: int,
    width: int,
    frame_size: int | tuple[int, int],
    *,
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
) -> tuple[int, int]:
    """Height and width to resize frames to.

    An int is the short side; the long side keeps the ratio (rounded half to even) up to
    int(frame_size * max_aspect_ratio). A pair is taken as it is.
    """
    if isinstance(frame_size, tuple):
        return frame_size
    longest = int(frame_size * max_aspect_ratio)
    if height <= width:
        return frame_size, min(round(width * frame_size / height), longest)
    return min(round(height * frame_size / width), longest), frame_size


def cut_of(height: int, width: int) -> Cut:
    """The cut of (already resized) frames of this shape."""
    if height == width:
        return Cut(wide=None, overlap=False)
    long, short = max(height, width), min(height, width)
    return Cut(wide=width > height, overlap=long < 2 * short)


def square_corners(height: int, width: int) -> list[tuple[int, int]]:
    """Top and left of the squares that (already resized) frames of this shape are cut into: the
    left or top one, then the right or bottom one; one alone if the frame is square."""
    if height == width:
        return [(0, 0)]
    return [(0, 0), (height - width, 0) if height > width else (0, width - height)]


def kb_region(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height, width of the KITTI benchmark crop: bottom rows, middle columns.

    Raises DeltatokError for a frame that is smaller.
    """
    crop_height, crop_width = KB_CROP
    if height < crop_height or width < crop_width:
        raise DeltatokError(
            f"an image of {height} x {width} pixels cannot be cropped to "
            f"{crop_height} x {crop_width}; pass a whole KITTI frame"
        )
    return height - crop_height, (width - crop_width) // 2, crop_height, crop_width
