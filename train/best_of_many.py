"""Best-of-many selection: of S noise queries at each position, the one that predicts best.

Without gradient, in chunks of samples, so that memory does not grow with S; the chosen queries
are then run again with gradient (DeltaWorld.teacher_forced). Used by the world training loop.

Letters: B batch, P = T - 1 target positions, S samples, D channels of a token, Dp of a query.
As in the paper: smooth-L1 (beta 0.1) to the true token, averaged over the token; argmin.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .losses import SMOOTH_L1_BETA, smooth_l1
from .models.deltaworld import DeltaWorld
from .models.dinoworld import DINOWorld

CHUNK_SAMPLES = 32
"""Samples that are predicted at once. A guess; losses and choice do not depend on it."""


class Selection(NamedTuple):
    """The winner of every position: the lowest loss, the first of equal ones."""

    indices: Tensor
    """int64 (B, P), into the samples."""
    best_losses: Tensor
    """float32 (B, P)."""
    queries: Tensor
    """(B, P, Dp): the winners' noise."""
    losses: Tensor
    """float32 (B, P, S)."""


def select(
    world: DeltaWorld,
    z: Tensor,
    timestamps: Tensor,
    noise: Tensor,
    *,
    chunk_samples: int = CHUNK_SAMPLES,
) -> tuple[Tensor, Tensor]:
    """Indices int64 (B, P) of the best samples and all losses float32 (B, P, S).

    z (B, T, D), timestamps (B, T) seconds, noise (B, P, S, Dp), already scaled.
    """
    chosen = select_from(world, z, timestamps, _chunks(noise, chunk_samples))
    return chosen.indices, chosen.losses


@torch.no_grad()
def select_from(
    world: DeltaWorld, z: Tensor, timestamps: Tensor, chunks: Iterator[Tensor]
) -> Selection:
    """The same for noise that comes in chunks (B, P, s, Dp), which need not all be kept."""
    memory = world.memory(z, timestamps)
    return _running_best(
        lambda queries: world.candidates(memory, timestamps, queries), z[:, 1:], chunks
    )


@torch.no_grad()
def select_patches(
    world: DINOWorld,
    x: Tensor,
    timestamps: Tensor,
    noise: Tensor,
    *,
    grid: tuple[int, int],
    chunk_samples: int = CHUNK_SAMPLES,
) -> tuple[Tensor, Tensor]:
    """`select` for DINO-world: one noise query for all patches of a frame; one choice a frame.

    x (B, T, N, D), noise (B, P, S, Dp); the loss is averaged over the frame's patch tokens.
    """
    memory = world.memory(x, timestamps, grid=grid)
    chosen = _running_best(
        lambda queries: world.candidates(memory, timestamps, queries, grid=grid),
        x[:, 1:],
        _chunks(noise, chunk_samples),
    )
    return chosen.indices, chosen.losses


def chosen_queries(noise: Tensor, indices: Tensor) -> Tensor:
    """The winners' noise (B, P, Dp) out of noise (B, P, S, Dp), by indices (B, P)."""
    index = indices[:, :, None, None].expand(-1, -1, 1, noise.shape[-1])
    return noise.gather(2, index)[:, :, 0]


def _running_best(
    predict: Callable[[Tensor], Tensor], targets: Tensor, chunks: Iterator[Tensor]
) -> Selection:
    """predict: queries (B, P, s, Dp) -> (B, P, s, ...); targets (B, P, ...)."""
    shape = targets.shape[:2]
    best = torch.full(shape, torch.inf, device=targets.device)
    indices = torch.zeros(shape, dtype=torch.int64, device=targets.device)
    winners: Tensor | None = None
    losses: list[Tensor] = []
    start = 0
    for queries in chunks:
        predictions = predict(queries)
        loss = candidate_losses(predictions, targets)
        lowest, index = loss.min(dim=2)
        better = lowest < best  # strict: the first of equal losses stays
        best = torch.where(better, lowest, best)
        indices = torch.where(better, index + start, indices)
        candidates = chosen_queries(queries, index)
        if winners is None:
            winners = candidates
        winners = torch.where(better[..., None], candidates, winners)
        losses.append(loss)
        start += queries.shape[2]
    if winners is None:
        raise ValueError("no noise to choose from: pass at least one sample")
    return Selection(indices, best, winners, torch.cat(losses, dim=2))


def candidate_losses(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean smooth-L1 float32 (B, P, S) of predictions (B, P, S, ...) to targets (B, P, ...)."""
    target = targets[:, :, None].expand_as(predictions)
    return smooth_l1(predictions, target, beta=SMOOTH_L1_BETA).flatten(3).mean(dim=3)


def _chunks(noise: Tensor, size: int) -> Iterator[Tensor]:
    return iter(torch.split(noise, size, dim=2))
