"""deltatok-train world: train_world(config), from a delta-token cache.

A step: windows of delta tokens -> K noise queries a position, without gradient -> the one whose
prediction is nearest the true token -> that one again with gradient (best-of-many, section 4).
With model.use_bom false: one learned query, no selection.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..shards.cache import DELTAS, read_cache_info
from ..shards.deltas.reader import DeltaShards
from .config import WorldTrainConfig
from .data.batches import Batch, WorldBatches, check_frames
from .data.order import Share, evenly, split_windows
from .data.residency import delta_source, order_data, resolve_residency
from .engine.checkpoints import make_model, start_folder, with_size_of_cache
from .engine.devices import make_accelerator
from .engine.logs import Meter
from .engine.loop import Trainer, check_finite
from .engine.run_folder import Run, locked
from .losses import smooth_l1
from .models.deltaworld import DeltaWorld
from .selection.selector import Selector, Windows

logger = logging.getLogger(__name__)

EVALUATED = 64
"""Windows that a discriminative model predicts at once in an evaluation: bounds memory."""


def train_world(config: WorldTrainConfig) -> Path:
    """Train, or go on, or find it done; gives OUT, by then a model folder.

    Raises what Trainer.train does, CacheMismatch for an OUT that another run or another cache
    made.
    """
    info = read_cache_info(config.deltas, format=DELTAS)
    config = dataclasses.replace(
        config,
        model=with_size_of_cache(config.model, info.shape.hidden_size, cache=config.deltas),
    )
    model, started_from = make_model(
        DeltaWorld, config.model, seed=config.seed, start_from=start_folder(config)
    )
    accelerator = make_accelerator(config.device, config.precision)
    shards, shape = DeltaShards(config.deltas, verify="size"), info.shape
    window_bytes = shape.num_frames * (2 * shape.hidden_size + 4)
    config = resolve_residency(config, shards.num_windows * window_bytes, accelerator)
    run = Run(
        command="world",
        config=config,
        data={
            "deltas": info.identity,
            "start_from": started_from,
            **order_data(config, shards),
        },
        fingerprints={"deltas": info.fingerprint},
    )
    if run.is_finished():
        logger.info("%s: already trained for %d steps", config.out, config.steps)
        return run.folder
    share = Share(rank=accelerator.process_index, num_ranks=accelerator.num_processes)
    if share.rank == 0:  # one rank hashes the tars; the others would only read the same again
        shards = DeltaShards(config.deltas, verify="sha256")
    stage = WorldStage(model, shards, config, share, device=accelerator.device)
    with locked(run.folder, accelerator):
        Trainer(stage, run, accelerator).train()
    return run.folder


class WorldStage:
    """What the loop trains: see stage.Stage. T tokens a window, P = T - 1 positions, K samples."""

    unit = "windows"
    best_by = "validation_best_loss"

    def __init__(
        self,
        model: DeltaWorld,
        shards: DeltaShards,
        config: WorldTrainConfig,
        share: Share,
        *,
        device: torch.device,
    ) -> None:
        check_frames(shards.shape[0], least=2)
        self.model = model
        self._config = config
        self._shards = shards
        self._device = device
        self._selector = Selector(model, config, device=device)
        rows = delta_source(shards, residency=config.residency, device=device)
        split = split_windows(shards.keys, shards.clip_index, config.validation_fraction)
        self._batches = WorldBatches(
            rows, split.training, batch_size=config.batch_size, seed=config.seed, share=share
        )
        self._validation = evenly(split.validation, config.validation_windows)
        self._validation_rows = rows.read_to_keep(self._validation)
        check_finite(self._validation_rows[0], self._validation, clip_of=self.clip_of)
        _log_statistics(rows.read_to_keep(evenly(split.training, 1024))[0])

    @property
    def tokens_per_sample(self) -> int:
        return self._shards.shape[0]

    @property
    def steps_per_epoch(self) -> int:
        return self._batches.order.steps_per_epoch

    @property
    def can_evaluate(self) -> bool:
        return len(self._validation) > 0

    def read(self, step: int) -> Batch:
        return self._batches.read(step)

    def losses(
        self, forward: nn.Module, batch: Batch, samples: slice, *, step: int, meter: Meter
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        z = batch.tensors["z"][samples].float()
        timestamps = batch.tensors["timestamps"][samples]
        queries: Tensor | None = None
        extras: Mapping[str, Tensor] = {}
        if self.model.config.use_bom:
            names = [("noise", step, int(number)) for number in batch.samples[samples]]
            with meter.computing("selection"):
                selection, extras = self._selector.train(
                    Windows(z, timestamps, names), step=step, checks=not meter.is_counting
                )
            queries = selection.queries
        prediction = forward(z, timestamps, queries)
        return smooth_l1(prediction, z[:, 1:]).flatten(1).mean(1), extras

    def check(self, numbers: Mapping[str, float], *, step: int) -> None:
        self._selector.check(numbers, step=step)

    def evaluate(self) -> dict[str, float]:
        """The best of num_samples_eval candidates, the mean over them, and what predicting the
        mean delta token would lose; the same noise every time."""
        z, timestamps = (tensor.to(self._device) for tensor in self._validation_rows)
        z = z.float()
        constant = z[:, 1:].mean((0, 1)).expand_as(z[:, 1:])
        if self.model.config.use_bom:
            names = [("validation noise", int(window)) for window in self._validation]
            selection = self._selector.evaluate(Windows(z, timestamps, names))
            best, mean = selection.best_losses.mean(), selection.mean_losses.mean()
        else:
            parts = zip(torch.split(z, EVALUATED), torch.split(timestamps, EVALUATED), strict=True)
            predictions = torch.cat([self.model(part, times) for part, times in parts])
            best = mean = smooth_l1(predictions, z[:, 1:]).mean()
        return {
            "validation_best_loss": best.item(),
            "validation_mean_loss": mean.item(),
            "validation_constant_loss": smooth_l1(constant, z[:, 1:]).mean().item(),
        }

    def judge(self, values: Mapping[str, float], *, step: int) -> None:
        """A world model has no known way of being stuck."""

    def work_at(self, step: int) -> int:
        return self._selector.num_samples_at(step)

    def clip_of(self, window: int) -> str:
        return self._shards.keys[int(self._shards.clip_index[window])]

    def provenance(self) -> dict[str, Any]:
        return {
            "deltas": self._shards.info.identity,
            "deltas_fingerprint": self._shards.fingerprint,
        }


def _log_statistics(z: Tensor) -> None:
    values = z.float()
    logger.info(
        "delta tokens: mean %.3f, standard deviation %.3f, largest %.3f",
        values.mean().item(),
        values.std().item(),
        values.abs().max().item(),
    )
