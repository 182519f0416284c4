"""Best-of-many selection: of S noise queries at each position, the one that predicts best.

Without gradient, some windows and a chunk of samples at a time, keeping only the lowest loss, its
index and the sum: memory does not grow with S. The winners' noise is drawn again from their
indices (noise.py), and the training step predicts from it once more, with gradient. Used by
world.py and dinoworld.py.

Letters: B batch, P = T - 1 target positions, S samples, N patches, D channels of a token, Dp of a
query. As in the paper: smooth-L1 (beta 0.1) to the true token, averaged over the token (or the
frame's tokens); argmin.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .losses import SMOOTH_L1_BETA, smooth_l1
from .models.deltaworld import DeltaWorld
from .models.dinoworld import DINOWorld
from .models.folded import Folded, WorldWeights, fold, predictions, weights_of
from .noise import Noise

CPU_MEMORY_MB = 16
CUDA_MEMORY_MB = 1024
"""Activations at a time where nobody says otherwise. CPU: measured (tests/benchmarks/selection.py);
CUDA: a guess."""


class Selection(NamedTuple):
    """The winner of every position: the lowest loss, the first of equal ones."""

    indices: Tensor
    """int64 (B, P), into the samples."""
    best_losses: Tensor
    """float32 (B, P)."""
    mean_losses: Tensor
    """float32 (B, P): over all samples."""
    queries: Tensor
    """(B, P, Dp): the winners' noise."""


class Chunks(NamedTuple):
    """How much is predicted at a time. Choice and losses depend on it by rounding only."""

    windows: int
    samples: int


Score = Callable[[Tensor, int], Tensor]
"""score(first, count): losses float32 (b, P, count) of samples first (int64 ()), first + 1, ..."""


@torch.no_grad()
def select(
    world: DeltaWorld,
    z: Tensor,
    timestamps: Tensor,
    noise: Noise,
    *,
    num_samples: int,
    dtype: torch.dtype = torch.float32,
    chunks: Chunks | None = None,
) -> Selection:
    """The best of num_samples candidates, predicted with products in `dtype`.

    z (B, T, D), timestamps (B, T) seconds. chunks None: as many as activations of CPU_MEMORY_MB or
    CUDA_MEMORY_MB allow.
    """
    if chunks is None:
        chunks = default_chunks(world, z, num_samples=num_samples, dtype=dtype)
    with torch.autocast(z.device.type, enabled=False):
        weights = weights_of(world, dtype)

        def scorer(part: slice) -> Score:
            folded = fold(weights, z[part], timestamps[part])
            targets, drawn = z[part, 1:], noise.windows(part)
            return lambda first, count: chunk_losses(weights, folded, targets, drawn, first, count)

        return _select(scorer, z, noise, num_samples=num_samples, chunks=chunks)


@torch.no_grad()
def select_patches(
    world: DINOWorld,
    x: Tensor,
    timestamps: Tensor,
    noise: Noise,
    *,
    grid: tuple[int, int],
    num_samples: int,
    dtype: torch.dtype = torch.float32,
    chunks: Chunks | None = None,
) -> Selection:
    """`select` for DINO-world: one noise query for all patches of a frame; one choice a frame.

    x (B, T, N, D); the loss is averaged over the frame's patch tokens. With as many keys as
    patches nothing is folded; a frame's queries meet the frames before it, without a mask.
    """
    if chunks is None:
        chunks = default_chunks(world, x, num_samples=num_samples, dtype=dtype)
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):

        def scorer(part: slice) -> Score:
            memory = world.memory(x[part], timestamps[part], grid=grid)
            drawn = noise.windows(part)

            def score(first: Tensor, count: int) -> Tensor:
                queries = drawn.chunk(first, count)
                frames = [
                    prediction_losses(
                        world.candidates_at(
                            memory, timestamps[part], queries[:, at], position=at, grid=grid
                        )[:, None],
                        x[part, at + 1 : at + 2],
                    )
                    for at in range(x.shape[1] - 1)
                ]
                return torch.cat(frames, dim=1)

            return score

        selection = _select(scorer, x, noise, num_samples=num_samples, chunks=chunks)
    # Weights that autocast has cast without gradient must not serve the pass with gradient.
    torch.clear_autocast_cache()
    return selection


