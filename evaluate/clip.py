"""What a rollout sees, and what its noise is drawn for. Used by `predict.py` and `baselines.py`.

Letters: B windows, C context frames, H steps, S samples, N patch tokens, D channels, Dp channels
of a query.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..train.draws import generator
from .config import ForecastConfig
from .loading import WorldModel

NoiseName = tuple[int | str, ...]
"""What a window's noise is drawn for, beside seed and horizon."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """C context frames, and the times of all C + H frames."""

    x_context: Tensor
    """(B, C, N, D)"""
    z_context: Tensor
    """(B, C, D)"""
    times: Tensor
    """(B, C + H)"""
    steps: int
    grid: tuple[int, int]


def window_noise(
    world: WorldModel, config: ForecastConfig, horizon: str, names: Sequence[NoiseName]
) -> Tensor:
    """Noise queries (H, B, S, 1, Dp) on the CPU, a function of (seed, horizon, name) for each
    window, so that neither batch size nor device changes them."""
    steps = config.steps(horizon)
    drawn = [
        world.draw_noise(
            steps,
            config.num_samples,
            1,
            generator=generator("forecast", config.seed, horizon, *name),
        )
        for name in names
    ]
    return torch.stack(drawn, dim=1)
