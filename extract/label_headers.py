"""The sizes of frames and labels, from their headers: what a data set is looked through with.

Called by dataset.py.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from .frames_decoder import read_shape
from .unusable import UnusableClip

LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
"""Pillow's names of one whole number a pixel."""

_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, OverflowError, EOFError)


class BadLabel(ValueError):
    """A label that cannot be used, or its frame; says which and why."""


def image_size(root: Path, name: str) -> tuple[int, int]:
    """Height and width of a frame as it is shown."""
    try:
        return read_shape(name, (root / name).read_bytes())
    except UnusableClip as error:
        raise BadLabel(str(error)) from error


def label_size(root: Path, name: str, *, frame: int | None) -> tuple[int, int]:
    """Height and width of a label; FileNotFoundError if it is not there."""
    path = root / name
    if frame is not None:
        return _array_size(path, name, frame)
    path.stat()
    try:
        with Image.open(path, formats=("PNG", "BMP", "TIFF")) as image:
            mode, (width, height) = image.mode, image.size
    except (Image.DecompressionBombError, *_PILLOW_ERRORS) as error:
        raise BadLabel(f"{name} is no label that can be read: {error}") from error
    if mode not in LABEL_MODES:
        raise BadLabel(
            f"{name} is an image of mode {mode}, wanted one whole number a pixel (grey or palette)"
        )
    return height, width


def _array_size(path: Path, name: str, frame: int) -> tuple[int, int]:
    path.stat()
    try:
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    except (OSError, ValueError) as error:
        raise BadLabel(f"{name} is no array that can be read: {error}") from error
    if len(shape) != 3 or shape[0] <= frame:
        raise BadLabel(f"{name} has shape {shape}, wanted (frames, H, W) with frame {frame}")
    return int(shape[1]), int(shape[2])
