"""deltatok-train dinoworld: train_dinoworld(config), the baseline, from a patch-token cache.

A step: windows of patch tokens -> the next frame's patch tokens from one learned query a patch
(discriminative), or from the best of K noise queries a frame (model.use_bom). The same predictor,
loss and draws as world.py, without the tokenizer between.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..shards.patches.reader import PatchShards
from .config import DINOWorldTrainConfig
from .data.batches import Batch, check_frames
from .data.order import Indices, Share, evenly, split_windows
from .data.residency import Read, order_data, patch_source, resolve_residency
from .engine.checkpoints import make_model, start_folder, with_size_of_cache
from .engine.devices import make_accelerator
from .engine.logs import Meter
from .engine.loop import Trainer, check_finite
from .engine.run_folder import Run, locked
from .losses import smooth_l1
from .models.dinoworld import DINOWorld
from .selection.selector import Selector, Windows

logger = logging.getLogger(__name__)


def train_dinoworld(config: DINOWorldTrainConfig) -> Path:
    """Train, or go on, or find it done; gives OUT, by then a model folder.

    Raises what Trainer.train does, CacheMismatch for an OUT that another run or another cache
    made.
    """
    shards = PatchShards(config.patches)
    size = shards.shape[2]
    config = dataclasses.replace(
        config, model=with_size_of_cache(config.model, size, cache=config.patches)
    )
    model, started_from = make_model(
        DINOWorld, config.model, seed=config.seed, start_from=start_folder(config)
    )
    accelerator = make_accelerator(config.device, config.precision)
    config = resolve_residency(config, shards.size_bytes, accelerator)
    run = Run(
        command="dinoworld",
        config=config,
        data={
            "patches": shards.info.identity,
            "start_from": started_from,
            **order_data(config, shards),
        },
        fingerprints={"patches": shards.info.fingerprint},
    )
    if run.is_finished():
        logger.info("%s: already trained for %d steps", config.out, config.steps)
        return run.folder
    share = Share(rank=accelerator.process_index, num_ranks=accelerator.num_processes)
    stage = DINOWorldStage(model, shards, config, share, device=accelerator.device)
    with locked(run.folder, accelerator):
        Trainer(stage, run, accelerator).train()
    return run.folder


class DINOWorldStage:
    """What the loop trains: see stage.Stage. T frames of N patches a window, P = T - 1 positions,
    K samples."""

    unit = "windows"
    best_by = "validation_best_loss"

    def __init__(
        self,
        model: DINOWorld,
        shards: PatchShards,
        config: DINOWorldTrainConfig,
        share: Share,
        *,
        device: torch.device,
    ) -> None:
        check_frames(shards.shape[0], least=2)
        self.model = model
        self._config = config
        self._shards = shards
        self._device = device
        self._selector = Selector(model, config, device=device, grid=shards.grid)
        self._source = patch_source(shards, residency=config.residency, device=device)
        self._slice = share.of(config.batch_size)
        split = split_windows(shards.keys, shards.clip_index, config.validation_fraction)
        self._order = self._source.order(split.training, config.batch_size, config.seed)
        chosen = evenly(split.validation, config.validation_windows)
        # Read once: while training runs, the prefetch thread is the only reader.
        self._validation = None
        if len(chosen):
            self._validation = self._batch(self._source.read_to_keep, chosen, chosen)
            check_finite(self._validation.tensors["x"], chosen, clip_of=self.clip_of)

    @property
    def tokens_per_sample(self) -> int:
        return self._shards.shape[0] * self._shards.shape[1]

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    @property
    def can_evaluate(self) -> bool:
        return self._validation is not None

    def read(self, step: int) -> Batch:
        """Tensors: x (B, T, N, D), timestamps float32 (B, T), seconds from the first frame."""
        numbers = np.arange(self._config.batch_size)[self._slice]
        return self._batch(self._source.read, self._order.at(step)[self._slice], numbers)

    def losses(
        self, forward: nn.Module, batch: Batch, samples: slice, *, step: int, meter: Meter
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = batch.tensors["x"][samples].float()
        timestamps = batch.tensors["timestamps"][samples]
        queries: Tensor | None = None
        extras: Mapping[str, Tensor] = {}
        if self.model.config.use_bom:
            names = [("noise", step, int(number)) for number in batch.samples[samples]]
            with meter.computing("selection"):
                selection, extras = self._selector.train(
                    Windows(x, timestamps, names), step=step, checks=not meter.is_counting
                )
            queries = selection.queries
        prediction = forward(x, timestamps, queries, grid=self._shards.grid)
        return smooth_l1(prediction, x[:, 1:]).flatten(1).mean(1), extras

    def check(self, numbers: Mapping[str, float], *, step: int) -> None:
        self._selector.check(numbers, step=step)

    def evaluate(self) -> dict[str, float]:
        """As world.py: the best of num_samples_eval candidates and the mean over them (a frame's
        losses are averaged over its patches); and, instead of a constant, copying the last frame.
        """
        if self._validation is None:
            return {}
        sums = torch.zeros(3, dtype=torch.float64)
        windows = self._validation.windows
        for row, window in enumerate(windows):  # one at a time: frames are large
            x = self._validation.tensors["x"][row : row + 1].to(self._device).float()
            times = self._validation.tensors["timestamps"][row : row + 1].to(self._device)
            if self.model.config.use_bom:
                names = [("validation noise", int(window))]
                selection = self._selector.evaluate(Windows(x, times, names))
                best, mean = selection.best_losses.mean(), selection.mean_losses.mean()
            else:
                prediction = self.model(x, times, grid=self._shards.grid)
                best = mean = smooth_l1(prediction, x[:, 1:]).mean()
            copied = smooth_l1(x[:, :-1], x[:, 1:]).mean()
            sums += torch.stack([best, mean, copied]).double().cpu()
        best, mean, copied_last = (sums / len(windows)).tolist()
        return {
            "validation_best_loss": best,
            "validation_mean_loss": mean,
            "validation_copy_last_loss": copied_last,
        }

    def judge(self, values: Mapping[str, float], *, step: int) -> None:
        """A world model has no known way of being stuck."""

    def work_at(self, step: int) -> int:
        return self._selector.num_samples_at(step)

    def clip_of(self, window: int) -> str:
        return self._shards.keys[int(self._shards.clip_index[window])]

    def provenance(self) -> dict[str, Any]:
        return {
            "patches": self._shards.info.identity,
            "patches_fingerprint": self._shards.fingerprint,
        }

    def _batch(self, read: Read, windows: Indices, numbers: Indices) -> Batch:
        times = self._shards.timestamps_s(windows)
        return Batch(
            tensors={
                "x": read(windows)[0],
                "timestamps": torch.from_numpy(times - times[:, :1]),
            },
            samples=numbers,
            windows=windows,
        )
