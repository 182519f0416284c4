"""Clips that are stored as images, one a frame: folders whose names tell the times, and the frames
of a target of a data set.

EXIF rotation is applied: a frame is what viewers show.
"""

import io
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...shards.errors import ClipError
from ...shards.files import open_file
from ..sources.clip import TargetFrames, frame_seconds, list_frames
from ..sources.zips import MAX_FRAME_BYTES
from .backends import Draw, DrawnFrames, frames_used
from .container import MAX_MEAN_GAP_S, Float64, UInt8, describe

MAX_FRAME_PIXELS = 2**26
"""A frame of 8192 x 8192. More is no video frame, but a file made to fill the memory (a guess)."""

EXIF_ORIENTATION = 0x0112
PILLOW_ERRORS = (
    Image.DecompressionBombError,
    *(OSError, SyntaxError, ValueError, OverflowError, struct.error, EOFError),
)
"""What Pillow raises for files that are no images of their kind."""


class FrameImages(Protocol):
    """The frames of one clip, in any order."""

    @property
    def names(self) -> list[str]:
        """File names, which say the seconds."""

    def read(self, name: str) -> bytes:
        """The image file; ClipError if it cannot be read."""


class FolderImages:
    """Image files below a folder, by name: its frames, or those named."""

    def __init__(self, folder: Path, names: Sequence[str] | None = None) -> None:
        """OSError where it cannot be read, or one of `names` is not there."""
        self._folder = folder
        if names is None:
            self._sizes = dict(list_frames(folder))
        else:
            self._sizes = {name: (folder / name).stat().st_size for name in names}

    @property
    def names(self) -> list[str]:
        return list(self._sizes)

    @property
    def size_bytes(self) -> int:
        """Of all together."""
        return sum(self._sizes.values())

    def read(self, name: str) -> bytes:
        if self._sizes[name] > MAX_FRAME_BYTES:
            raise ClipError(f"{name}: {self._sizes[name]} bytes, no frame", stage="decode")
        try:
            with open_file(self._folder / name) as file:
                return file.read()
        except OSError as error:
            raise ClipError(f"{name}: {describe(error)}", stage="decode") from error


def decode_frame_folder(images: FrameImages, *, draw: Draw) -> DrawnFrames:
    """The windows of the clip; only the frames they use are decoded.

    Raises:
        ClipError: no frames, names or images that make no sense, frames of different sizes, or
            no window can be drawn.
    """
    names, times_s = in_time_order(images.names)
    shape = _read_shape(names[0], images.read(names[0]))
    windows = draw(times_s, *shape)
    frames = {}
    for index in sorted(frames_used(windows)):
        pixels = read_pixels(names[index], images.read(names[index]))
        if pixels.shape[:2] != shape:
            raise ClipError(
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
        raise ClipError("holds no frames named *_<seconds>.jpg", stage="open")
    since_first = [float(times[name] - times[ordered[0]]) for name in ordered]
    if since_first[-1] > MAX_MEAN_GAP_S * len(ordered):
        raise ClipError(
            f"timestamps make no sense: {len(ordered)} frames over {since_first[-1]:.4g} s: are "
            "the numbers in the names seconds?",
            stage="decode",
        )
    return ordered, np.array(since_first, np.float64)


def _read_shape(name: str, data: bytes) -> tuple[int, int]:
    """Height and width of an image as it is shown, from its header."""
    with _opened_image(name, data) as image:
        turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
        width, height = image.size
    return (width, height) if turned else (height, width)


def read_pixels(name: str, data: bytes) -> UInt8:
    """uint8 (H, W, 3) RGB."""
    with _opened_image(name, data) as image:
        shown = ImageOps.exif_transpose(image)
        return np.ascontiguousarray(np.asarray(shown.convert("RGB"), np.uint8))


@contextmanager
def _opened_image(name: str, data: bytes) -> Iterator[Image.Image]:
    """The image, of a size that is allowed and not decoded yet; ClipError for whatever Pillow
    raises while it is used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about metadata and sizes
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                if image.width * image.height > MAX_FRAME_PIXELS:
                    raise ClipError(
                        f"{name}: {image.width}x{image.height} pixels, more than "
                        f"{MAX_FRAME_PIXELS} a frame",
                        stage="decode",
                    )
                yield image
        except ClipError:
            raise
        except UnidentifiedImageError as error:  # whose text names an address in memory
            reason = f"{name} cannot be decoded: is no JPEG or PNG image"
            raise ClipError(reason, stage="decode") from error
        except PILLOW_ERRORS as error:
            reason = f"{name} cannot be decoded: {describe(error)}"
            raise ClipError(reason, stage="decode") from error


def decode_target_frames(images: FrameImages, source: TargetFrames, *, draw: Draw) -> DrawnFrames:
    """The windows of the target, and its frames by their numbers in the sequence.

    Raises:
        ClipError: a frame cannot be read or has another size than the target.
    """
    frames = {
        number: read_pixels(name, images.read(name))
        for number, name in zip(source.numbers, source.names, strict=True)
    }
    height, width, _ = frames[source.numbers[-1]].shape
    for name, pixels in zip(source.names, frames.values(), strict=True):
        if pixels.shape[:2] != (height, width):
            raise ClipError(
                f"changes its size: {name} has {pixels.shape[1]}x{pixels.shape[0]} pixels, the "
                f"target {width}x{height}",
                stage="decode",
            )
    return draw(np.zeros(0), height, width), frames
