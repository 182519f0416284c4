"""Several seeds of the samples' noise, and the intervals of a report's rows.

Called by `forecast.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from .config import ForecastConfig
from .intervals import Resamples
from .loading import ForecastModels
from .predict import HorizonForecast, WindowBatch, forecast_horizon
from .rows import HORIZONS, MODE_METRICS, MODE_ROWS, ReportRow
from .sequences import Score, SequenceScores

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
