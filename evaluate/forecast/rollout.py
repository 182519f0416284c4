"""Forecasts of a batch of windows at one horizon: every row of the report as features.

Beside the world model's samples (best, mean) stand the rows to hold it against: copying the last
frame, DINO-world, the tokenizer's reconstructions, the regressor null.

Letters: B windows, T frames, N patch tokens of a frame, D channels, Dp channels of a query,
S samples, H steps of the horizon, C context frames. Features are float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...train.data.order import generator
from ...train.losses import smooth_l1
from ...train.models.deltatok import DeltaTok
from ...train.models.deltaworld import DeltaWorldNetwork
from ...train.models.dinoworld import DINOWorld
from .config import ForecastConfig
from .models import ForecastModels, WorldModel

SAMPLED_ROWS = ("best", "mean", "regressor_null", "dinoworld_best", "dinoworld_mean")
"""Rows that another seed changes."""
NoiseName = tuple[int | str, ...]
"""What a window's noise is drawn for, beside seed and horizon."""


@dataclass(frozen=True, kw_only=True)
class RolloutContext:
    """C context frames, the true H frames after them, and the times of all."""

    horizon: str
    names: Sequence[NoiseName]
    """B of them."""
    x_context: Tensor
    """(B, C, N, D)"""
    z_context: Tensor
    """(B, C, D)"""
    truth: Tensor
    """(B, H, N, D)"""
    times: Tensor
    """(B, C + H)"""
    grid: tuple[int, int]

    @property
    def steps(self) -> int:
        """H."""
        return self.truth.shape[1]


def window_noise(world: WorldModel, config: ForecastConfig, clip: RolloutContext) -> Tensor:
    """Noise queries (H, B, S, 1, Dp), drawn on the CPU as a function of (seed, horizon, name) for
    each window, so that neither batch size nor device changes them."""
    drawn = [
        world.draw_noise(
            clip.steps,
            config.num_samples,
            1,
            generator=generator("forecast", config.seed, clip.horizon, *name),
        )
        for name in clip.names
    ]
    return torch.stack(drawn, dim=1).to(clip.truth.device)


@torch.no_grad()
def decode_rollout(
    tokenizer: DeltaTok, z_hat: Tensor, x_last: Tensor, *, grid: tuple[int, int]
) -> Tensor:
    """Patch tokens (B, S, H, N, D) of predicted delta tokens z_hat (B, S, H, D).

    Every sample decodes each step from its own previous features; x_last (B, N, D), the features
    of the last context frame, precedes the first.
    """
    batch, samples, horizon, size = z_hat.shape
    previous = x_last.repeat_interleave(samples, 0)
    steps = []
    for z in z_hat.reshape(batch * samples, horizon, size).unbind(1):
        previous = tokenizer.decode(z, previous, grid=grid)
        steps.append(previous)
    return torch.stack(steps, dim=1).reshape(batch, samples, horizon, *x_last.shape[1:])


def sample_losses(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean smooth-L1 float32 (B, S) of every sample's last step to the last true frame.

    predictions (B, S, H, N, D), targets (B, H, N, D).
    """
    last = predictions[:, :, -1]
    return smooth_l1(last, targets[:, None, -1].expand_as(last)).flatten(2).mean(2)


def best_sample(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The "best" of each crop: features (B, H, N, D) and index int64 (B,) of the sample whose last
    step has the lowest loss; that sample counts at every step, the first of equal ones."""
    index = sample_losses(predictions, targets).argmin(dim=1)
    return predictions[torch.arange(len(index), device=index.device), index], index


def mean_sample(predictions: Tensor) -> Tensor:
    """The "mean": features (B, H, N, D) averaged over samples, before any head."""
    return predictions.mean(dim=1)


def step_losses(prediction: Tensor, targets: Tensor) -> Tensor:
    """Mean smooth-L1 float32 (H,) of each step over all crops; both (B, H, N, D)."""
    return smooth_l1(prediction, targets).mean(dim=(0, 2, 3))


DINO_SAMPLES_AT_ONCE = 4
"""Samples of DINO-world rolled out at a time: keys and values of 6 frames at 512 px take 0.45 GB a
sample and window in float32."""


def dinoworld_rows(
    config: ForecastConfig, models: ForecastModels, clip: RolloutContext
) -> dict[str, Tensor]:
    """Row name -> (B, H, N, D): `dinoworld` of a model with a learned query, `dinoworld_best` and
    `dinoworld_mean` of one with noise queries. {} without such models."""
    rows: dict[str, Tensor] = {}
    for world in models.dinoworlds:
        if world.config.use_bom:
            samples = roll_out_patches(world, clip, noise=window_noise(world, config, clip))
            rows["dinoworld_best"], _ = best_sample(samples, clip.truth)
            rows["dinoworld_mean"] = mean_sample(samples)
        else:
            rows["dinoworld"] = roll_out_patches(world, clip, noise=None)[:, 0]
    return rows


def roll_out_patches(world: DINOWorld, clip: RolloutContext, *, noise: Tensor | None) -> Tensor:
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
    config: ForecastConfig, models: ForecastModels, clip: RolloutContext, *, noise: Tensor
) -> dict[str, Tensor]:
    """The row `regressor_null`: what best-of-S gives a model that has spread but no modes.

    S draws from a Gaussian around the delta tokens that the discriminative model forecasts, with
    the covariance of the S samples (noise: theirs, (H, B, S, 1, Dp)) over steps and channels
    together; decoded as samples are, then the best of them. A best-of-many model that is no better
    than this has only learned how far off a point forecast is. {} unless the world model and the
    discriminative one are both DeltaWorlds.
    """
    world, regressor = models.world, models.discriminative
    if not (isinstance(world, DeltaWorldNetwork) and isinstance(regressor, DeltaWorldNetwork)):
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
                generator=generator("regressor null", config.seed, clip.horizon, *name),
            )
            for name in clip.names
        ]
    )
    draws = centre.float() + gaussian_like(z, weights.to(z.device))
    features = decode_rollout(models.tokenizer, draws, clip.x_context[:, -1], grid=clip.grid)
    best, _ = best_sample(features.float(), clip.truth)
    return {"regressor_null": best}


