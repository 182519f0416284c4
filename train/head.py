"""deltatok-train head: train_head(config), a linear segmentation head on cached patch tokens.

A step: patch tokens of labelled frames -> BatchNorm and 1x1 convolution -> logits, enlarged
bilinearly to the labels' size -> cross-entropy over the labelled pixels. PAPER "Evaluation".
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..shards.patches import PatchShards
from .config import HeadTrainConfig
from .data import Batch
from .devices import make_accelerator
from .first_weights import make_model, start_folder
from .labels import IGNORE, Labels
from .logs import Meter
from .loop import Trainer
from .models.heads import SegmentationHead, SegmentationHeadConfig, feature_map
from .order import BatchOrder, Indices, Share, evenly, split_windows
from .run_folder import Run
from .run_lock import locked
from .sources import patch_source

EVALUATION_FRAMES_AT_ONCE = 8
"""Frames of an evaluation on the device at a time (a guess)."""

logger = logging.getLogger(__name__)


def train_head(config: HeadTrainConfig) -> Path:
    """Train, or go on, or find it done; gives OUT, by then a model folder.

    Raises what Trainer.train does, UsageError for labels that do not fit the cache, CacheMismatch
    for an OUT that another run or another cache made.
    """
    shards = PatchShards(config.patches)
    model, started_from = make_model(
        SegmentationHead,
        SegmentationHeadConfig(in_size=shards.shape[2], num_classes=config.num_classes),
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
    stage = HeadStage(model, shards, config, share, device=accelerator.device)
    with locked(run.folder, accelerator):
        Trainer(stage, run, accelerator).train()
    return run.folder


class HeadStage:
    """What the loop trains: see stage.Stage. A sample is a frame, its number window * T + frame."""

    unit = "frames"
    best_by = "validation_loss"

    def __init__(
        self,
        model: SegmentationHead,
        shards: PatchShards,
        config: HeadTrainConfig,
        share: Share,
        *,
        device: torch.device,
    ) -> None:
        self.model = model
        self._shards = shards
        self._device = device
        self._batch_size = config.batch_size
        self._slice = share.of(config.batch_size)
        self._labels = Labels(config.labels, shards, num_classes=config.num_classes)
        source = patch_source(shards, residency=config.residency, device=device)
        self._windows = source.read_few  # frames of random windows: not in the order of stream
        split = split_windows(shards.keys, shards.clip_index, config.validation_fraction)
        self._order = BatchOrder(self._frames_of(split.training), config.batch_size, config.seed)
        chosen = evenly(split.validation, config.validation_windows)
        frames = self._frames_of(chosen)
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
        """Tensors: features (B, N, D), labels uint8 (B, H, W), filled up with IGNORE."""
        numbers = np.arange(self._batch_size)[self._slice]
        return self._read(self._order.at(step)[self._slice], numbers)

    def losses(
        self, forward: nn.Module, batch: Batch, samples: slice, *, step: int, meter: Meter
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Of each frame the mean over its labelled pixels; 0 for a frame without any."""
        losses, correct = self._score(forward, batch, samples)
        return losses, {"accuracy": correct.mean()}

    def evaluate(self) -> dict[str, float]:
        losses, correct = [], []
        for frames in self._validation:
            batch = self._read(frames, np.arange(len(frames))).to(self._device)
            loss, right = self._score(self.model, batch, slice(None))
            losses.append(loss)
            correct.append(right)
        return {
            "validation_loss": torch.cat(losses).mean().item(),
            "validation_accuracy": torch.cat(correct).mean().item(),
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

    def _frames_of(self, windows: Indices) -> Indices:
        num_frames = self._shards.shape[0]
        return (windows[:, None] * num_frames + np.arange(num_frames)).reshape(-1)

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

    def _score(self, forward: nn.Module, batch: Batch, samples: slice) -> tuple[Tensor, Tensor]:
        """Loss and share of right pixels of every frame, float32 (b,) each."""
        features = batch.tensors["features"][samples].float()
        labels = batch.tensors["labels"][samples]
        maps: Tensor = forward(feature_map(features, grid=self._shards.grid))
        losses, correct = [], []
        for logits, label, window in zip(maps, labels, batch.windows[samples], strict=True):
            height, width = self._labels.size(int(window))
            target = label[:height, :width].long()
            enlarged = F.interpolate(logits[None].float(), size=(height, width), mode="bilinear")
            count = (target != IGNORE).sum().clamp(min=1)
            loss = F.cross_entropy(enlarged, target[None], ignore_index=IGNORE, reduction="sum")
            losses.append(loss / count)
            correct.append((enlarged[0].argmax(0) == target).sum() / count)
        return torch.stack(losses), torch.stack(correct)
