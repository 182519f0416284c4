"""A clip that is stored as images, one a frame: its times come from the names, exactly.

Only the frames that windows use are read. EXIF rotation is applied: a frame is what viewers show.

The frames of a target of a data set that are stored as images, whose names are known.
"""

import io
import struct
import warnings
from decimal import Decimal
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...shards.errors import UnusableClip
from ..sampling import WindowDraw
from ..sources.clip import TargetFrames, frame_seconds
from .backends import Draw
from .container import MAX_MEAN_GAP_S, Float64, UInt8, describe

MAX_FRAME_PIXELS = 2**26
"""A frame of 8192 x 8192. More is no video frame, but a file made to fill the memory (a guess)."""

EXIF_ORIENTATION = 0x0112
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, OverflowError, struct.error, EOFError)
"""What Pillow raises for files that are no images of their kind."""


class FrameImages(Protocol):
    """The frames of one clip, in any order."""

    @property
    def names(self) -> list[str]:
        """File names, which say the seconds."""

    def read(self, name: str) -> bytes:
        """The image file; UnusableClip if it cannot be read."""


def decode_frames(images: FrameImages, *, draw: Draw) -> tuple[list[WindowDraw], dict[int, UInt8]]:
    """The windows of the clip, and RGB of the frames they use by index: uint8 (H, W, 3).

    Raises:
        UnusableClip: no frames, names or images that make no sense, frames of different sizes, or
            no window can be drawn.
    """
    names, times_s = in_time_order(images.names)
    shape = _read_shape(names[0], images.read(names[0]))
    windows = draw(times_s, *shape)
    frames = {}
    for index in sorted({frame for window in windows for frame in window.frame_index}):
        pixels = read_pixels(names[index], images.read(names[index]))
        if pixels.shape[:2] != shape:
            raise UnusableClip(
                f"changes its size at {names[index]}: from {shape[1]}x{shape[0]} to "
                f"{pixels.shape[1]}x{pixels.shape[0]}",
                stage="decode",
            )
        frames[index] = pixels
    return windows, frames


def in_time_order(names: list[str]) -> tuple[list[str], Float64]:
    """The names of frames in time order, and float64 (N,): seconds since the first of them,
    exact up to one rounding."""
    times = {name: Decimal(text) for name in names if (text := frame_seconds(name)) is not None}
    ordered = sorted(times, key=lambda name: (times[name], name))
    if not ordered:
        raise UnusableClip("holds no frames named *_<seconds>.jpg", stage="open")
    since_first = [float(times[name] - times[ordered[0]]) for name in ordered]
    if since_first[-1] > MAX_MEAN_GAP_S * len(ordered):
        raise UnusableClip(
            f"timestamps make no sense: {len(ordered)} frames over {since_first[-1]:.4g} s: are "
            "the numbers in the names seconds?",
            stage="decode",
        )
    return ordered, np.array(since_first, np.float64)


def _read_shape(name: str, data: bytes) -> tuple[int, int]:
    """Height and width of an image as it is shown, from its header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with _opened(name, data) as image:
                turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
                width, height = image.size
        except UnusableClip:
            raise
        except _PILLOW_ERRORS as error:
            raise UnusableClip(
                f"{name} cannot be decoded: {describe(error)}", stage="decode"
            ) from error
    return (width, height) if turned else (height, width)


def read_pixels(name: str, data: bytes) -> UInt8:
    """uint8 (H, W, 3) RGB."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about metadata
        try:
            with _opened(name, data) as image:
                shown = ImageOps.exif_transpose(image)
                return np.ascontiguousarray(np.asarray(shown.convert("RGB"), np.uint8))
        except UnusableClip:
            raise
        except _PILLOW_ERRORS as error:
            raise UnusableClip(
                f"{name} cannot be decoded: {describe(error)}", stage="decode"
            ) from error


def _opened(name: str, data: bytes) -> Image.Image:
    """The image, of a size that is allowed; nothing of it is decoded yet."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    except Image.DecompressionBombError as error:
        raise UnusableClip(f"{name}: {describe(error)}", stage="decode") from error
    except UnidentifiedImageError as error:  # whose text names an address in memory
        reason = f"{name} cannot be decoded: is no JPEG or PNG image"
        raise UnusableClip(reason, stage="decode") from error
    if image.width * image.height > MAX_FRAME_PIXELS:
        raise UnusableClip(
            f"{name}: {image.width}x{image.height} pixels, more than {MAX_FRAME_PIXELS} a frame",
            stage="decode",
        )
    return image


def decode_images(
    images: FrameImages, source: TargetFrames, *, draw: Draw
) -> tuple[list[WindowDraw], dict[int, UInt8]]:
    """The windows of the target, and RGB of its frames by number: uint8 (H, W, 3).

    Raises:
        UnusableClip: a frame cannot be read or has another size than the target.
    """
    frames = {
        number: read_pixels(name, images.read(name))
        for number, name in zip(source.numbers, source.names, strict=True)
    }
    height, width, _ = frames[source.numbers[-1]].shape
    for name, pixels in zip(source.names, frames.values(), strict=True):
        if pixels.shape[:2] != (height, width):
            raise UnusableClip(
                f"changes its size: {name} has {pixels.shape[1]}x{pixels.shape[0]} pixels, the "
                f"target {width}x{height}",
                stage="decode",
            )
    return draw(np.zeros(0), height, width), frames
