"""Best-of-many selection: of S noise queries at each position, the one, or few, that predict best.

Without gradient, some windows and a chunk of samples at a time, keeping only the lowest losses,
their indices and the sum: memory does not grow with S. The winners' noise is drawn again from their
indices (noise.py), and the training step predicts from it once more, with gradient.

Letters: B batch, P = T - 1 target positions, S samples, W winners, N patches, D channels of a
token, Dp of a query. As in the paper: smooth-L1 (beta 0.1) to the true token, averaged over the
token (or the frame's tokens); the W lowest (paper: the lowest).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..losses import SMOOTH_L1_BETA, smooth_l1
from ..models.deltaworld import DeltaWorldNetwork
from ..models.dinoworld import DINOWorld
from .folded import Folded, ProductsName, WorldWeights, fold, predictions, project, weights_of
from .noise import Noise

CPU_MEMORY_MB = 64
GPU_MEMORY_MB = 1024
"""Activations at a time where nobody says otherwise. CPU: measured, 2 windows of 256 candidates on
one core took 3.2 s of CPU time with 16 MB, 3.0 with 32, 2.9 with 64, 3.0 with 128 (larger chunks
read the weights less often, until the activations leave the caches); GPU: a guess."""


class Winners(NamedTuple):
    """The winners of every position: the lowest losses, in order, the first of equal ones before
    the others."""

    indices: Tensor
    """int64 (B, P, W), into the samples."""
    best_losses: Tensor
    """float32 (B, P): the mean over the winners."""
    mean_losses: Tensor
    """float32 (B, P): over all samples."""
    queries: Tensor
    """(B, P, W, Dp): the winners' noise."""
    finalists: Tensor
    """int64 (B, P, F): the F lowest, F at least W, the winners first."""


class Chunks(NamedTuple):
    """How much is predicted at a time. Choice and losses depend on it by rounding only."""

    windows: int
    samples: int


Score = Callable[[Tensor, int], Tensor]
"""score(first, count): losses float32 (b, P, count) of samples first (int64 ()), first + 1, ..."""


@torch.no_grad()
def select(
    world: DeltaWorldNetwork | DINOWorld,
    tokens: Tensor,
    timestamps: Tensor,
    noise: Noise,
    *,
    grid: tuple[int, int] | None = None,
    num_samples: int,
    num_winners: int = 1,
    num_finalists: int = 1,
    products: ProductsName = "float32",
    chunks: Chunks | None = None,
    chunk_losses: "ChunkLosses | None" = None,
) -> Winners:
    """The best num_winners of num_samples candidates, predicted with `products` (folded.py).

    tokens (B, T, D), for DINO-world (B, T, N, D) with its grid; timestamps (B, T) seconds. chunks
    None: as many as activations of CPU_MEMORY_MB or GPU_MEMORY_MB allow. chunk_losses: a compiled
    one, for DeltaWorld. DINO-world: one noise query for all patches of a frame, one choice a frame;
    products float32 or bfloat16.
    """
    if chunks is None:
        chunks = default_chunks(world, tokens, num_samples=num_samples, products=products)
    is_low = isinstance(world, DINOWorld) and products == "bfloat16"
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=is_low):
        if isinstance(world, DINOWorld):
            scorer = _patch_scorer(world, tokens, timestamps, noise, grid=grid)
        else:
            score = chunk_losses or ChunkLosses()
            scorer = _folded_scorer(world, tokens, timestamps, noise, products, score)
        counts = num_samples, num_winners, max(num_winners, num_finalists)
        found = _search(scorer, tokens, noise, chunks, counts)
    if is_low:  # weights that were cast without gradient must not serve the pass with gradient
        torch.clear_autocast_cache()
    return found


def _folded_scorer(
    world: DeltaWorldNetwork,
    z: Tensor,
    timestamps: Tensor,
    noise: Noise,
    products: ProductsName,
    score: "ChunkLosses",
) -> Callable[[slice], Score]:
    weights = weights_of(world, products)
    projected = project(weights, z)

    def scorer(part: slice) -> Score:
        pairs = [pair.windows(part) for pair in projected]
        folded = fold(weights, pairs, timestamps[part])
        return partial(score, weights, folded, z[part, 1:], noise.windows(part))

    return scorer


