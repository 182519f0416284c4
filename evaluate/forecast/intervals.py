"""Bootstrap intervals: how far a number would move with other clips, and with other noise.

The sequences (clips) are drawn again with replacement, all of a sequence's windows together, since
frames of one clip are alike; so are the seeds, where there are several. Every number of one report,
and of two reports that are compared, sees the same draws. The interval is the middle 95 % of the
resampled values. Used by `seeds.py` and `compare.py`.

Letters: R resamples, Q sequences, C classes, K seeds.

Several seeds of the samples' noise, and the intervals of a report's rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...train.data.order import uniforms
from ..report.rows import HORIZONS, MODE_METRICS, MODE_ROWS, ReportRow
from .config import ForecastConfig
from .models import ForecastModels
from .rollout import HorizonForecast, WindowBatch, forecast_horizon
from .scores import Score, SequenceScores, Sums, values

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

    def interval(self, value: float, resampled: NDArray[np.float64]) -> Estimate:
        """`value` with the middle of `resampled`; resamples without any value do not count."""
        known = resampled[np.isfinite(resampled)]
        if self._num_sequences < MIN_SEQUENCES or not known.size:
            return Estimate(value=value, low=None, high=None)
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        return Estimate(value=value, low=low, high=high)


def draw_weights(count: int, what: str, seed: int) -> NDArray[np.float64]:
    """How often each of `count` things is drawn in `count` draws with replacement: (R, count)."""
    drawn = (uniforms(NUM_RESAMPLES * count, "bootstrap", what, seed, count) * count).astype(int)
    rows = np.repeat(np.arange(NUM_RESAMPLES), count)
    flat = np.bincount(rows * count + drawn, minlength=NUM_RESAMPLES * count)
    return flat.reshape(NUM_RESAMPLES, count).astype(np.float64)


SAMPLED_ROWS = ("best", "mean", "regressor_null", "dinoworld_best", "dinoworld_mean")
"""Rows that another seed changes."""


def seeds_of(config: ForecastConfig) -> list[int]:
    """The seeds of the samples; the first is that of curve, probes and pictures."""
    return list(range(config.seed, config.seed + config.num_seeds))


def more_seeds(
    config: ForecastConfig,
    models: ForecastModels,
    batch: WindowBatch,
    horizon: str,
    *,
    black: Tensor,
    grid: tuple[int, int],
) -> Iterator[tuple[int, HorizonForecast]]:
    """The forecasts of the seeds after the first, with the rows that a seed changes only."""
    for seed in seeds_of(config)[1:]:
        seeded = replace(config, seed=seed)
        forecast = forecast_horizon(seeded, models, batch, horizon, black=black, grid=grid)
        rows = {name: row for name, row in forecast.rows.items() if name in SAMPLED_ROWS}
        yield seed, replace(forecast, rows=rows)


def with_intervals(
    config: ForecastConfig, rows: Sequence[ReportRow], scores: SequenceScores
) -> list[ReportRow]:
    """The rows, each with its interval and its seeds' values; after them those of the modes."""
    mode_rows = [
        ReportRow(dataset=config.dataset, horizon=horizon, row=row, metric=metric, value=np.nan)
        for horizon in HORIZONS
        for row in MODE_ROWS
        for metric in MODE_METRICS
        if Score(horizon, row, metric) in scores.parts
    ]
    resamples = Resamples(len(scores.windows), seed=config.seed)
    return [_with_interval(row, resamples, scores) for row in (*rows, *mode_rows)]


def _with_interval(row: ReportRow, resamples: Resamples, scores: SequenceScores) -> ReportRow:
    by_seed = scores.by_seed(Score(row.horizon, row.row, row.metric), scores.windows)
    if not by_seed:
        return row
    found = resamples.estimate(row.metric, by_seed)
    by_its_seed = [resamples.value(row.metric, sums) for sums in by_seed.values()]
    # A single seed's value stays the one that its metric accumulated.
    keeps = len(by_seed) == 1 and np.isfinite(row.value)
    return replace(
        row,
        value=row.value if keeps else found.value,
        interval_low=found.low,
        interval_high=found.high,
        by_seed=by_its_seed if len(by_seed) > 1 else [],
    )
