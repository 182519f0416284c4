"""Cutting frames, labels and predictions into the two crops of an evaluation window, as released.

Frames are cut into two squares at the two ends, which may overlap; labels are cut at the middle; a
prediction is brought to the size of its half of the labels.

Letters: B batch, C classes or channels, H, W pixels. After a cut the batch holds all first (left or
top) crops, then all second ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...shards.evaluation.geometry import Cut
from ...shards.evaluation.labels import IGNORE, NO_DEPTH


def cut_frames(frames: Tensor, cut: Cut) -> Tensor:
    """Frames (B, ..., H, W) -> squares (2 B, ..., S, S) at the two ends, S the short side."""
    height, width = frames.shape[-2:]
    if cut.wide is None:
        return frames
    if cut.wide:
        return torch.cat([frames[..., :height], frames[..., width - height :]])
    return torch.cat([frames[..., :width, :], frames[..., height - width :, :]])


def cut_labels(labels: Tensor, cut: Cut) -> Tensor:
    """Labels (B, ..., H, W) -> halves (2 B, ..., h, w); of an odd side the first half is padded.

    Integer labels are padded with IGNORE, float ones with NO_DEPTH.
    """
    if cut.wide is None:
        return labels
    dim = -1 if cut.wide else -2
    size = labels.shape[dim]
    first = labels.narrow(dim, 0, size // 2)
    second = labels.narrow(dim, size // 2, size - size // 2)
    missing = size % 2
    pad = (0, missing, 0, 0) if cut.wide else (0, 0, 0, missing)
    value = NO_DEPTH if labels.is_floating_point() else IGNORE
    return torch.cat([F.pad(first, pad, value=value), second])


def upsample_predictions(predictions: Tensor, cut: Cut, *, size: tuple[int, int]) -> Tensor:
    """Head outputs (2 B, C, h, w) -> (2 B, C, *size), size that of the cut labels; bilinear.

    Overlapping squares see more than their half: they are resized to a square of the label's
    longer side, then the first crops keep its start and the second ones its end.
    """
    if not cut.overlap:
        return resize(predictions, size)
    first, second = predictions.chunk(2)
    return torch.cat(
        [
            upsample_half(first, cut, second=False, size=size),
            upsample_half(second, cut, second=True, size=size),
        ]
    )


def upsample_half(predictions: Tensor, cut: Cut, *, second: bool, size: tuple[int, int]) -> Tensor:
    """As upsample_predictions, of first or of second crops alone: (B, C, h, w) -> (B, C, *size)."""
    if not cut.overlap:
        return resize(predictions, size)
    height, width = size
    side = max(size)
    whole = resize(predictions, (side, side))
    if second:
        return whole[..., side - height :, side - width :]
    return whole[..., :height, :width]


def resize(predictions: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned: (B, C, h, w) -> (B, C, *size)."""
    return F.interpolate(predictions, size=size, mode="bilinear", align_corners=False)