def _patch_scorer(
    world: DINOWorld,
    x: Tensor,
    timestamps: Tensor,
    noise: Noise,
    *,
    grid: tuple[int, int] | None,
) -> Callable[[slice], Score]:
    """The loss is averaged over the frame's patch tokens. With as many keys as patches nothing is
    folded; a frame's queries meet the frames before it, without a mask."""
    if grid is None:
        raise AssertionError("DINO-world's objective gives a grid")

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

    return scorer


def default_chunks(
    world: DeltaWorldNetwork | DINOWorld,
    tokens: Tensor,
    *,
    num_samples: int,
    products: ProductsName,
    memory_mb: int | None = None,
) -> Chunks:
    """As many windows and samples as activations of memory_mb allow (None: by device), in chunks
    of nearly equal size; tokens (B, T, D) or (B, T, N, D). All samples of one window, if they fit,
    before more windows: what is folded for a window serves all its samples."""
    if memory_mb is None:
        memory_mb = CPU_MEMORY_MB if tokens.device.type == "cpu" else GPU_MEMORY_MB
    size, ratio = world.config.predictor_hidden_size, world.config.mlp_ratio
    # The MLP's hidden channels before and after GELU; stream, norm and predictions in float32.
    query_bytes = size * (2 * ratio * (4 if products == "float32" else 2) + 3 * 4)
    # DINO-world takes a frame's position at a time, but all of its patches.
    per_sample = tokens.shape[1] - 1 if tokens.ndim == 3 else tokens.shape[2]
    at_once = max(1, memory_mb * 10**6 // (query_bytes * per_sample))  # samples of a window
    samples = math.ceil(num_samples / math.ceil(num_samples / at_once))
    windows = max(1, at_once // num_samples)
    return Chunks(
        windows=math.ceil(len(tokens) / math.ceil(len(tokens) / windows)), samples=samples
    )


class ChunkLosses(nn.Module):
    """The losses of a chunk of candidates: what takes the time, as a module of its own so that it
    can be compiled. It has no state, and waits for nothing from the device."""

    def forward(
        self,
        weights: WorldWeights,
        folded: list[Folded],
        targets: Tensor,
        noise: Noise,
        first: Tensor,
        count: int,
    ) -> Tensor:
        """float32 (B, P, count): of samples first, first + 1, ... to targets (B, P, D)."""
        predicted = predictions(weights, folded, noise.chunk(first, count))
        return prediction_losses(predicted, targets)


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


def running_best(chunks: Iterable[Tensor], *, keep: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Of losses (b, P, s) that come in chunks: the indices int64 (b, P, keep) and values of the
    lowest, in order, the first of equal ones before the others; and the mean (b, P)."""
    indices = best = total = torch.empty(0)
    start = 0
    for losses in chunks:
        lowest, index = _lowest(losses, keep)
        if start == 0:
            indices, best, total = index, lowest, losses.sum(dim=2)
        else:
            best, order = _lowest(torch.cat([best, lowest], dim=2), keep)
            indices = torch.cat([indices, index + start], dim=2).gather(2, order)
            total = total + losses.sum(dim=2)
        start += losses.shape[2]
    return indices, best, total / start


def _lowest(losses: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    if keep == 1:
        found = losses.min(dim=2, keepdim=True)
        return found.values, found.indices
    values, indices = losses.sort(dim=2, stable=True)
    return values[:, :, :keep], indices[:, :, :keep]


def _search(
    scorer: Callable[[slice], Score],
    tokens: Tensor,
    noise: Noise,
    chunks: Chunks,
    counts: tuple[int, int, int],
) -> Winners:
    """scorer(windows): what scores their candidates; tokens (B, T, ...); counts: of samples, of
    winners, of finalists."""
    num_samples, num_winners, num_finalists = counts
    count, positions = len(tokens), tokens.shape[1] - 1
    size = min(chunks.windows, count)
    keep = min(num_finalists, num_samples)
    device = tokens.device
    finalists = torch.empty((count, positions, keep), dtype=torch.int64, device=device)
    best = torch.empty((count, positions, min(num_winners, num_samples)), device=device)
    mean = torch.empty((count, positions), device=device)
    for start in range(0, count, size):
        start = min(start, count - size)  # all portions alike: the last may overlap
        part = slice(start, start + size)
        losses = losses_in_chunks(
            scorer(part), num_samples=num_samples, size=chunks.samples, device=device
        )
        finalists[part], lowest, mean[part] = running_best(losses, keep=keep)
        best[part] = lowest[:, :, :num_winners]
    indices = finalists[:, :, :num_winners]
    return Winners(indices, best.mean(2), mean, noise.at(indices), finalists)
