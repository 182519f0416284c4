"""Forecasts of a batch of windows at one horizon: every row of the report as features.

Letters: B windows, T frames, N patch tokens of a frame, D channels, S samples, H steps of the
horizon, C context frames. Features are float32. Called by `forecast.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..train.losses import smooth_l1
from ..train.models.deltaworld import DeltaWorld
from .baselines import dinoworld_rows, regressor_null, roll_out_patches
from .clip import Clip, NoiseName, window_noise
from .config import ForecastConfig
from .loading import ForecastModels, WorldModel
from .rollout import best_sample, decode_rollout, mean_sample, sample_losses


@dataclass(frozen=True, kw_only=True)
class WindowBatch:
    """Windows of the cache on the device, and their delta tokens."""

    indices: tuple[int, ...]
    """The windows' numbers in the cache, B of them."""
    names: tuple[NoiseName, ...]
    """What each window's noise is drawn for."""
    x: Tensor
    """(B, T, N, D) true features."""
    times: Tensor
    """(B, T) float32 seconds from the window's first frame."""
    z: Tensor
    """(B, T, D) delta tokens, open loop; token 0 is black -> frame 0."""


@dataclass(frozen=True, kw_only=True)
class HorizonForecast:
    """What is scored at one horizon."""

    truth: Tensor
    """(B, H, N, D) true features of the target frames."""
    rows: dict[str, Tensor]
    """Row name -> (B, H, N, D)."""
    open_loop: Tensor
    """(B, H, N, D): the true pairs' delta tokens, decoded each from the last reconstruction."""
    samples: Tensor | None
    """(B, S, H, N, D) of the world model, None without one."""
    sample_losses: Tensor | None
    """(B, S): loss of each sample's last step."""


def feature_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """Smooth-L1 loss (beta 0.1) over the last two axes (N, D) of features of one shape."""
    return smooth_l1(prediction, truth).mean(dim=(-2, -1))


def encode_windows(
    models: ForecastModels,
    indices: Sequence[int],
    x: Tensor,
    times: Tensor,
    *,
    black: Tensor,
    grid: tuple[int, int],
    names: Sequence[NoiseName] | None = None,
) -> WindowBatch:
    """Delta tokens of windows x (B, T, N, D), open loop from the true features; `names`: what
    their noise is drawn for, by default their numbers."""
    z = models.tokenizer.encode_sequence(x, black, grid=grid).float()
    named = [(index,) for index in indices] if names is None else names
    return WindowBatch(indices=tuple(indices), names=tuple(named), x=x, times=times, z=z)


def forecast_horizon(
    config: ForecastConfig,
    models: ForecastModels,
    batch: WindowBatch,
    horizon: str,
    *,
    black: Tensor,
    grid: tuple[int, int],
) -> HorizonForecast:
    """Roll out, decode and reconstruct; the clip is the window's part that ends at the target."""
    steps = config.steps(horizon)
    start = config.context_start(horizon)
    first_target = start + config.num_context
    context = batch.x[:, start:first_target]
    truth = batch.x[:, first_target : config.num_frames]
    last = context[:, -1]
    z_context = batch.z[:, start:first_target]
    if start > 0:  # the clip's first token is black -> its own first frame
        first = models.tokenizer.encode(black.expand_as(last), context[:, 0], grid=grid)
        z_context = torch.cat([first[:, None].float(), z_context[:, 1:]], dim=1)
    clip = Clip(
        x_context=context,
        z_context=z_context,
        times=batch.times[:, start : config.num_frames],
        steps=steps,
        grid=grid,
    )
    z_true = batch.z[:, None, first_target : config.num_frames]
    open_loop = decode_rollout(models.tokenizer, z_true, last, grid=grid)[:, 0].float()
    rows = {
        "copy_last": last[:, None].expand_as(truth),
        "reconstruction": models.tokenizer.reconstruct(truth, last, grid=grid).float(),
        "reconstruction_open_loop": open_loop,
        "present": truth,
    }
    samples, losses = None, None
    if models.discriminative is not None:
        rows["discriminative"] = roll_out(models, models.discriminative, clip, noise=None)[:, 0]
    if models.world is not None:
        noise = window_noise(models.world, config, horizon, batch.names).to(last.device)
        noise = noise * config.noise_scale
        samples = roll_out(models, models.world, clip, noise=noise)
        losses = sample_losses(samples, truth)
        rows["best"], _ = best_sample(samples, truth)
        rows["mean"] = mean_sample(samples)
        if config.regressor_null:
            rows |= regressor_null(
                config, models, clip, truth, horizon=horizon, noise=noise, names=batch.names
            )
    rows |= dinoworld_rows(config, models, clip, truth, horizon=horizon, names=batch.names)
    return HorizonForecast(
        truth=truth,
        rows=rows,
        open_loop=open_loop,
        samples=samples,
        sample_losses=losses,
    )


def roll_out(
    models: ForecastModels, world: WorldModel, clip: Clip, *, noise: Tensor | None
) -> Tensor:
    """Features (B, S, H, N, D) that a world model forecasts; noise (H, B, S, 1, Dp) or None."""
    num_samples = 1 if noise is None else noise.shape[2]
    if isinstance(world, DeltaWorld):
        z_hat = world.rollout(
            clip.z_context, clip.times, horizon=clip.steps, num_samples=num_samples, noise=noise
        )
        last = clip.x_context[:, -1]
        return decode_rollout(models.tokenizer, z_hat, last, grid=clip.grid).float()
    return roll_out_patches(world, clip, noise=noise)
