"""Bootstrap intervals: how far a number would move with other clips, and with other noise.

The sequences (clips) are drawn again with replacement, all of a sequence's windows together, since
frames of one clip are alike; so are the seeds, where there are several. Every number of one report,
and of two reports that are compared, sees the same draws. The interval is the middle 95 % of the
resampled values.

Letters: R resamples, Q sequences, C classes, K seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...train.data.order import uniform_rows
from .sequences import Sums, values

NUM_RESAMPLES = 1000
LEVEL = 0.95
MIN_SEQUENCES = 2
"""One sequence drawn again is the same sequence: no interval."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its interval; None where there are too few sequences for one."""

    value: float
    low: float | None
    high: float | None


class Resamples:
    """The draws for Q sequences, a function of their number and the seed alone."""

    def __init__(self, num_sequences: int, *, seed: int = 0) -> None:
        self._seed = seed
        self._num_sequences = num_sequences
        self._weights = draw_weights(num_sequences, "sequences", seed)

    def value(self, metric: str, sums: Sums) -> float:
        """The metric over all sequences, each once."""
        return float(values(metric, sums.sums.sum(axis=0), sums.counts.sum(axis=0)))

    def resampled(self, metric: str, by_seed: Mapping[int, Sums]) -> NDArray[np.float64]:
        """The mean over seeds of a metric in every resample: float64 (R,)."""
        found = [
            values(metric, self._weights @ sums.sums, self._weights @ sums.counts)
            for _, sums in sorted(by_seed.items())
        ]
        if len(found) == 1:
            return np.asarray(found[0])
        weights = draw_weights(len(found), "seeds", self._seed) / len(found)
        return np.asarray((weights * np.stack(found, axis=1)).sum(axis=1))

    def estimate(self, metric: str, by_seed: Mapping[int, Sums]) -> Estimate:
        """The mean over seeds of a metric, and its interval."""
        value = float(np.mean([self.value(metric, sums) for sums in by_seed.values()]))
        return self.interval(value, self.resampled(metric, by_seed))

    def curve(self, sums: Sums) -> list[Estimate]:
        """The points of a curve, each with its interval: of the classes (C,) of `sums`, one after
        the other, the sum over the count."""
        values = sums.sums.sum(axis=0) / sums.counts.sum(axis=0)
        drawn = (self._weights @ sums.sums) / (self._weights @ sums.counts)
        return [self.interval(float(value), drawn[:, i]) for i, value in enumerate(values)]

    def interval(self, value: float, resampled: NDArray[np.float64]) -> Estimate:
        """`value` with the middle of `resampled`; resamples without any value do not count."""
        known = resampled[np.isfinite(resampled)]
        if self._num_sequences < MIN_SEQUENCES or not known.size:
            return Estimate(value=value, low=None, high=None)
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        return Estimate(value=value, low=low, high=high)


def draw_weights(count: int, what: str, seed: int) -> NDArray[np.float64]:
    """How often each of `count` things is drawn in `count` draws with replacement: (R, count)."""
    weights = np.empty((NUM_RESAMPLES, count))
    # A row at a time: 8 kB a sequence is all that is held.
    for row, drawn in zip(
        weights, uniform_rows(count, "bootstrap", what, seed, count), strict=False
    ):
        row[:] = np.bincount((drawn * count).astype(int), minlength=count)
    return weights
