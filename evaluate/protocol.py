"""The dense-forecasting protocol: sizes, crops, labels, masks and metrics, as released.

Frames are resized so that the short side is the model's size and cut into two squares at the two
ends (they may overlap); labels are never resized and cut at the middle; a prediction is brought
to the size of its half of the labels. Pure functions, used by the forecast evaluation. The
geometry is in shards/crops.py and train/cuts.py, the label rules in train/label_rules.py; all can
be had from here.

Letters: B batch, T frames, C classes or channels, H, W pixels. After a cut the batch holds all
first (left or top) crops, then all second ones. Checked by tests/parity (08_eval).
"""

from torch import Tensor
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassJaccardIndex

from ..shards.crops import KB_CROP, MAX_ASPECT_RATIO, Cut, compute_resize_sizes, cut_of
from ..train.cuts import (
    cut_frames,
    cut_labels,
    join_halves,
    repeat_for_crops,
    resize,
    upsample_predictions,
)
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


def segment(
    head: SegmentationHead, tokens: Tensor, *, grid: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Classes int64 (B, *size) of patch tokens (B, N, D) of whole frames: argmax of the resized
    logits."""
    logits: Tensor = head(feature_map(tokens, grid=grid))
    return resize(logits, size).argmax(dim=1)


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