def gaussian_like(samples: Tensor, weights: Tensor) -> Tensor:
    """Draws (B, S', H, D) of mean 0 with the covariance of samples (B, S, H, D) over H and D
    together, from standard normal weights (B, S', S)."""
    count = samples.shape[1]
    deviations = (samples - samples.mean(dim=1, keepdim=True)).flatten(2)
    with torch.autocast(samples.device.type, enabled=False):
        drawn: Tensor = weights @ deviations / max(count - 1, 1) ** 0.5
    return drawn.reshape(-1, weights.shape[1], *samples.shape[2:])


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
    samples: Tensor | None
    """(B, S, H, N, D) of the world model, None without one."""


def feature_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """Smooth-L1 loss (beta 0.1) over the last two axes (N, D) of features of one shape."""
    return smooth_l1(prediction, truth).mean(dim=(-2, -1))


def encode_windows(
    models: ForecastModels,
    indices: Sequence[int],
    x: Tensor,
    times: Tensor,
    *,
    names: Sequence[NoiseName],
) -> WindowBatch:
    """Delta tokens of windows x (B, T, N, D), open loop from the true features; `names`: what
    their noise is drawn for."""
    z = models.tokenizer.encode_sequence(x, models.black, grid=models.grid).float()
    return WindowBatch(indices=tuple(indices), names=tuple(names), x=x, times=times, z=z)


def forecast_horizon(
    config: ForecastConfig, models: ForecastModels, batch: WindowBatch, horizon: str
) -> HorizonForecast:
    """Roll out, decode and reconstruct; the clip is the window's part that ends at the target."""
    tokenizer, grid = models.tokenizer, models.grid
    start = config.context_start(horizon)
    first_target = start + config.num_context
    context = batch.x[:, start:first_target]
    truth = batch.x[:, first_target : config.num_frames]
    last = context[:, -1]
    z_context = batch.z[:, start:first_target]
    if start > 0:  # the clip's first token is black -> its own first frame
        first = tokenizer.encode(models.black.expand_as(last), context[:, 0], grid=grid)
        z_context = torch.cat([first[:, None].float(), z_context[:, 1:]], dim=1)
    clip = RolloutContext(
        horizon=horizon,
        names=batch.names,
        x_context=context,
        z_context=z_context,
        truth=truth,
        times=batch.times[:, start : config.num_frames],
        grid=grid,
    )
    z_true = batch.z[:, None, first_target : config.num_frames]
    rows = {
        "copy_last": last[:, None].expand_as(truth),
        "reconstruction": tokenizer.reconstruct(truth, last, grid=grid).float(),
        # The true pairs' delta tokens, decoded each from the last reconstruction.
        "reconstruction_open_loop": decode_rollout(tokenizer, z_true, last, grid=grid)[
            :, 0
        ].float(),
        "present": truth,
    }
    samples = None
    if models.discriminative is not None:
        rows["discriminative"] = roll_out(models, models.discriminative, clip, noise=None)[:, 0]
    if models.world is not None:
        noise = window_noise(models.world, config, clip) * config.noise_scale
        samples = roll_out(models, models.world, clip, noise=noise)
        rows["best"], _ = best_sample(samples, truth)
        rows["mean"] = mean_sample(samples)
        if config.regressor_null:
            rows |= regressor_null(config, models, clip, noise=noise)
    rows |= dinoworld_rows(config, models, clip)
    return HorizonForecast(truth=truth, rows=rows, samples=samples)


def roll_out(
    models: ForecastModels, world: WorldModel, clip: RolloutContext, *, noise: Tensor | None
) -> Tensor:
    """Features (B, S, H, N, D) that a world model forecasts; noise (H, B, S, 1, Dp) or None."""
    num_samples = 1 if noise is None else noise.shape[2]
    if isinstance(world, DeltaWorldNetwork):
        z_hat = world.rollout(
            clip.z_context, clip.times, horizon=clip.steps, num_samples=num_samples, noise=noise
        )
        last = clip.x_context[:, -1]
        return decode_rollout(models.tokenizer, z_hat, last, grid=clip.grid).float()
    return roll_out_patches(world, clip, noise=noise)


def seeds_of(config: ForecastConfig) -> list[int]:
    """The seeds of the samples; the first is that of curve, probes and pictures."""
    return list(range(config.seed, config.seed + config.num_seeds))


def more_seeds(
    config: ForecastConfig, models: ForecastModels, batch: WindowBatch, horizon: str
) -> Iterator[tuple[int, HorizonForecast]]:
    """The forecasts of the seeds after the first, with the rows that a seed changes only."""
    for seed in seeds_of(config)[1:]:
        forecast = forecast_horizon(replace(config, seed=seed), models, batch, horizon)
        rows = {name: row for name, row in forecast.rows.items() if name in SAMPLED_ROWS}
        yield seed, replace(forecast, rows=rows)
