"""deltatok-train dinoworld: train_dinoworld(config), the baseline, from a patch-token cache.

A step: windows of patch tokens -> the next frame's patch tokens from one learned query a patch
(discriminative), or from the best of K noise queries a frame (model.use_bom). The same predictor,
loss and draws as world.py, without the tokenizer between.
"""

from pathlib import Path

import torch

from ..shards.patches.reader import PatchShards
from .config import DINOWorldTrainConfig
from .engine.checkpoints import with_size_of_cache
from .engine.loop import train_objective
from .losses import smooth_l1
from .models.dinoworld import DINOWorld
from .selection.selector import WorldObjective


def train_dinoworld(config: DINOWorldTrainConfig) -> Path:
    """train_objective for DINO-world; gives OUT, by then a model folder."""
    shards = PatchShards(config.patches)
    config = with_size_of_cache(config, shards.shape[2], cache=config.patches)
    return train_objective(
        "dinoworld", config, shards, (DINOWorld, config.model), DINOWorldObjective
    )


class DINOWorldObjective(WorldObjective):
    """T frames of N patches a window, P = T - 1 positions, K samples."""

    model: DINOWorld

    def evaluate(self) -> dict[str, float]:
        """As world.py: the best of num_samples_eval candidates and the mean over them (a frame's
        losses are averaged over its patches); and, instead of a constant, copying the last frame.
        """
        sums = torch.zeros(3, dtype=torch.float64)
        windows, tensors = self.validation, self._held_out.tensors
        for row in range(len(windows)):  # one at a time: frames are large
            x = tensors["tokens"][row : row + 1].to(self._device).float()
            times = tensors["timestamps"][row : row + 1].to(self._device)
            if self.model.config.use_bom:
                best, mean = self.validation_losses(x, times, windows[row : row + 1])
            else:
                prediction = self.model(x, times, **self._grid)
                best = mean = smooth_l1(prediction, x[:, 1:]).mean()
            copied = smooth_l1(x[:, :-1], x[:, 1:]).mean()
            sums += torch.stack([best, mean, copied]).double().cpu()
        best, mean, copied_last = (sums / len(windows)).tolist()
        return {
            "validation_best_loss": best,
            "validation_mean_loss": mean,
            "validation_copy_last_loss": copied_last,
        }
