"""DINOWorld, the baseline: past frames' patch tokens -> the next frame's patch tokens.

Letters: B batch, T frames, P = T - 1 target frames, S samples, N patches of a frame (row-major,
N = h * w), C context frames, H horizon (steps), D channels of a token, Dp channels of a query.
Times are seconds, float32; x and y run over [-1, 1], both ends included.
The paper's reimplementation of DINO-world, and its best-of-many form.
"""

import torch
from torch import Tensor

from .configs import DINOWorldConfig
from .world import KeysValues, World, causal


class DINOWorld(World):
    """One query vector a target frame (and sample), shared by all its patches; its keys are the
    patch tokens of the strictly earlier frames."""

    config_class = DINOWorldConfig
    config: DINOWorldConfig

    def forward(
        self,
        x: Tensor,
        timestamps: Tensor,
        queries: Tensor | None = None,
        *,
        grid: tuple[int, int],
    ) -> Tensor:
        """Teacher forcing: predictions (B, T-1, N, D) of x[:, 1:] from the true frames before each.

        x (B, T, N, D), timestamps (B, T), queries (B, T-1, Dp): the selected noise; None: the
        learned query of a discriminative model. Of queries (B, T-1, S, Dp): predictions
        (B, T-1, S, N, D).
        """
        if queries is None:
            queries = self.learned_queries(x.shape[0], x.shape[1] - 1)
        several = queries if queries.ndim == 4 else queries[:, :, None]
        memory = self.memory(x, timestamps, grid=grid)
        predictions = self.candidates(memory, timestamps, several, grid=grid)
        return predictions if queries.ndim == 4 else predictions[:, :, 0]

    def memory(self, x: Tensor, timestamps: Tensor, *, grid: tuple[int, int]) -> KeysValues:
        """Keys and values of x (B, T, N, D) but its last frame: what teacher forcing may see."""
        positions = grid_positions(timestamps[:, :-1], grid)
        return self.predictor.keys_values(x[:, :-1].flatten(1, 2), positions)

    def candidates(
        self, memory: KeysValues, timestamps: Tensor, queries: Tensor, *, grid: tuple[int, int]
    ) -> Tensor:
        """Teacher-forced predictions (B, P, S, N, D) for queries (B, P, S, Dp); memory: there."""
        batch, frames, samples, _ = queries.shape
        patches = grid[0] * grid[1]
        times = timestamps[:, 1:, None].expand(-1, -1, samples).flatten(1)
        out: Tensor = self.predictor(
            queries.flatten(1, 2).repeat_interleave(patches, 1),
            grid_positions(times, grid),
            memory,
            visible=causal(
                frames, repeats=samples * patches, key_repeats=patches, device=queries.device
            ),
        )
        return out.reshape(batch, frames, samples, patches, -1)

    def candidates_at(
        self,
        memory: KeysValues,
        timestamps: Tensor,
        queries: Tensor,
        *,
        position: int,
        grid: tuple[int, int],
    ) -> Tensor:
        """Predictions (B, S, N, D) of one target position for queries (B, S, Dp): `candidates`
        without a mask, from the frames before it only."""
        patches = grid[0] * grid[1]
        seen = (position + 1) * patches
        times = timestamps[:, position + 1, None].expand(-1, queries.shape[1])
        out: Tensor = self.predictor(
            queries.repeat_interleave(patches, 1),
            grid_positions(times, grid),
            [(k[:, :, :seen], v[:, :, :seen]) for k, v in memory],
        )
        return out.reshape(*queries.shape[:2], patches, -1)

    def rollout(
        self,
        x_context: Tensor,
        timestamps: Tensor,
        *,
        grid: tuple[int, int],
        horizon: int,
        num_samples: int,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Forecasts (B, S, H, N, D) from x_context (B, C, N, D); timestamps (B, C + H) of context
        and targets. noise (H, B, S, 1, Dp), generator: see World._rollout."""
        positions = grid_positions(timestamps, grid).reshape(
            *timestamps.shape, grid[0] * grid[1], 3
        )
        return self._rollout(
            x_context.flatten(1, 2),
            positions,
            horizon=horizon,
            num_samples=num_samples,
            noise=noise,
            generator=generator,
        )


def grid_positions(times: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, frames * N, 3): time, x and y of every patch of frames at times (B, frames)."""
    height, width = grid
    y = torch.linspace(-1, 1, height, dtype=times.dtype, device=times.device)
    x = torch.linspace(-1, 1, width, dtype=times.dtype, device=times.device)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    shape = (*times.shape, height * width)
    axes = [times[:, :, None], columns.flatten(), rows.flatten()]
    return torch.stack([axis.expand(shape) for axis in axes], dim=-1).flatten(1, 2)
