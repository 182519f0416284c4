"""The dense-forecasting protocol: sizes, crops, labels, masks and metrics, as released.

Frames are resized so that the short side is the model's size and cut into two squares at the two
ends (they may overlap); labels are never resized and cut at the middle; a prediction is brought
to the size of its half of the labels. Pure functions, used by the forecast evaluation.

Letters: B batch, T frames, C classes or channels, H, W pixels. After a cut the batch holds all
first (left or top) crops, then all second ones. Checked by tests/parity (08_eval).
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassJaccardIndex

from ..shards.errors import DeltatokError
from ..train.models.heads import SegmentationHead, feature_map

Scalar = TypeVar("Scalar", bound=np.generic)

IGNORE = 255
"""Label value that counts nowhere."""
NO_DEPTH = 0.0
"""Depth value that counts nowhere."""
MAX_ASPECT_RATIO = 2.0
MIN_DEPTH_M, MAX_DEPTH_M = 1e-3, 80.0
KB_CROP = (352, 1216)
"""Height and width of the KITTI benchmark crop, pixels."""
GARG_CROP = (0.40810811, 0.99189189, 0.03594771, 0.96405229)
"""First and last row, first and last column of Garg's window, as fractions of height and width."""
PNG_DEPTH_STEPS = 256.0
"""KITTI depth images hold metres times this, as uint16."""

_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label ids of the 19 evaluated classes, in class order (cityscapesScripts, labels.py)."""
_VSPW_NUM_CLASSES = 124


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


def kb_crop(image: NDArray[Scalar]) -> NDArray[Scalar]:
    """The KITTI benchmark crop of an image (H, W, ...): bottom rows, middle columns."""
    height, width = KB_CROP
    if image.shape[0] < height or image.shape[1] < width:
        raise DeltatokError(
            f"an image of {image.shape[0]} x {image.shape[1]} pixels cannot be cropped to "
            f"{height} x {width}; pass a whole KITTI frame"
        )
    top, left = image.shape[0] - height, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def garg_mask(depth: NDArray[np.float32]) -> NDArray[np.bool_]:
    """bool (H, W): depth strictly between 1 mm and 80 m, inside Garg's window."""
    height, width = depth.shape
    top, bottom, left, right = GARG_CROP
    mask = np.zeros(depth.shape, dtype=np.bool_)
    mask[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = True
    inside: NDArray[np.bool_] = mask & (depth > np.float32(MIN_DEPTH_M)) & (depth < MAX_DEPTH_M)
    return inside


def depth_label(png: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Metres float32 (352, 1216), 0 where there is no value, from a KITTI depth image uint16."""
    depth = kb_crop(png).astype(np.float32) / np.float32(PNG_DEPTH_STEPS)
    return depth * garg_mask(depth)


def cityscapes_table() -> NDArray[np.uint8]:
    """uint8 (256,): stored label id -> class 0..18, or IGNORE."""
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[list(_CITYSCAPES_IDS)] = np.arange(len(_CITYSCAPES_IDS))
    return table


def vspw_table() -> NDArray[np.uint8]:
    """uint8 (256,): stored label value -> class 0..123, or IGNORE (0 and above 124)."""
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[1 : _VSPW_NUM_CLASSES + 1] = np.arange(_VSPW_NUM_CLASSES)
    return table


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
