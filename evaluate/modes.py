"""Modes: the possible futures that can be told apart, and which of them a forecast is.

Futures whose class maps look alike are one mode with the sum of their probabilities. A forecast
*hits* the mode of the future it looks most like, where it looks like it at all: where the overlap
of the two class maps is at least a threshold (0.5). Pure functions; used by `mode_scores.py`.

Letters: M futures, G modes, S forecasts, H, W pixels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .known_futures import KnownFutures
from .protocol import IGNORE

NO_MODE = -1
"""What a forecast hits that looks like no possible future."""


@dataclass(frozen=True, kw_only=True)
class Modes:
    """The modes of one window."""

    probability: NDArray[np.float64]
    """(G,), adds up to 1, largest first."""
    mode_of: NDArray[np.int64]
    """(M,): the mode of each future."""
    futures: KnownFutures
    threshold: float
    """Overlap from which on two class maps look alike."""


def overlap(
    ours: NDArray[np.uint8], theirs: NDArray[np.uint8], *, background: int
) -> NDArray[np.float64]:
    """How much class maps (S, H, W) look like class maps (M, H, W): float64 (S, M), 0 to 1.

    Pixels where both have the same class, over pixels where either has one; `background` is no
    class, and where either is 255 nothing counts. With one shape before a background this is the
    IoU of the shape, 0 for the wrong shape. 1 where both are empty.
    """
    found = np.empty((len(ours), len(theirs)))
    is_ours = ours != background
    for column, other in enumerate(theirs):
        counted = (ours != IGNORE) & (other != IGNORE)
        either = ((is_ours | (other != background)) & counted).sum(axis=(1, 2))
        both = ((ours == other) & is_ours & counted).sum(axis=(1, 2))
        found[:, column] = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    return found


def find_modes(futures: KnownFutures, *, threshold: float) -> Modes:
    """Merge what looks alike: from the most probable future on, each joins the most alike of the
    modes that were begun before it, or begins one."""
    order = np.argsort(-futures.probability, kind="stable")
    alike = overlap(futures.classes, futures.classes, background=futures.background)
    mode_of = np.empty(len(order), np.int64)
    firsts: list[int] = []
    for future in order.tolist():
        nearest = int(np.argmax(alike[future, firsts])) if firsts else 0
        if not firsts or alike[future, firsts[nearest]] < threshold:
            nearest = len(firsts)
            firsts.append(future)
        mode_of[future] = nearest
    probability = np.zeros(len(firsts))
    np.add.at(probability, mode_of, futures.probability)
    by_size = np.argsort(-probability, kind="stable")
    return Modes(
        probability=probability[by_size],
        mode_of=np.argsort(by_size, kind="stable")[mode_of],
        futures=futures,
        threshold=threshold,
    )


def hits(modes: Modes, classes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The mode that each forecast (S, H, W) is, int64 (S,); NO_MODE: no possible future."""
    alike = overlap(classes, modes.futures.classes, background=modes.futures.background)
    nearest = alike.argmax(axis=1)
    is_hit = alike[np.arange(len(classes)), nearest] >= modes.threshold
    return np.where(is_hit, modes.mode_of[nearest], NO_MODE)


def recall_of_draws(probability: NDArray[np.float64], num_draws: int) -> tuple[float, float]:
    """Share of the modes that `num_draws` draws from their probabilities (G,) hit, expected; and
    the same with each mode counting as much as it is probable."""
    hit = 1 - (1 - probability) ** num_draws
    return float(hit.mean()), float(hit @ probability)
