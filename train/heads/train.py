"""deltatok-train head: train_head(config), a linear segmentation or depth head on cached tokens.

A step: patch tokens of labelled frames -> BatchNorm and 1x1 convolution -> logits or metres,
enlarged bilinearly to the labels' size -> the task's loss over the labelled pixels. A task says
what a head learns, classes or metres, and how well it does, one frame's pixels at a time. PAPER
"Evaluation".

Letters: C classes, H, W pixels of the label.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...shards.errors import UsageError
from ...shards.evaluation.labels import IGNORE, NO_DEPTH
from ...shards.patches.reader import PatchShards
from ..config import HeadTrainConfig
from ..data.batches import Batch
from ..data.order import BatchOrder, Indices, RankSlice
from ..data.residency import Read
from ..engine.logs import Meter
from ..engine.loop import train_objective
from ..engine.objective import Objective
from ..models.heads import (
    DepthHead,
    DepthHeadConfig,
    SegmentationHead,
    SegmentationHeadConfig,
    feature_map,
)
from .labels import ClipFrameLabels, LabelSource, TargetLabels

SCALE_INVARIANCE = 0.85
"""Share of a frame's squared mean log error that costs nothing: Eigen's lambda, with the value that
depth estimators use. Training RMSE after 200 steps on 16 frames of 7-Scenes, random backbone, two
seeds: 0.253 m; with 0.5 0.266 m, with 0 0.281 m."""
LOG_FLOOR_M = 1e-3
"""Metres added before the logarithm (a guess, as usual)."""


class SegmentationTask:
    """Cross-entropy over the labelled pixels; the share of them that is right."""

    metric = "accuracy"
    """Name of what `summary` gives, in the log."""
    head_class = SegmentationHead

    def __init__(self, *, in_size: int, num_classes: int) -> None:
        self.head_config = SegmentationHeadConfig(in_size=in_size, num_classes=num_classes)

    def score(self, prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, what is summed for the metric, and the number of labelled pixels; scalars.

        prediction: float32 (C or 1, H, W), of the label's size; label: (H, W)."""
        target = label.long()
        count = (target != IGNORE).sum()
        loss = F.cross_entropy(prediction[None], target[None], ignore_index=IGNORE, reduction="sum")
        return loss / count.clamp(min=1), (prediction.argmax(0) == target).sum(), count

    def summary(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The metric of frames, from their sums and counts, (B,) each."""
        return (sums / counts.clamp(min=1)).mean()


class DepthTask:
    """The root of Eigen's scale-invariant log error of a frame; the RMSE over all pixels.

    The paper does not name the loss of its depth head; this is the usual one for 256 linear bins.
    """

    metric = "rmse_m"
    head_class = DepthHead

    def __init__(self, *, in_size: int, max_depth: float | None) -> None:
        self.head_config = DepthHeadConfig(in_size=in_size)
        if max_depth is not None:
            self.head_config = replace(self.head_config, max_depth=max_depth)

    def score(self, prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As SegmentationTask's."""
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
        """As SegmentationTask's."""
        return torch.sqrt(sums.sum() / counts.sum().clamp(min=1))


Task = SegmentationTask | DepthTask
"""What a head learns."""


def task_of(config: HeadTrainConfig, labels: LabelSource, *, in_size: int) -> Task:
    """What the head of these labels learns; UsageError for settings that do not go with them."""
    num_classes, max_depth = config.num_classes, config.max_depth
    if labels.kind == "depth":
        if num_classes is not None:
            raise UsageError(
                f"num_classes {num_classes}: the labels are depth, which has no classes: leave it "
                "out"
            )
        return DepthTask(in_size=in_size, max_depth=max_depth)
    if max_depth is not None:
        raise UsageError(f"max_depth {max_depth}: the labels are classes, no depth: leave it out")
    return SegmentationTask(in_size=in_size, num_classes=labels.num_classes)


EVALUATION_FRAMES_AT_ONCE = 8
"""Frames of an evaluation on the device at a time (a guess)."""


def train_head(config: HeadTrainConfig) -> Path:
    """train_objective for a head; gives OUT, by then a model folder.

    Raises UsageError for labels that do not fit the cache.
    """
    shards = PatchShards(config.patches)
    labels = open_labels(config, shards)
    task = task_of(config, labels, in_size=shards.shape[2])
    return train_objective(
        "head",
        config,
        shards,
        (task.head_class, task.head_config),
        partial(HeadObjective, labels=labels, task=task),
    )


def open_labels(config: HeadTrainConfig, shards: PatchShards) -> LabelSource:
    """The labels of the cache, by its kind; UsageError where they do not fit it."""
    if shards.info.identity.get("sampling", {}).get("policy") == "evaluation":
        return TargetLabels(config.labels, shards, num_classes=config.num_classes)
    if config.num_classes is None:
        raise UsageError("num_classes: not given; give --num-classes, the classes of the labels")
    return ClipFrameLabels(config.labels, shards, num_classes=config.num_classes)


class HeadObjective(Objective):
    """A sample is a frame, its number window * T + frame."""

    unit = "frames"
    best_by = "validation_loss"
    model: SegmentationHead | DepthHead
    _shards: PatchShards

    def __init__(
        self,
        model: SegmentationHead | DepthHead,
        shards: PatchShards,
        config: HeadTrainConfig,
        ranks: RankSlice,
        device: torch.device,
        *,
        labels: LabelSource,
        task: Task,
    ) -> None:
        super().__init__(model, shards, config, ranks, device, videos=labels.videos)
        self.tokens_per_sample = shards.shape[1]
        self._labels, self._task = labels, task
        self._slice = ranks.of(config.batch_size)
        self.order = BatchOrder(labels.samples(self._training), config.batch_size, config.seed)

    def read(self, step: int) -> Batch:
        """Tensors: features (B, N, D), labels uint8 or float32 (B, H, W), filled up."""
        numbers = np.arange(self.order.per_batch)[self._slice]
        # Frames of random windows: not in the order of stream.
        return self._read(self._source.read_any, self.order.at(step)[self._slice], numbers)

    def losses(
        self, forward: nn.Module, batch: Batch, samples: slice, *, step: int, meter: Meter
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Of each frame the mean over its labelled pixels; 0 for a frame without any."""
        losses, sums, counts = self._score(forward, batch, samples)
        return losses, {self._task.metric: self._task.summary(sums, counts)}

    def evaluate(self) -> dict[str, float]:
        scores = []
        validation = self._labels.samples(self.validation)
        for start in range(0, len(validation), EVALUATION_FRAMES_AT_ONCE):
            frames = validation[start : start + EVALUATION_FRAMES_AT_ONCE]
            batch = self._read(self._source.read_to_keep, frames, frames).to(self._device)
            self.check_finite(batch.tensors["features"], batch.windows)
            scores.append(self._score(self.model, batch, slice(None)))
        losses, sums, counts = (torch.cat(values) for values in zip(*scores, strict=True))
        return {
            "validation_loss": losses.mean().item(),
            f"validation_{self._task.metric}": self._task.summary(sums, counts).item(),
        }

    def _read(self, read: Read, chosen: Indices, numbers: Indices) -> Batch:
        windows, frames = np.divmod(chosen, self._shards.shape[0])
        unique, rows = np.unique(windows, return_inverse=True)
        (tokens,) = read(unique)
        return Batch(
            tensors={
                "features": tokens[torch.from_numpy(rows), torch.from_numpy(frames)],
                "labels": torch.from_numpy(self._labels.read(windows, frames)),
            },
            samples=numbers,
            windows=windows,
        )

    def _score(
        self, forward: nn.Module, batch: Batch, samples: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of every frame the loss, the metric's sum and the labelled pixels, (b,) each."""
        features = batch.tensors["features"][samples].float()
        labels = batch.tensors["labels"][samples]
        maps: Tensor = forward(feature_map(features, grid=self._shards.grid))
        scores = []
        for output, label, window in zip(maps, labels, batch.windows[samples], strict=True):
            height, width = self._labels.size(int(window))
            enlarged = self._labels.enlarge(output[None].float(), int(window))
            scores.append(self._task.score(enlarged[0], label[:height, :width]))
        losses, sums, counts = (torch.stack(values) for values in zip(*scores, strict=True))
        return losses, sums, counts
