"""What a head learns and how well it does: classes or metres, on one frame's pixels at a time.

Letters: C classes, H, W pixels of the label. Used by head.py.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shards.errors import UsageError
from .label_rules import IGNORE, NO_DEPTH
from .labels import LabelSource
from .models.heads import DepthHead, DepthHeadConfig, SegmentationHead, SegmentationHeadConfig

SCALE_INVARIANCE = 0.85
"""Share of a frame's squared mean log error that costs nothing: Eigen's lambda, with the value that
depth estimators use. Training RMSE after 200 steps on 16 frames of 7-Scenes, random backbone, two
seeds: 0.253 m; with 0.5 0.266 m, with 0 0.281 m."""
LOG_FLOOR_M = 1e-3
"""Metres added before the logarithm (a guess, as usual)."""


class Task(Protocol):
    """Segmentation or depth."""

    @property
    def metric(self) -> str:
        """Name of what `summary` gives, in the log."""

    @property
    def head_class(self) -> type[SegmentationHead] | type[DepthHead]:
        """What learns."""

    @property
    def head_config(self) -> SegmentationHeadConfig | DepthHeadConfig:
        """Its config."""

    def score(self, prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, what is summed for the metric, and the number of labelled pixels; scalars.

        prediction: float32 (C or 1, H, W), of the label's size; label: (H, W)."""

    def summary(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The metric of frames, from their sums and counts, (B,) each."""


class Segmentation:
    """Cross-entropy over the labelled pixels; the share of them that is right."""

    metric = "accuracy"
    head_class = SegmentationHead

    def __init__(self, *, in_size: int, num_classes: int) -> None:
        self.head_config = SegmentationHeadConfig(in_size=in_size, num_classes=num_classes)

    def score(self, prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        target = label.long()
        count = (target != IGNORE).sum()
        loss = F.cross_entropy(prediction[None], target[None], ignore_index=IGNORE, reduction="sum")
        return loss / count.clamp(min=1), (prediction.argmax(0) == target).sum(), count

    def summary(self, sums: Tensor, counts: Tensor) -> Tensor:
        return (sums / counts.clamp(min=1)).mean()


class Depth:
    """The root of Eigen's scale-invariant log error of a frame; the RMSE over all pixels.

    The paper does not name the loss of its depth head; this is the usual one for 256 linear bins.
    """

    metric = "rmse_m"
    head_class = DepthHead

    def __init__(self, *, in_size: int, max_depth: float | None) -> None:
        config = DepthHeadConfig(in_size=in_size)
        if max_depth is not None:
            config = DepthHeadConfig(in_size=in_size, max_depth=max_depth)
        self.head_config = config

    def score(self, prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        valid = (label > NO_DEPTH) & (label <= self.head_config.max_depth)
        count = valid.sum()
        metres, wanted = prediction[0], torch.where(valid, label, torch.ones_like(label))
        error = torch.log(metres + LOG_FLOOR_M) - torch.log(wanted + LOG_FLOOR_M)
        error = torch.where(valid, error, torch.zeros_like(error))
        number = count.clamp(min=1)
        mean = error.sum() / number
        loss = error.square().sum() / number - SCALE_INVARIANCE * mean.square()
        squares = torch.where(valid, (metres - wanted).square(), torch.zeros_like(metres)).sum()
        # The root has no slope at 0, where a frame without any depth is.
        return torch.sqrt(loss + 1e-8), squares.detach(), count

    def summary(self, sums: Tensor, counts: Tensor) -> Tensor:
        return torch.sqrt(sums.sum() / counts.sum().clamp(min=1))


def task_of(
    labels: LabelSource, *, in_size: int, num_classes: int | None, max_depth: float | None
) -> Task:
    """What the head of these labels learns; UsageError for settings that do not go with them."""
    if labels.kind == "depth":
        if num_classes is not None:
            raise UsageError(
                f"num_classes {num_classes}: the labels are depth, which has no classes: leave it "
                "out"
            )
        return Depth(in_size=in_size, max_depth=max_depth)
    if max_depth is not None:
        raise UsageError(f"max_depth {max_depth}: the labels are classes, no depth: leave it out")
    return Segmentation(in_size=in_size, num_classes=labels.num_classes)
