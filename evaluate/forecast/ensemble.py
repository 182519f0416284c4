"""Samples held against the one future that came, for data whose other futures nobody knows.

At the target frame, the last step of a horizon; y is the truth, x_1 .. x_S are the samples. |.| is
the root mean square over the N D channels of a frame.

    energy_score    mean_i |x_i - y| - sum_{i<j} |x_i - x_j| / (S (S - 1)), lower is better: in
                    expectation lowest where the samples are drawn from what can come. Gneiting and
                    Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation" (2007),
                    theirs with the sign turned; in the fair form, which pairs no sample with
                    itself, so that S changes its noise, not its expectation (Ferro, "Fair scores
                    for ensemble forecasts", 2014). Of one answer: |x - y|.
    spread_skill    sqrt((1 + 1/S) mean s^2 / mean |m - y|^2), s^2 the samples' variance (divided by
                    S - 1) averaged over channels, m their mean, both means over windows: 1 where
                    the truth could be one of the samples, below 1 where they differ too little.
                    Fortin et al., "Why Should Ensemble Spread Match the RMSE of the Ensemble Mean?"
                    (2014): a mean of S has noise of its own, hence 1 + 1/S.
    rank histogram  how often a channel's truth is larger than r of its S samples, r = 0 .. S: even
                    where it could be one of them, high at both ends where they differ too little.
                    Among equal samples its place is drawn. Hamill, "Interpretation of Rank
                    Histograms for Verifying Ensemble Forecasts" (2001).
    outside_share   share of the ranks 0 and S: truth below or above all samples; 2 / (S + 1) where
                    it could be one of them.

What the tokenizer cannot reconstruct is part of the truth, not of the samples: it lowers
spread_skill and raises outside_share even where the samples are drawn from all that can come.

Letters: B windows, S samples, N patch tokens, D channels.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...train.data.order import uniforms
from ..report.rows import ENSEMBLE_ROWS, SAMPLES_ROW
from .config import ForecastConfig
from .intervals import Resamples
from .rollout import HorizonForecast, WindowBatch
from .sequences import Score, SequenceScores
from .windows import WindowArrangement


def root_mean_square(difference: Tensor) -> Tensor:
    """|x| of features (..., N, D): (...)."""
    return difference.square().mean(dim=(-2, -1)).sqrt()


def energy_score(samples: Tensor, truth: Tensor) -> Tensor:
    """The fair energy score (B,) of samples (B, S, N, D), S at least 2, of the truth (B, N, D)."""
    count = samples.shape[1]
    to_truth = root_mean_square(samples - truth[:, None]).mean(dim=1)
    between = torch.zeros_like(to_truth)
    for i in range(count - 1):  # a sample at a time: S differences in memory, not S * S
        between += root_mean_square(samples[:, i + 1 :] - samples[:, i : i + 1]).sum(dim=1)
    return to_truth - between / (count * (count - 1))


def spread_and_error(samples: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(1 + 1/S) times the variance of samples (B, S, N, D), S at least 2, and the squared error of
    their mean, both averaged over channels: (B,) each. Equal in expectation where the truth
    (B, N, D) is drawn as the samples are."""
    variance = samples.var(dim=1, correction=1).mean(dim=(1, 2))
    error = (samples.mean(dim=1) - truth).square().mean(dim=(1, 2))
    return (1 + 1 / samples.shape[1]) * variance, error


def rank_counts(samples: Tensor, truth: Tensor, *draw: int | str) -> NDArray[np.int64]:
    """How many channels of the truth (N, D) have each rank among samples (S, N, D): int64 (S + 1,).

    `draw`: what the places among equal samples are drawn for, from all possible ones alike.
    """
    below = (samples < truth).sum(dim=0).flatten().cpu().numpy()
    equal = (samples == truth).sum(dim=0).flatten().cpu().numpy()
    tied = np.flatnonzero(equal)
    places = equal[tied] + 1
    below[tied] += (uniforms(len(tied), *draw) * places).astype(np.int64)
    return np.bincount(below, minlength=len(samples) + 1)


class EnsembleScorer:
    """Takes in every window once a horizon and seed; holds sums by sequence."""

    def __init__(self, config: ForecastConfig, windows: WindowArrangement) -> None:
        self._config, self._windows = config, windows
        self._ranks = SequenceScores()

    def add(
        self,
        horizon: str,
        forecast: HorizonForecast,
        batch: WindowBatch,
        *,
        seed: int,
        scores: SequenceScores,
    ) -> None:
        """Score a batch of one horizon into `scores`; the ranks of the first seed into a histogram
        of this object's own."""
        truth = forecast.truth[:, -1]
        sequences = [self._windows.sequence(index) for index in batch.indices]

        def record(row: str, metric: str, sums: Tensor, counts: Tensor) -> None:
            score = Score(horizon, row, metric)
            for sequence, one, count in zip(sequences, sums.tolist(), counts.tolist(), strict=True):
                scores.add(score, seed, sequence, one, count)

        one_each = torch.ones(len(sequences))
        for name, row in forecast.rows.items():
            if name in ENSEMBLE_ROWS:
                record(name, "energy_score", root_mean_square(row[:, -1] - truth), one_each)
        if forecast.samples is None or forecast.samples.shape[1] < 2:
            return
        samples = forecast.samples[:, :, -1]
        record(SAMPLES_ROW, "energy_score", energy_score(samples, truth), one_each)
        record(SAMPLES_ROW, "spread_skill", *spread_and_error(samples, truth))
        for position, sequence in enumerate(sequences):
            draw = ("ranks", seed, horizon, *batch.names[position])
            ranks = rank_counts(samples[position], truth[position], *draw)
            outside = int(ranks[0] + ranks[-1])
            total = int(ranks.sum())
            scores.add(Score(horizon, SAMPLES_ROW, "outside_share"), seed, sequence, outside, total)
            if seed == self._config.seed:
                score = Score(horizon, SAMPLES_ROW, "rank")
                self._ranks.add(score, seed, sequence, ranks, np.full(len(ranks), total))

    def rank_histogram(self, sequences: SequenceScores) -> list[dict[str, Any]]:
        """[{"horizon", "rank", "share", "interval_low", "interval_high"}] of ranks 0 to S, the
        shares of a horizon adding up to 1; empty without samples. sequences: those scored."""
        resamples = Resamples(len(sequences.windows), seed=self._config.seed)
        return [
            {
                "horizon": score.horizon,
                "rank": rank,
                "share": found.value,
                "interval_low": found.low,
                "interval_high": found.high,
            }
            for score in self._ranks.parts
            for sums in self._ranks.by_seed(score, sequences.windows).values()
            for rank, found in enumerate(resamples.curve(sums))
        ]
