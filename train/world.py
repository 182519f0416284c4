"""deltatok-train world: train_world(config), from a delta-token cache.

A step: windows of delta tokens -> K noise queries a position, without gradient -> the one whose
prediction is nearest the true token -> that one again with gradient (best-of-many, section 4).
With model.use_bom false: one learned query, no selection.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..shards.deltas.reader import DeltaShards
from .config import WorldTrainConfig
from .data.batches import Batch, WorldBatches, check_frames
from .data.order import RankSlice, split_windows, spread
from .data.residency import window_source
from .engine.checkpoints import with_size_of_cache
from .engine.logs import Meter
from .engine.loop import train_objective
from .engine.objective import check_validation_finite
from .losses import smooth_l1
from .models.deltaworld import DeltaWorldNetwork
from .selection.selector import Selector, WorldObjective

logger = logging.getLogger(__name__)

EVALUATED = 64
"""Windows that a discriminative model predicts at once in an evaluation: bounds memory."""


def train_world(config: WorldTrainConfig) -> Path:
    """train_objective for DeltaWorld; gives OUT, by then a model folder."""
    shards = DeltaShards(config.deltas, verify="size")
    config = with_size_of_cache(config, shards.shape[1], cache=config.deltas)

    def make(
        model: DeltaWorldNetwork, config: WorldTrainConfig, ranks: RankSlice, device: torch.device
    ) -> DeltaWorldObjective:
        # One rank hashes the tars; the others would only read the same again.
        verified = DeltaShards(config.deltas, verify="sha256") if ranks.rank == 0 else shards
        return DeltaWorldObjective(model, verified, config, ranks, device=device)

    return train_objective("world", config, shards, (DeltaWorldNetwork, config.model), make)


class DeltaWorldObjective(WorldObjective):
    """T tokens a window, P = T - 1 positions, K samples."""

    model: DeltaWorldNetwork
    _shards: DeltaShards

    def __init__(
        self,
        model: DeltaWorldNetwork,
        shards: DeltaShards,
        config: WorldTrainConfig,
        ranks: RankSlice,
        *,
        device: torch.device,
    ) -> None:
        check_frames(shards.shape[0], least=2)
        super().__init__(model, shards)
        self._device = device
        self.selector = Selector(model, config, device=device)
        rows = window_source(shards, residency=config.residency, device=device)
        split = split_windows(shards.keys, shards.clip_index, config.validation_fraction)
        self._batches = WorldBatches(
            rows, split.training, batch_size=config.batch_size, seed=config.seed, ranks=ranks
        )
        self._validation = spread(split.validation, config.validation_windows)
        self._validation_rows = rows.read_to_keep(self._validation)
        check_validation_finite(self._validation_rows[0], self._validation, clip_of=self.clip_of)
        _log_statistics(rows.read_to_keep(spread(split.training, 1024))[0])

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
        queries, extras = self.queries(batch, samples, z, timestamps, step=step, meter=meter)
        prediction = forward(z, timestamps, queries)
        return smooth_l1(prediction, z[:, 1:]).flatten(1).mean(1), extras

    def evaluate(self) -> dict[str, float]:
        """The best of num_samples_eval candidates, the mean over them, and what predicting the
        mean delta token would lose; the same noise every time."""
        z, timestamps = (tensor.to(self._device) for tensor in self._validation_rows)
        z = z.float()
        constant = z[:, 1:].mean((0, 1)).expand_as(z[:, 1:])
        if self.model.config.use_bom:
            best, mean = self.validation_losses(z, timestamps, self._validation)
        else:
            parts = zip(torch.split(z, EVALUATED), torch.split(timestamps, EVALUATED), strict=True)
            predictions = torch.cat([self.model(part, times) for part, times in parts])
            best = mean = smooth_l1(predictions, z[:, 1:]).mean()
        return {
            "validation_best_loss": best.item(),
            "validation_mean_loss": mean.item(),
            "validation_constant_loss": smooth_l1(constant, z[:, 1:]).mean().item(),
        }


def _log_statistics(z: Tensor) -> None:
    values = z.float()
    logger.info(
        "delta tokens: mean %.3f, standard deviation %.3f, largest %.3f",
        values.mean().item(),
        values.std().item(),
        values.abs().max().item(),
    )
