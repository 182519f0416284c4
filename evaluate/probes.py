"""What the rows do not tell: spread of the samples, gain from more of them, use of the delta token.

The tokenizer's own probes (z swapped, z zeroed, copy last) are those of train/probes.py.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..train.losses import log_cosh
from ..train.models.deltatok import DeltaTok
from ..train.probes import probe_tokenizer


def best_of_k(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected loss of the best of k samples, k = 1..S, averaged over windows: float64 (S,).

    losses: (W, S), one loss for each window and sample. The expectation is over all choices of k
    of the S samples, so that it does not hang on which samples came first; k = S is the best row.
    """
    num_samples = losses.shape[1]
    mean_by_rank = np.sort(losses, axis=1).mean(axis=0)
    expected = np.empty(num_samples)
    for k in range(1, num_samples + 1):
        # The i-th smallest (from 0) is the best of k when the other k - 1 are among the larger.
        others = [math.comb(num_samples - 1 - i, k - 1) for i in range(num_samples)]
        expected[k - 1] = sum(mean_by_rank * others) / math.comb(num_samples, k)
    return expected


def mean_square_spread(samples: Tensor) -> Tensor:
    """Squared distance of samples (B, S, N, D) from their mean, averaged over all but B: (B,)."""
    return samples.var(dim=1, correction=0).mean(dim=(1, 2))


def mean_square_motion(truth: Tensor, last: Tensor) -> Tensor:
    """Squared distance of the truth (B, N, D) from the last context frame (B, N, D): (B,)."""
    return (truth - last).square().mean(dim=(1, 2))


def spread_ratio(spread: Sequence[float], motion: Sequence[float]) -> float | None:
    """Root of (summed spread / summed motion): 0 = all samples alike, 1 = they differ as much as
    the frames do. None where nothing moves."""
    return (sum(spread) / sum(motion)) ** 0.5 if sum(motion) > 0 else None


def tokenizer_probes(
    tokenizer: DeltaTok, frames: Tensor, *, grid: tuple[int, int], windows_at_once: int
) -> dict[str, float | None]:
    """z_swap_ratio, zero_z_ratio and copy_last_ratio on frames (V, T, N, D), in log-cosh (the
    released tokenizer loss); None where there is nothing to divide by."""
    found = probe_tokenizer(
        tokenizer, frames, grid=grid, loss=log_cosh, windows_at_once=windows_at_once
    )
    ratios = {
        "z_swap_ratio": found.z_swap_ratio,
        "zero_z_ratio": found.zero_z_ratio,
        "copy_last_ratio": found.copy_last_ratio,
    }
    return {name: ratio if math.isfinite(ratio) else None for name, ratio in ratios.items()}
