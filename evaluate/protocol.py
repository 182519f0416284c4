"""The dense-forecasting protocol: sizes, crops, labels, masks and metrics, as released.

Frames are resized so that the short side is the model's size and cut into two squares at the two
ends (they may overlap); labels are never resized and cut at the middle; a prediction is brought
to the size of its half of the labels. Pure functions, used by the forecast evaluation. The
geometry is in shards/crops.py, the label rules in train/label_rules.py; both can be had from here.

Letters: B batch, T frames, C classes or channels, H, W pixels. After a cut the batch holds all
first (left or top) crops, then all second ones. Checked by tests/parity (08_eval).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassJaccardIndex

from ..shards.crops import KB_CROP, MAX_ASPECT_RATIO, Cut, compute_resize_sizes, cut_of
from ..train.label_rules import (
    IGNORE,
    NO_DEPTH,
    cityscapes_table,
    depth_label,
    garg_mask,
    kb_crop,
    vspw_table,
)
from ..train.models.heads import SegmentationHead, feature_map

__all__ = [
    "IGNORE",
    "KB_CROP",
    "MAX_ASPECT_RATIO",
    "NO_DEPTH",
    "Cut",
    "DepthRMSE",
    "MeanIoU",
    "cityscapes_table",
    "compute_resize_sizes",
    "cut_frames",
    "cut_labels",
    "cut_of",
    "depth_label",
    "garg_mask",
    "join_halves",
    "kb_crop",
    "repeat_for_crops",
    "segment",
    "upsample_predictions",
    "vspw_table",
]


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


def repeat_for_crops(values: Tensor, cut: Cut) -> Tensor:
    """What belongs to a whole frame (timestamps, sample numbers), (B, ...) -> (2 B, ...)."""
    return values if cut.wide is None else torch.cat([values, values])


def upsample_predictions(predictions: Tensor, cut: Cut, *, size: tuple[int, int]) -> Tensor:
    """Head outputs (2 B, C, h, w) -> (2 B, C, *size), size that of the cut labels; bilinear.

    Overlapping squares see more than their half: they are resized to a square of the label's
    longer side, then the first crops keep its start and the second ones its end.
    """
    if not cut.overlap:
        return _resize(predictions, size)
    height, width = size
    side = max(size)
    first, second = _resize(predictions, (side, side)).chunk(2)
    return torch.cat([first[..., :height, :width], second[..., side - height :, side - width :]])


def join_halves(halves: Tensor, cut: Cut, *, size: tuple[int, int]) -> Tensor:
    """The inverse of cut_labels, for pictures: (2 B, ..., h, w) -> (B, ..., *size)."""
    if cut.wide is None:
        return halves
    first, second = halves.chunk(2)
    dim = -1 if cut.wide else -2
    kept = size[dim] // 2
    return torch.cat([first.narrow(dim, 0, kept), second], dim=dim)


def segment(
    head: SegmentationHead, tokens: Tensor, *, grid: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Classes int64 (B, *size) of patch tokens (B, N, D) of whole frames: argmax of the resized
    logits."""
    logits: Tensor = head(feature_map(tokens, grid=grid))
    return _resize(logits, size).argmax(dim=1)


class MeanIoU:
    """Mean intersection over union of one confusion matrix over the whole set, over the classes
    that occur in predictions or labels; 0-1."""

    def __init__(self, *, num_classes: int) -> None:
        self._metric = MulticlassJaccardIndex(num_classes, ignore_index=IGNORE, validate_args=False)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """labels int64 (B, H, W); predictions the same (classes) or float (B, C, H, W) (logits)."""
        self._metric.to(labels.device).update(predictions, labels)

    def compute(self) -> Tensor:
        """The mean of everything so far, float32 scalar."""
        value: Tensor = self._metric.compute()
        return value

    def confusion(self) -> Tensor:
        """int64 (C, C) pixels so far; rows are labels, columns predictions."""
        counts: Tensor = self._metric.confmat
        return counts


class DepthRMSE:
    """Root mean squared error in metres over all valid pixels of the whole set together."""

    def __init__(self) -> None:
        self._metric = MeanSquaredError(squared=False)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """predictions float (B, 1, H, W) or (B, H, W), labels float (B, H, W); metres, labels with
        NO_DEPTH where there is no value."""
        valid = labels > NO_DEPTH
        predicted = predictions.reshape(labels.shape)[valid]
        self._metric.to(labels.device).update(predicted, labels[valid])

    def compute(self) -> Tensor:
        """The error of everything so far, float32 scalar."""
        value: Tensor = self._metric.compute()
        return value


def _resize(predictions: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(predictions, size=size, mode="bilinear", align_corners=False)
