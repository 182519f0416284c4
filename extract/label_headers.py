"""The sizes of frames and labels, from their headers: what a data set is looked through with.

Called by dataset.py.
"""

import stat
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..shards.npy import map_npy
from .frames_decoder import EXIF_ORIENTATION

LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
"""Pillow's names of one whole number a pixel."""

_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, OverflowError, EOFError)


class BadLabel(ValueError):
    """A label that cannot be used, or its frame; says which and why."""


def file_size(root: Path, name: str) -> int:
    """Bytes; FileNotFoundError if it is not there, BadLabel if it is a folder, a pipe or the like,
    which would be waited for."""
    status = (root / name).stat()
    if not stat.S_ISREG(status.st_mode):
        raise BadLabel(f"{name} is no file")
    return status.st_size


def image_size(root: Path, name: str) -> tuple[int, int]:
    """Height and width of a frame as it is shown, from its header alone: asking a PNG for metadata
    that it does not begin with would decode it. BadLabel if it is no image."""
    try:
        with Image.open(root / name, formats=("JPEG", "PNG")) as image:
            told = image.format == "JPEG" or "exif" in image.info
            turned = told and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = image.size
    except UnidentifiedImageError as error:  # whose text names the whole path
        raise BadLabel(f"{name} is no JPEG or PNG image") from error
    except (Image.DecompressionBombError, *_PILLOW_ERRORS) as error:
        raise BadLabel(f"{name} cannot be read: {error}") from error
    return (width, height) if turned else (height, width)


def label_size(root: Path, name: str, *, frame: int | None) -> tuple[int, int]:
    """Height and width of a label; BadLabel if it cannot be read."""
    path = root / name
    if frame is not None:
        return _array_size(path, name, frame)
    try:
        with Image.open(path, formats=("PNG", "BMP", "TIFF")) as image:
            mode, (width, height) = image.mode, image.size
    except UnidentifiedImageError as error:  # whose text names the whole path
        raise BadLabel(f"{name} is no label that can be read: no PNG, BMP or TIFF") from error
    except (Image.DecompressionBombError, *_PILLOW_ERRORS) as error:
        raise BadLabel(f"{name} is no label that can be read: {error}") from error
    if mode not in LABEL_MODES:
        raise BadLabel(
            f"{name} is an image of mode {mode}, wanted one whole number a pixel (grey or palette)"
        )
    return height, width


def _array_size(path: Path, name: str, frame: int) -> tuple[int, int]:
    try:
        shape = map_npy(path).shape
    except (OSError, ValueError) as error:
        raise BadLabel(f"{name} is no array that can be read: {error}") from error
    if len(shape) != 3 or shape[0] <= frame:
        raise BadLabel(f"{name} has shape {shape}, wanted (frames, H, W) with frame {frame}")
    return int(shape[1]), int(shape[2])
