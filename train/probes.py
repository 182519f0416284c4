"""Is a tokenizer alive? Numbers that the loss curve does not show.

At LayerScale 1e-5 a decoder can settle into ignoring its delta token and still beat copy-last by
two thirds, so the loss looks healthy. Then swapping delta tokens between windows changes nothing.

Letters: V windows of T frames, N patches, D channels; P = T - 1 pairs of consecutive frames.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .models.deltatok import DeltaTok

Loss = Callable[[Tensor, Tensor], Tensor]
"""Prediction and target -> elementwise loss (losses.py)."""


@dataclass(frozen=True, kw_only=True)
class TokenizerProbes:
    """Means over all V * P pairs."""

    loss: float
    copy_last_ratio: float
    """Loss / loss of the previous frame as the prediction: below 1 the tokenizer is of use."""
    z_swap_ratio: float
    """Loss with another window's delta tokens / loss: 1 means that they are ignored (seen
    elsewhere: stuck 1.001, healthy 4.7)."""
    zero_z_ratio: float
    """Loss with delta tokens of zeros / loss."""
    z_participation_ratio: float
    """Directions that delta tokens really use, 1 to D."""


@torch.no_grad()
def probe_tokenizer(
    model: DeltaTok,
    frames: Tensor,
    *,
    grid: tuple[int, int],
    loss: Loss,
    windows_at_once: int,
) -> TokenizerProbes:
    """The probes on frames (V, T, N, D), float16 or float32 on any device; one chunk of windows at
    a time is on the model's device."""
    z = torch.cat(
        [
            model.encode(previous, current, grid=grid)
            for _, previous, current in _chunks(model, frames, windows_at_once)
        ]
    ).float()
    swapped = z.roll(frames.shape[1] - 1 if len(frames) > 1 else 1, dims=0)
    sums = torch.zeros(4, dtype=torch.float64)
    for rows, previous, current in _chunks(model, frames, windows_at_once):
        predictions = (
            model.decode(z[rows], previous, grid=grid),
            previous,
            model.decode(swapped[rows], previous, grid=grid),
            model.decode(torch.zeros_like(z[rows]), previous, grid=grid),
        )
        # A mean a pair first: float32 sums over all features would lose digits.
        sums += torch.stack(
            [loss(p, current).flatten(1).mean(1).double().sum().cpu() for p in predictions]
        )
    own, copied, swap, zero = (sums / len(z)).tolist()
    return TokenizerProbes(
        loss=own,
        copy_last_ratio=_ratio(own, copied),
        z_swap_ratio=_ratio(swap, own),
        zero_z_ratio=_ratio(zero, own),
        z_participation_ratio=participation_ratio(z),
    )


def participation_ratio(z: Tensor) -> float:
    """(sum of the covariance's eigenvalues)^2 / sum of their squares, of z (n, D): how many
    directions vary. 0 if none does."""
    centred = z.double() - z.double().mean(0)
    covariance = centred.T @ centred
    squares = covariance.square().sum().item()
    return covariance.trace().item() ** 2 / squares if squares > 0 else 0.0


def _chunks(
    model: DeltaTok, frames: Tensor, windows_at_once: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which pairs, their previous and their current frames, float32 (n, N, D), on the device."""
    pairs = frames.shape[1] - 1
    device = model.z_embed.weight.device
    for start in range(0, len(frames), windows_at_once):
        chunk = frames[start : start + windows_at_once].to(device).float()
        rows = slice(start * pairs, (start + len(chunk)) * pairs)
        yield rows, chunk[:, :-1].flatten(0, 1), chunk[:, 1:].flatten(0, 1)


def _ratio(value: float, unit: float) -> float:
    return value / unit if unit > 0 else float("inf")
