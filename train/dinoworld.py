"""deltatok-train dinoworld: train_dinoworld(config), the baseline, from a patch-token cache.

A step: windows of patch tokens -> the next frame's patch tokens from one learned query a patch
(discriminative), or from the best of K noise queries a frame (model.use_bom). The same predictor,
loss and draws as world.py, without the tokenizer between.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..shards.patches.reader import PatchShards
from .config import DINOWorldTrainConfig
from .data.batches import Batch, check_frames
from .data.order import Indices, RankSlice, split_windows, spread
from .data.residency import Read, window_source
from .engine.checkpoints import with_size_of_cache
from .engine.logs import Meter
from .engine.loop import train_objective
from .engine.objective import check_validation_finite
from .losses import smooth_l1
from .models.dinoworld import DINOWorld
from .selection.selector import Selector, WorldObjective


def train_dinoworld(config: DINOWorldTrainConfig) -> Path:
    """train_objective for DINO-world; gives OUT, by then a model folder."""
    shards = PatchShards(config.patches)
    config = with_size_of_cache(config, shards.shape[2], cache=config.patches)
    return train_objective(
        "dinoworld",
        config,
        shards,
        (DINOWorld, config.model),
        lambda model, config, ranks, device: DINOWorldObjective(
            model, shards, config, ranks, device=device
        ),
    )


class DINOWorldObjective(WorldObjective):
    """T frames of N patches a window, P = T - 1 positions, K samples."""

    model: DINOWorld
    _shards: PatchShards

    def __init__(
        self,
        model: DINOWorld,
        shards: PatchShards,
        config: DINOWorldTrainConfig,
        ranks: RankSlice,
        *,
        device: torch.device,
    ) -> None:
        check_frames(shards.shape[0], least=2)
        super().__init__(model, shards)
        self._batch_size = config.batch_size
        self._device = device
        self.selector = Selector(model, config, device=device, grid=shards.grid)
        self._source = window_source(shards, residency=config.residency, device=device)
        self._slice = ranks.of(config.batch_size)
        split = split_windows(shards.keys, shards.clip_index, config.validation_fraction)
        self._order = self._source.order(split.training, config.batch_size, config.seed)
        chosen = spread(split.validation, config.validation_windows)
        # Read once: while training runs, the prefetch thread is the only reader.
        self._validation = None
        if len(chosen):
            self._validation = self._batch(self._source.read_to_keep, chosen, chosen)
            check_validation_finite(self._validation.tensors["x"], chosen, clip_of=self.clip_of)

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
        numbers = np.arange(self._batch_size)[self._slice]
        return self._batch(self._source.read, self._order.at(step)[self._slice], numbers)

    def losses(
        self, forward: nn.Module, batch: Batch, samples: slice, *, step: int, meter: Meter
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = batch.tensors["x"][samples].float()
        timestamps = batch.tensors["timestamps"][samples]
        queries, extras = self.queries(batch, samples, x, timestamps, step=step, meter=meter)
        prediction = forward(x, timestamps, queries, grid=self._shards.grid)
        return smooth_l1(prediction, x[:, 1:]).flatten(1).mean(1), extras

    def evaluate(self) -> dict[str, float]:
        """As world.py: the best of num_samples_eval candidates and the mean over them (a frame's
        losses are averaged over its patches); and, instead of a constant, copying the last frame.
        """
        if self._validation is None:
            return {}
        sums = torch.zeros(3, dtype=torch.float64)
        windows = self._validation.windows
        for row in range(len(windows)):  # one at a time: frames are large
            x = self._validation.tensors["x"][row : row + 1].to(self._device).float()
            times = self._validation.tensors["timestamps"][row : row + 1].to(self._device)
            if self.model.config.use_bom:
                best, mean = self.validation_losses(x, times, windows[row : row + 1])
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
