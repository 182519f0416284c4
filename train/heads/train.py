"""deltatok-train head: train_head(config), a linear segmentation or depth head on cached tokens.

A step: patch tokens of labelled frames -> BatchNorm and 1x1 convolution -> logits or metres,
enlarged bilinearly to the labels' size -> the task's loss over the labelled pixels (head_tasks.py).
PAPER "Evaluation".
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..shards.errors import UsageError
from ..shards.patches import PatchShards
from .config_head import HeadTrainConfig
from .data import Batch
from .devices import make_accelerator
from .finite import check_finite
from .first_weights import make_model, start_folder
from .head_tasks import Task, task_of
from .labels import Labels, LabelSource
from .logs import Meter
from .loop import Trainer
from .models.heads import DepthHead, SegmentationHead, feature_map
from .order import BatchOrder, Indices, Share, evenly, split_windows
from .run_folder import Run
from .run_lock import locked
from .sources import patch_source
from .target_labels import TargetLabels

EVALUATION_FRAMES_AT_ONCE = 8
"""Frames of an evaluation on the device at a time (a guess)."""

logger = logging.getLogger(__name__)


def train_head(config: HeadTrainConfig) -> Path:
    """Train, or go on, or find it done; gives OUT, by then a model folder.

    Raises what Trainer.train does, UsageError for labels that do not fit the cache, CacheMismatch
    for an OUT that another run or another cache made.
    """
    shards = PatchShards(config.patches)
    labels = open_labels(config, shards)
    task = task_of(
        labels,
        in_size=shards.shape[2],
        num_classes=config.num_classes,
        max_depth=config.max_depth,
    )
    model, started_from = make_model(
        task.head_class,
        task.head_config,
        seed=config.seed,
        start_from=start_folder(config),
    )
    run = Run(
        command="head",
        config=config,
        data={
            "patches": shards.info.identity,
            "windows": shards.arrangement,
            "start_from": started_from,
        },
        fingerprints={"patches": shards.info.fingerprint},
    )
    if run.is_finished():
        logger.info("%s: already trained for %d steps", config.out, config.steps)
        return run.folder
    accelerator = make_accelerator(config.device, config.precision)
    share = Share(rank=accelerator.process_index, num_ranks=accelerator.num_processes)
    stage = HeadStage(model, shards, labels, task, config, share, device=accelerator.device)
    with locked(run.folder, accelerator):
        Trainer(stage, run, accelerator).train()
    return run.folder


def open_labels(config: HeadTrainConfig, shards: PatchShards) -> LabelSource:
    """The labels of the cache, by its kind; UsageError where they do not fit it."""
    if shards.info.identity.get("sampling", {}).get("policy") == "evaluation":
        return TargetLabels(config.labels, shards, num_classes=config.num_classes)
    if config.num_classes is None:
        raise UsageError("num_classes: not given; give --num-classes, the classes of the labels")
    return Labels(config.labels, shards, num_classes=config.num_classes)


class HeadStage:
    """What the loop trains: see stage.Stage. A sample is a frame, its number window * T + frame."""

    unit = "frames"
    best_by = "validation_loss"

    def __init__(
        self,
        model: SegmentationHead | DepthHead,
        shards: PatchShards,
        labels: LabelSource,
        task: Task,
        config: HeadTrainConfig,
        share: Share,
        *,
        device: torch.device,
    ) -> None:
        self.model: SegmentationHead | DepthHead = model
        self._labels = labels
        self._task = task
        self._shards = shards
        self._device = device
        self._batch_size = config.batch_size
        self._slice = share.of(config.batch_size)
        source = patch_source(shards, residency=config.residency, device=device)
        self._windows = source.read_few  # frames of random windows: not in the order of stream
        split = split_windows(*labels.videos, config.validation_fraction)
        samples = labels.samples(split.training)
        self._order = BatchOrder(samples, config.batch_size, config.seed)
        frames = labels.samples(evenly(split.validation, config.validation_windows))
        size = EVALUATION_FRAMES_AT_ONCE
        self._validation = [frames[at : at + size] for at in range(0, len(frames), size)]

    @property
    def tokens_per_sample(self) -> int:
        return self._shards.shape[1]

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    @property
    def can_evaluate(self) -> bool:
        return len(self._validation) > 0

    def read(self, step: int) -> Batch:
        """Tensors: features (B, N, D), labels uint8 or float32 (B, H, W), filled up."""
        numbers = np.arange(self._batch_size)[self._slice]
        return self._read(self._order.at(step)[self._slice], numbers)

    def losses(
        self, forward: nn.Module, batch: Batch, samples: slice, *, step: int, meter: Meter
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Of each frame the mean over its labelled pixels; 0 for a frame without any."""
        losses, sums, counts = self._score(forward, batch, samples)
        return losses, {self._task.metric: self._task.summary(sums, counts)}

    def check(self, numbers: Mapping[str, float], *, step: int) -> None:
        """A step has nothing to be checked."""

    def evaluate(self) -> dict[str, float]:
        scores = []
        for frames in self._validation:
            batch = self._read(frames, np.arange(len(frames))).to(self._device)
            check_finite(batch.tensors["features"], batch.windows, clip_of=self.clip_of)
            scores.append(self._score(self.model, batch, slice(None)))
        losses, sums, counts = (torch.cat(values) for values in zip(*scores, strict=True))
        return {
            "validation_loss": losses.mean().item(),
            f"validation_{self._task.metric}": self._task.summary(sums, counts).item(),
        }

    def judge(self, values: Mapping[str, float], *, step: int) -> None:
        """A linear head has no way of being stuck."""

    def work_at(self, step: int) -> int:
        return 0

    def clip_of(self, window: int) -> str:
        return self._shards.keys[int(self._shards.clip_index[window])]

    def provenance(self) -> dict[str, Any]:
        return {
            "patches": self._shards.info.identity,
            "patches_fingerprint": self._shards.fingerprint,
        }

    def _read(self, chosen: Indices, numbers: Indices) -> Batch:
        windows, frames = np.divmod(chosen, self._shards.shape[0])
        unique, rows = np.unique(windows, return_inverse=True)
        (tokens,) = self._windows(unique)
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
