"""A stage's best-of-many: its noise, its precision, how much at a time. Used by world.py and
dinoworld.py.

Letters: B batch, P target positions, S samples, Dp channels of a query.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .best_of_many import Selection, default_chunks, select, select_patches
from .config import WorldTrainConfig
from .config_dinoworld import DINOWorldTrainConfig
from .devices import precision_name
from .draws import seed_for
from .models.deltaworld import DeltaWorld
from .models.dinoworld import DINOWorld
from .noise import CounterNoise

Names = Sequence[tuple[int | str, ...]]
"""What each window's noise is drawn for."""


class Selector:
    """selector(tokens, timestamps, names, num_samples=S): the winners of some windows. A function
    of the seed and the windows' names: neither ranks nor portions change the noise."""

    def __init__(
        self,
        model: DeltaWorld | DINOWorld,
        config: WorldTrainConfig | DINOWorldTrainConfig,
        *,
        device: torch.device,
        grid: tuple[int, int] | None = None,
    ) -> None:
        """grid: the patches of a frame, for DINO-world."""
        self._model, self._config, self._device, self._grid = model, config, device, grid
        name = precision_name(config.precision, device)
        self._dtype = torch.bfloat16 if name == "bfloat16" else torch.float32

    def __call__(
        self, tokens: Tensor, timestamps: Tensor, names: Names, *, num_samples: int
    ) -> Selection:
        """tokens (B, T, D), or (B, T, N, D) for DINO-world; timestamps (B, T)."""
        model, dtype = self._model, self._dtype
        noise = self.noise(names, positions=tokens.shape[1] - 1)
        chunks = default_chunks(
            model,
            tokens,
            num_samples=num_samples,
            dtype=dtype,
            memory_mb=self._config.selection_memory_mb,
        )
        if isinstance(model, DeltaWorld):
            return select(
                model,
                tokens,
                timestamps,
                noise,
                num_samples=num_samples,
                dtype=dtype,
                chunks=chunks,
            )
        if self._grid is None:
            raise AssertionError("DINO-world's stage gives a grid")
        return select_patches(
            model,
            tokens,
            timestamps,
            noise,
            grid=self._grid,
            num_samples=num_samples,
            dtype=dtype,
            chunks=chunks,
        )

    def noise(self, names: Names, *, positions: int) -> CounterNoise:
        """The candidates of the windows with these names."""
        keys = [seed_for("candidates", self._config.seed, *name) for name in names]
        return CounterNoise(
            keys=torch.tensor(keys, dtype=torch.int64).to(self._device),
            positions=positions,
            channels=self._model.config.predictor_hidden_size,
            std=self._model.config.initializer_range,
        )
