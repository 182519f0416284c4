"""Forecasts in feature space: decoding a rollout, and the two numbers it is reported by.

Letters: B batch (crops), S samples, H horizon (steps), N patches, D channels.
Used by the forecast evaluation; pure functions.
"""

import torch
from torch import Tensor

from ..train.losses import smooth_l1
from ..train.models.deltatok import DeltaTok


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
