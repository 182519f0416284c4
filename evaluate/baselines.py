"""Rows to hold the world model against: DINO-world, the tokenizer's open loop, the regressor null.

Called by `predict.py`. Letters as there: B windows, S samples, H steps, N patch tokens, D channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..train.draws import generator
from ..train.models.deltaworld import DeltaWorld
from ..train.models.dinoworld import DINOWorld
from .clip import Clip, NoiseName, window_noise
from .config import ForecastConfig
from .loading import ForecastModels
from .rollout import best_sample, decode_rollout, mean_sample

DINO_SAMPLES_AT_ONCE = 4
"""Samples of DINO-world rolled out at a time: keys and values of 6 frames at 512 px take 0.45 GB a
sample and window in float32."""


def dinoworld_rows(
    config: ForecastConfig,
    models: ForecastModels,
    clip: Clip,
    truth: Tensor,
    *,
    horizon: str,
    names: Sequence[NoiseName],
) -> dict[str, Tensor]:
    """Row name -> (B, H, N, D): `dinoworld` of a model with a learned query, `dinoworld_best` and
    `dinoworld_mean` of one with noise queries. {} without such models."""
    rows: dict[str, Tensor] = {}
    for world in models.dinoworlds:
        if world.config.use_bom:
            noise = window_noise(world, config, horizon, names).to(truth.device)
            samples = roll_out_patches(world, clip, noise=noise)
            rows["dinoworld_best"], _ = best_sample(samples, truth)
            rows["dinoworld_mean"] = mean_sample(samples)
        else:
            rows["dinoworld"] = roll_out_patches(world, clip, noise=None)[:, 0]
    return rows


def roll_out_patches(world: DINOWorld, clip: Clip, *, noise: Tensor | None) -> Tensor:
    """Features (B, S, H, N, D) that a DINO-world forecasts; S = 1 without noise."""
    parts = [None] if noise is None else torch.split(noise, DINO_SAMPLES_AT_ONCE, dim=2)
    return torch.cat(
        [
            world.rollout(
                clip.x_context,
                clip.times,
                grid=clip.grid,
                horizon=clip.steps,
                num_samples=1 if part is None else part.shape[2],
                noise=part,
            ).float()
            for part in parts
        ],
        dim=1,
    )


def regressor_null(
    config: ForecastConfig,
    models: ForecastModels,
    clip: Clip,
    truth: Tensor,
    *,
    horizon: str,
    noise: Tensor,
    names: Sequence[NoiseName],
) -> dict[str, Tensor]:
    """The row `regressor_null`: what best-of-S gives a model that has spread but no modes.

    S draws from a Gaussian around the delta tokens that the discriminative model forecasts, with
    the covariance of the S samples (noise: theirs, (H, B, S, 1, Dp)) over steps and channels
    together; decoded as samples are, then the best of them. A best-of-many model that is no better
    than this has only learned how far off a point forecast is. {} unless the world model and the
    discriminative one are both DeltaWorlds.
    """
    world, regressor = models.world, models.discriminative
    if not (isinstance(world, DeltaWorld) and isinstance(regressor, DeltaWorld)):
        return {}
    z = world.rollout(
        clip.z_context, clip.times, horizon=clip.steps, num_samples=noise.shape[2], noise=noise
    ).float()
    centre = regressor.rollout(clip.z_context, clip.times, horizon=clip.steps, num_samples=1)
    weights = torch.stack(
        [
            torch.randn(
                z.shape[1],
                z.shape[1],
                generator=generator("regressor null", config.seed, horizon, *name),
            )
            for name in names
        ]
    )
    draws = centre.float() + gaussian_like(z, weights.to(z.device))
    features = decode_rollout(models.tokenizer, draws, clip.x_context[:, -1], grid=clip.grid)
    best, _ = best_sample(features.float(), truth)
    return {"regressor_null": best}


def gaussian_like(samples: Tensor, weights: Tensor) -> Tensor:
    """Draws (B, S', H, D) of mean 0 with the covariance of samples (B, S, H, D) over H and D
    together, from standard normal weights (B, S', S)."""
    count = samples.shape[1]
    deviations = (samples - samples.mean(dim=1, keepdim=True)).flatten(2)
    with torch.autocast(samples.device.type, enabled=False):
        drawn: Tensor = weights @ deviations / max(count - 1, 1) ** 0.5
    return drawn.reshape(-1, weights.shape[1], *samples.shape[2:])
