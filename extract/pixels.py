"""A window's decoded frames -> the frames that the backbone sees: crop, resize, flip.

Crops and flips happen here, on pixels: the mirrored features of an image are not the features of
the mirrored image. The order is the paper's: crop, bilinear resize on uint8, flip; in evaluation a
square is cut from the resized frame.

The paper resizes its windows with OpenCV (`INTER_LINEAR`), without antialiasing, on uint8; a cache
that trains like the pixels needs the same integers. OpenCV works in fixed point: weights have 11
bits, the columns are interpolated first, four bits are dropped, then the rows. Halving both
axes exactly is a special case there: the mean of four pixels. Only integer tensor operations are
used here, so that the result is the same on any device.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..shards.evaluation.geometry import FrameSize, frame_shape
from ..shards.sampling import WindowDraw

RESIZE_RULE = "crop, bilinear without antialiasing, uint8 (OpenCV rule)"
"""What a cache says of the resizing here."""
_WEIGHT_BITS = 11
"""OpenCV's INTER_RESIZE_COEF_BITS."""


def window_pixels(
    frames: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    draw: WindowDraw,
    *,
    frame_size: FrameSize,
    device: torch.device,
) -> Tensor:
    """The window as uint8 (T, 3, height, width) of `frame_size` on `device`, RGB, 0-255.

    frames: T of uint8 (H, W, 3), RGB, at the video's own size. draw: its crop in their pixels.
    Raises ValueError if the crop leaves the frame.
    """
    top, left, height, width = draw.crop
    bottom, right = top + height, left + width
    rows, columns, _ = frames[0].shape
    if top < 0 or left < 0 or bottom > rows or right > columns:
        raise ValueError(
            f"crop of rows {top}-{bottom} and columns {left}-{right} leaves the frame of "
            f"{rows}x{columns} pixels: it was drawn for other frames"
        )
    # A copy: decoded frames lie in a read-only buffer, and only the crop should travel. Only from
    # pinned memory does it travel without waiting for the backbone; torch keeps that for reuse.
    shape = (len(frames), height, width, 3)
    cropped = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for copy, frame in zip(cropped.numpy(), frames, strict=True):
        copy[...] = frame[top:bottom, left:right]
    planes = cropped.to(device, non_blocking=True).permute(0, 3, 1, 2)
    square = draw.square
    if square is None:
        pixels = resize_bilinear(planes, frame_shape(frame_size))
    else:  # cut after the resize, as the release does: at the cut, pixels know their neighbours
        resized = resize_bilinear(planes, (square.height, square.width))
        pixels = resized[..., square.top :, square.left :][..., : square.side, : square.side]
    return pixels.flip(-1) if draw.flipped else pixels


def resize_bilinear(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames resized to `size` = (height, width), as OpenCV's default uint8 resize gives them.

    frames: uint8 (..., H, W), any device, any strides. Returns uint8 (..., height, width),
    contiguous, on the same device. Raises ValueError for another dtype or an empty size.
    """
    if frames.dtype != torch.uint8:
        raise ValueError(f"resize takes uint8 frames, got {frames.dtype}: convert them first")
    height, width = frames.shape[-2:]
    if min(height, width, *size) < 1:
        raise ValueError(f"cannot resize {height}x{width} to {size[0]}x{size[1]}: sizes start at 1")
    if (height, width) == tuple(size):
        return frames.contiguous()
    if frames.device.type != "cpu" or frames.ndim <= 3:
        return _resize(frames, size)
    # Frame by frame: then one frame's temporaries stay in the processor's cache, measured 3x to 5x
    # faster than a window at once (2 cores, 8 frames of 256x340 to 720x1280 to 512x512).
    return torch.stack([resize_bilinear(frame, size) for frame in frames])


def _resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = frames.shape[-2:]
    if (height, width) == (2 * size[0], 2 * size[1]):
        return _halve(frames)
    taps, weights = _row_table(height, size[0], frames.device)
    if height > 2 * size[0]:  # most rows are not looked at: leave them out from the start
        rows = _resize_columns(frames.index_select(-2, taps.flatten()), size[1])
        top, bottom = rows[..., : size[0], :], rows[..., size[0] :, :]
    else:
        rows = _resize_columns(frames, size[1])
        top, bottom = rows.index_select(-2, taps[0]), rows.index_select(-2, taps[1])
    return _blend_rows(top, bottom, weights)


def _resize_columns(frames: Tensor, new_width: int) -> Tensor:
    """uint8 (..., H, W) -> int16 (..., H, new_width): the value times 2**7.

    Works on the transposed frame, where a column is contiguous: gathering single bytes is slow.
    """
    taps, weights = _column_table(frames.shape[-1], new_width, frames.device)
    columns = frames.transpose(-1, -2).contiguous()
    left = columns.index_select(-2, taps[0]).to(torch.int32).mul_(weights[0])
    right = columns.index_select(-2, taps[1]).to(torch.int32).mul_(weights[1])
    blended = left.add_(right).bitwise_right_shift_(4).to(torch.int16)
    return blended.transpose(-1, -2).contiguous()


def _blend_rows(top: Tensor, bottom: Tensor, weights: Tensor) -> Tensor:
    """The two int16 (..., H, W) that `_resize_columns` gave for each row -> uint8 (..., H, W)."""
    above = top.to(torch.int32).mul_(weights[0]).bitwise_right_shift_(16)
    below = bottom.to(torch.int32).mul_(weights[1]).bitwise_right_shift_(16)
    return above.add_(below).add_(2).bitwise_right_shift_(2).to(torch.uint8)


def _halve(frames: Tensor) -> Tensor:
    """uint8 (..., 2 H, 2 W) -> uint8 (..., H, W)."""
    rows = frames[..., 0::2, :].to(torch.int16) + frames[..., 1::2, :].to(torch.int16)
    return (rows[..., 0::2] + rows[..., 1::2]).add_(2).bitwise_right_shift_(2).to(torch.uint8)


@lru_cache(maxsize=512)
def _column_table(length: int, new_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both taps int64 (2, new_length) and their weights int32 (2, new_length, 1).

    Outside the frame OpenCV moves a column's tap to the edge with its whole weight.
    """
    first, fraction = _positions(length, new_length)
    outside = (first < 0) | (first >= length - 1)
    first = np.clip(first, 0, length - 1)
    second = np.minimum(first + 1, length - 1)
    return _to_device(first, second, np.where(outside, np.float32(0), fraction), device)


@lru_cache(maxsize=512)
def _row_table(length: int, new_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both taps int64 (2, new_length) and their weights int32 (2, new_length, 1).

    Outside the frame OpenCV repeats the edge row and keeps both of a row's weights.
    """
    first, fraction = _positions(length, new_length)
    above, below = (np.clip(first + tap, 0, length - 1) for tap in (0, 1))
    return _to_device(above, below, fraction, device)


def _positions(length: int, new_length: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Index of the first tap and the fraction towards the second, in OpenCV's mixed precision."""
    scale = 1.0 / (new_length / length)
    position = ((np.arange(new_length) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(position)
    return first.astype(np.int64), position - first


def _to_device(
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    fraction: NDArray[np.float32],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    weights = np.stack([np.float32(1) - fraction, fraction]) * np.float32(1 << _WEIGHT_BITS)
    fixed_point = torch.from_numpy(np.rint(weights).astype(np.int32)).unsqueeze(-1)
    return torch.from_numpy(np.stack([first, second])).to(device), fixed_point.to(device)
