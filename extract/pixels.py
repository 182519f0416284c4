"""A window's decoded frames to the square frames that the backbone sees: crop, resize, flip.

Crops and flips happen here, on pixels: the mirrored features of an image are not the features of
the mirrored image. The order is the paper's: crop, bilinear resize on uint8, flip; in evaluation a
square is cut from the resized frame. Integers only, so that the device changes nothing. Called by
staging.py.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .resize import resize_bilinear
from .sampling import WindowDraw


def window_pixels(
    frames: NDArray[np.uint8], draw: WindowDraw, *, frame_size: int, device: torch.device
) -> Tensor:
    """The window as uint8 (T, 3, frame_size, frame_size) on `device`, RGB, 0-255.

    frames: uint8 (T, H, W, 3), RGB, at the video's own size. draw: crop in pixels of these frames.
    Raises ValueError if the crop leaves the frame.
    """
    top, left, height, width = draw.crop
    bottom, right = top + height, left + width
    if top < 0 or left < 0 or bottom > frames.shape[1] or right > frames.shape[2]:
        raise ValueError(
            f"crop of rows {top}-{bottom} and columns {left}-{right} leaves the frame of "
            f"{frames.shape[1]}x{frames.shape[2]} pixels: it was drawn for other frames"
        )
    # A copy: decoded frames lie in a read-only buffer, and only the crop should travel. Only from
    # pinned memory does it travel without waiting for the backbone; torch keeps that for reuse.
    shape = (len(frames), height, width, 3)
    cropped = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    cropped.numpy()[...] = frames[:, top:bottom, left:right]
    planes = cropped.to(device, non_blocking=True).permute(0, 3, 1, 2)
    square = draw.square
    if square is None:
        pixels = resize_bilinear(planes, (frame_size, frame_size))
    else:  # cut after the resize, as the release does: at the cut, pixels know their neighbours
        rows = slice(square.top, square.top + frame_size)
        columns = slice(square.left, square.left + frame_size)
        pixels = resize_bilinear(planes, (square.height, square.width))[..., rows, columns]
    return pixels.flip(-1) if draw.flipped else pixels