def default_chunks(
    world: DeltaWorld | DINOWorld,
    tokens: Tensor,
    *,
    num_samples: int,
    dtype: torch.dtype,
    memory_mb: int | None = None,
) -> Chunks:
    """As many windows and samples as activations of memory_mb allow (None: by device), in chunks
    of nearly equal size; tokens (B, T, D) or (B, T, N, D). All samples of one window, if they fit,
    before more windows: what is folded for a window serves all its samples."""
    if memory_mb is None:
        memory_mb = CUDA_MEMORY_MB if tokens.is_cuda else CPU_MEMORY_MB
    size, ratio = world.config.predictor_hidden_size, world.config.mlp_ratio
    # The MLP's hidden channels before and after GELU; stream, norm and predictions in float32.
    query_bytes = size * (2 * ratio * dtype.itemsize + 3 * 4)
    # DINO-world takes a frame's position at a time, but all of its patches.
    per_sample = tokens.shape[1] - 1 if tokens.ndim == 3 else tokens.shape[2]
    at_once = max(1, memory_mb * 10**6 // (query_bytes * per_sample))  # samples of a window
    samples = math.ceil(num_samples / math.ceil(num_samples / at_once))
    windows = max(1, at_once // num_samples)
    return Chunks(
        windows=math.ceil(len(tokens) / math.ceil(len(tokens) / windows)), samples=samples
    )


def chunk_losses(
    weights: WorldWeights,
    folded: list[Folded],
    targets: Tensor,
    noise: Noise,
    first: Tensor,
    count: int,
) -> Tensor:
    """Losses float32 (B, P, count) of samples first, first + 1, ... to targets (B, P, D).

    Draws, predicts and compares; waits for nothing from the device, so it can be compiled whole
    or captured.
    """
    return prediction_losses(predictions(weights, folded, noise.chunk(first, count)), targets)


def prediction_losses(predicted: Tensor, targets: Tensor) -> Tensor:
    """Mean smooth-L1 float32 (B, P, S) of predictions (B, P, S, ...) to targets (B, P, ...)."""
    target = targets[:, :, None].expand_as(predicted)
    return smooth_l1(predicted, target, beta=SMOOTH_L1_BETA).flatten(3).mean(dim=3)


def losses_in_chunks(
    score: Score, *, num_samples: int, size: int, device: torch.device
) -> Iterator[Tensor]:
    """All losses, (b, P, size) at a time. Every chunk has this size; what the last one computes
    beyond num_samples is cut off."""
    for start in range(0, num_samples, size):
        first = torch.full((), start, dtype=torch.int64, device=device)
        yield score(first, size)[:, :, : num_samples - start]


def running_best(chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Index int64, lowest and mean loss float32, (b, P) each, of losses (b, P, s) that come in
    chunks; of equal ones the first."""
    indices: Tensor | None = None
    best = total = torch.empty(0)
    start = 0
    for losses in chunks:
        lowest, index = losses.min(dim=2)
        if indices is None:
            indices, best, total = index, lowest, losses.sum(dim=2)
        else:
            better = lowest < best  # strict: the first of equal losses stays
            best = torch.where(better, lowest, best)
            indices = torch.where(better, index + start, indices)
            total = total + losses.sum(dim=2)
        start += losses.shape[2]
    if indices is None:
        raise ValueError("no candidates to choose from: ask for at least one sample")
    return indices, best, total / start


def _select(
    scorer: Callable[[slice], Score],
    tokens: Tensor,
    noise: Noise,
    *,
    num_samples: int,
    chunks: Chunks,
) -> Selection:
    """scorer(windows): what scores their candidates; tokens (B, T, ...)."""
    count, positions = len(tokens), tokens.shape[1] - 1
    size = min(chunks.windows, count)
    device = tokens.device
    indices = torch.empty((count, positions), dtype=torch.int64, device=device)
    best, mean = (torch.empty((count, positions), device=device) for _ in range(2))
    for start in range(0, count, size):
        start = min(start, count - size)  # all portions alike: the last may overlap
        part = slice(start, start + size)
        losses = losses_in_chunks(
            scorer(part), num_samples=num_samples, size=chunks.samples, device=device
        )
        indices[part], best[part], mean[part] = running_best(losses)
    return Selection(indices, best, mean, noise.at(indices))
