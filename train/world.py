"""deltatok-train world: train_world(config), from a delta-token cache.

A step: windows of delta tokens -> K noise queries a position, without gradient -> the one whose
prediction is nearest the true token, or the nearest num_winners -> those again with gradient
(best-of-many, section 4).
With model.use_bom false: one learned query, no selection.
"""

import logging
from pathlib import Path

import torch

from ..shards.deltas.reader import DeltaShards
from .config import WorldTrainConfig
from .data.order import RankSlice, spread
from .engine.checkpoints import with_size_of_cache
from .engine.loop import train_objective
from .losses import smooth_l1
from .models.deltaworld import DeltaWorldNetwork
from .models.selfattention import SelfAttentionWorld
from .selection.selector import WorldObjective

logger = logging.getLogger(__name__)

PREDICTORS = {"cross-attention": DeltaWorldNetwork, "self-attention": SelfAttentionWorld}
EVALUATED = 64
"""Windows that a discriminative model predicts at once in an evaluation: bounds memory."""


def train_world(config: WorldTrainConfig) -> Path:
    """train_objective for DeltaWorld; gives OUT, by then a model folder."""
    shards = DeltaShards(config.deltas, verify="size")
    config = with_size_of_cache(config, shards.shape[1], cache=config.deltas)
    network = PREDICTORS[config.predictor]
    return train_objective("world", config, shards, (network, config.model), DeltaWorldObjective)


class DeltaWorldObjective(WorldObjective):
    """T tokens a window, P = T - 1 positions, K samples."""

    model: DeltaWorldNetwork

    def __init__(
        self,
        model: DeltaWorldNetwork,
        shards: DeltaShards,
        config: WorldTrainConfig,
        ranks: RankSlice,
        device: torch.device,
    ) -> None:
        if ranks.rank == 0:  # one rank hashes the tars; the others would only read the same again
            shards = DeltaShards(config.deltas, verify="sha256")
        super().__init__(model, shards, config, ranks, device)
        z = self._source.read_to_keep(spread(self._training, 1024))[0].float()
        logger.info(
            "delta tokens: mean %.3f, standard deviation %.3f, largest %.3f",
            *(value.item() for value in (z.mean(), z.std(), z.abs().max())),
        )

    def evaluate(self) -> dict[str, float]:
        """The best of num_samples_eval candidates, the mean over them, and what predicting the
        mean delta token would lose; the same noise every time."""
        held_out = self._held_out.to(self._device).tensors
        z, timestamps = held_out["tokens"].float(), held_out["timestamps"]
        constant = z[:, 1:].mean((0, 1)).expand_as(z[:, 1:])
        if self.model.config.use_bom:
            best, mean = self.validation_losses(z, timestamps, self.validation)
        else:
            parts = zip(torch.split(z, EVALUATED), torch.split(timestamps, EVALUATED), strict=True)
            predictions = torch.cat([self.model(part, times) for part, times in parts])
            best = mean = smooth_l1(predictions, z[:, 1:]).mean()
        return {
            "validation_best_loss": best.item(),
            "validation_mean_loss": mean.item(),
            "validation_constant_loss": smooth_l1(constant, z[:, 1:]).mean().item(),
        }
