"""Energy score, spread over skill and ranks: against brute force and closed forms. The forms
without their corrections are known, too, and told apart."""

import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from deltatok.evaluate.forecast.ensemble import (
    EnsembleScorer,
    energy_score,
    rank_counts,
    root_mean_square,
    spread_and_error,
)
from deltatok.evaluate.forecast.intervals import NUM_RESAMPLES, Resamples, draw_weights
from deltatok.evaluate.forecast.rollout import HorizonForecast, WindowBatch, feature_loss
from deltatok.evaluate.forecast.run import run_forecast
from deltatok.evaluate.forecast.scores import mean_of_k
from deltatok.evaluate.forecast.sequences import Score, SequenceScores, Sums
from deltatok.evaluate.report.rows import ENSEMBLE_ROWS, find_row
from deltatok.evaluate.report.write import Report

MANY = 200_000


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_energy_score_is_that_of_all_pairs() -> None:
    samples, truth = normal(3, 5, 4, 6), normal(3, 4, 6, seed=1)
    wanted = []
    for window in range(3):
        flat, y = samples[window].flatten(1).numpy(), truth[window].flatten().numpy()
        norm = [[np.linalg.norm(a - b) for a in flat] for b in flat]
        to_truth = np.mean([np.linalg.norm(a - y) for a in flat])
        wanted.append((to_truth - np.sum(norm) / (2 * 5 * 4)) / math.sqrt(24))
    assert energy_score(samples, truth).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("count", [2, 3, 20])
def test_the_energy_score_of_a_normal_is_known_and_the_same_for_any_number_of_samples(
    count: int,
) -> None:
    """Of one channel it is the CRPS, 1 / sqrt(pi) where samples and truth are standard normal."""
    samples, truth = normal(MANY, count, 1, 1), normal(MANY, 1, 1, seed=1)
    found, wanted = float(energy_score(samples, truth).mean()), 1 / math.sqrt(math.pi)
    assert found == pytest.approx(wanted, abs=0.005)
    pairs = (count - 1) / count  # what is left where each sample is paired with itself, too
    not_fair = 2 * wanted - pairs * wanted
    assert not_fair > wanted + 5 * 0.005


@pytest.mark.parametrize("scale", [0.0, 0.5, 0.8, 1.25, 2.0])
def test_samples_drawn_as_the_truth_have_the_best_energy_score(scale: float) -> None:
    truth, samples = normal(20_000, 3, 2, seed=1), normal(20_000, 5, 3, 2)
    right = energy_score(samples, truth).mean()
    assert energy_score(scale * samples, truth).mean() > right + 0.003


def test_the_energy_score_of_samples_that_are_all_alike_is_their_distance() -> None:
    answer, truth = normal(4, 3, 2), normal(4, 3, 2, seed=1)
    alike = answer[:, None].expand(4, 7, 3, 2)
    assert torch.allclose(energy_score(alike, truth), root_mean_square(answer - truth))


def ratio(samples: Tensor, truth: Tensor) -> float:
    variance, error = spread_and_error(samples, truth)
    return float((variance.sum() / error.sum()).sqrt())


@pytest.mark.parametrize("count", [2, 5, 20])
def test_spread_over_skill_is_1_where_the_truth_could_be_one_of_the_samples(count: int) -> None:
    """Clips differ in where they go and in how sure that is; whatever the number of samples."""
    centre, width = normal(MANY, 1, 1, seed=2), normal(MANY, 1, 1, seed=3).exp()
    samples = centre[:, None] + width[:, None] * normal(MANY, count, 1, 1)
    truth = centre + width * normal(MANY, 1, 1, seed=1)
    found = ratio(samples, truth)
    assert found == pytest.approx(1, abs=0.025)
    without = {
        "no 1 + 1/S": math.sqrt(count / (count + 1)),
        "variance over S": math.sqrt((count - 1) / count),
        "neither": math.sqrt((count - 1) / (count + 1)),
    }
    for correction, wrong in without.items():
        assert wrong < 1 - 0.024 or count == 20, correction


@pytest.mark.parametrize(("scale", "count"), [(0.5, 4), (2.0, 4), (0.5, 20)])
def test_spread_over_skill_of_samples_of_another_width_is_known(scale: float, count: int) -> None:
    samples, truth = scale * normal(MANY, count, 1, 1), normal(MANY, 1, 1, seed=1)
    wanted = math.sqrt((1 + 1 / count) * scale**2 / (1 + scale**2 / count))
    assert ratio(samples, truth) == pytest.approx(wanted, rel=0.01)


def test_spread_over_skill_is_of_the_sums_over_windows_not_a_mean_of_ratios() -> None:
    samples = torch.tensor([[[[0.0]], [[2.0]]], [[[0.0]], [[4.0]]]])  # variances 2 and 8
    truth = torch.tensor([[[2.0]], [[2.0 + 3.0]]])  # errors 1 and 9
    assert ratio(samples, truth) == pytest.approx(math.sqrt(1.5 * (2 + 8) / (1 + 9)))


def test_ranks_are_the_numbers_of_samples_below() -> None:
    samples, truth = normal(6, 4, 3), normal(4, 3, seed=1)
    wanted = np.zeros(7, int)
    for patch in range(4):
        for channel in range(3):
            wanted[
                sum(float(s) < float(truth[patch, channel]) for s in samples[:, patch, channel])
            ] += 1
    assert rank_counts(samples, truth, "a").tolist() == wanted.tolist()


def test_ranks_of_the_truth_among_its_likes_are_even_also_where_many_are_equal() -> None:
    """Values 0, 1 and 2 alone, drawn alike: without drawn places the ranks would be far from it."""
    rng = np.random.default_rng(0)
    drawn = torch.from_numpy(rng.choice(3, p=[0.6, 0.3, 0.1], size=(6, 300, 200)))
    counts = rank_counts(drawn[1:], drawn[0], "a")
    expected = counts.sum() / 6
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # chi squared of 5, 99.9 %
    lowest = np.bincount((drawn[1:] < drawn[0]).sum(0).flatten().numpy(), minlength=6)
    assert lowest[0] > 2 * expected


def test_places_among_equal_samples_are_drawn_for_a_name() -> None:
    equal = torch.zeros(5, 40, 30)
    one, again, other = (rank_counts(equal, equal[0], "ranks", 0, n) for n in (1, 1, 2))
    assert one.tolist() == again.tolist() != other.tolist()
    assert one.sum() == 1200 and one.min() > 120


def test_the_mean_of_k_is_that_of_k_that_follow_one_another() -> None:
    samples, truth = normal(3, 5, 4, 6).float(), normal(3, 4, 6, seed=1).float()
    found = mean_of_k(samples, truth)
    for k in range(1, 6):
        chosen = [[(first + i) % 5 for i in range(k)] for first in range(5)]
        losses = [feature_loss(samples[:, numbers].mean(dim=1), truth) for numbers in chosen]
        assert torch.allclose(found[:, k - 1], torch.stack(losses).mean(dim=0))


def test_a_curve_has_the_interval_of_the_sequences_drawn_again() -> None:
    rng = np.random.default_rng(0)
    sums = Sums(rng.uniform(size=(6, 3)), rng.integers(1, 4, size=(6, 3)).astype(float))
    found = Resamples(6).curve(sums)
    weights = draw_weights(6, "sequences", 0).astype(int)
    for point in range(3):
        drawn = []
        for resample in range(NUM_RESAMPLES):
            rows = np.repeat(np.arange(6), weights[resample])
            drawn.append(sums.sums[rows, point].sum() / sums.counts[rows, point].sum())
        assert found[point].value == pytest.approx(
            sums.sums[:, point].sum() / sums.counts[:, point].sum()
        )
        low, high = np.quantile(drawn, [0.025, 0.975])
        assert (found[point].low, found[point].high) == pytest.approx((low, high))


class OneSequence:
    """All windows are of one clip."""

    def sequence(self, index: int) -> str:
        return "clip"


@pytest.mark.parametrize("together", [True, False])
def test_windows_are_scored_alike_alone_and_in_a_batch(
    shared_evaluation: Any, together: bool
) -> None:
    """Also where the places among equal values are drawn: for a window, not for its place."""
    samples = normal(2, 5, 1, 30, 20).round().float()  # (B, S, H, N, D), of few values
    truth = normal(2, 1, 30, 20, seed=1).round().float()
    scorer = EnsembleScorer(shared_evaluation.config(num_samples=5), cast(Any, OneSequence()))
    scores = SequenceScores()
    for indices in [(0, 1)] if together else [(1,), (0,)]:
        part = list(indices)
        scores.windows.update("clip" for _ in part)
        scorer.add(
            "mid",
            HorizonForecast(truth=truth[part], rows={}, samples=samples[part]),
            WindowBatch(
                indices=indices,
                names=tuple((index,) for index in indices),
                x=truth[part],
                times=torch.zeros(len(part), 1),
                z=torch.zeros(len(part), 1, 20),
            ),
            seed=0,
            scores=scores,
        )
    counts = [rank_counts(samples[i, :, 0], truth[i, 0], "ranks", 0, "mid", i) for i in (0, 1)]
    shares = [entry["share"] for entry in scorer.rank_histogram(scores)]
    assert shares == pytest.approx((counts[0] + counts[1]) / 1200)
    found = scores.by_seed(Score("mid", "samples", "spread_skill"), scores.windows)[0]
    wanted = ratio(samples[:, :, 0], truth[:, 0])
    assert Resamples(1).value("spread_skill", found) == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def report(shared_evaluation: Any, tmp_path_factory: pytest.TempPathFactory) -> Report:
    out = str(tmp_path_factory.mktemp("ensemble"))
    return run_forecast(shared_evaluation.config(out=out, num_seeds=2))


def value(report: Report, row: str, metric: str, horizon: str = "mid") -> float:
    found = find_row(report.rows, horizon=horizon, row=row, metric=metric)
    assert found is not None
    return found.value


def test_a_report_has_the_energy_score_of_every_row_that_no_truth_chose(report: Report) -> None:
    found = {row.row for row in report.rows if row.metric == "energy_score"}
    assert found == {"copy_last", "discriminative", "mean", "samples", "reconstruction", "present"}
    assert found <= set(ENSEMBLE_ROWS)
    assert value(report, "present", "energy_score") == 0
    assert (
        value(report, "copy_last", "energy_score")
        > value(report, "copy_last", "energy_score", "short")
        > 0
    )
    for metric in ("energy_score", "spread_skill", "outside_share"):
        row = find_row(report.rows, horizon="mid", row="samples", metric=metric)
        assert row is not None and len(row.by_seed) == 2 and row.by_seed[0] != row.by_seed[1]
        assert row.interval_low is not None and row.interval_high is not None
        assert row.interval_low <= row.value <= row.interval_high


def test_a_report_has_a_rank_histogram_of_each_horizon(report: Report) -> None:
    for horizon in ("short", "mid"):
        found = [entry for entry in report.rank_histogram if entry["horizon"] == horizon]
        assert [entry["rank"] for entry in found] == list(range(7))
        assert sum(entry["share"] for entry in found) == pytest.approx(1)
        assert all(e["interval_low"] <= e["share"] <= e["interval_high"] for e in found)
    ends = found[0]["share"] + found[-1]["share"]
    row = find_row(report.rows, horizon="mid", row="samples", metric="outside_share")
    assert row is not None and row.by_seed[0] == pytest.approx(ends)  # of the first seed


def test_best_and_mean_of_k_meet_at_one_sample_and_end_at_their_rows(
    shared_evaluation: Any, tmp_path: Path
) -> None:
    single = run_forecast(shared_evaluation.config(out=str(tmp_path)))
    for horizon in ("short", "mid"):
        curve = [point for point in single.best_of_k if point["horizon"] == horizon]
        assert curve[-1]["feature_loss"] == pytest.approx(
            value(single, "best", "feature_loss", horizon)
        )
        assert curve[-1]["mean_feature_loss"] == pytest.approx(
            value(single, "mean", "feature_loss", horizon), rel=1e-5
        )
        assert curve[0]["feature_loss"] == pytest.approx(curve[0]["mean_feature_loss"], rel=1e-5)
        for prefix in ("", "mean_"):
            for point in curve:
                low, high = (point[f"{prefix}interval_{end}"] for end in ("low", "high"))
                assert low <= point[f"{prefix}feature_loss"] <= high


def test_neither_batches_nor_a_second_run_change_a_number(
    shared_evaluation: Any, report: Report, tmp_path: Path
) -> None:
    again = run_forecast(shared_evaluation.config(out=str(tmp_path), num_seeds=2, batch_windows=5))
    assert json.dumps(again.rank_histogram) == json.dumps(report.rank_histogram)
    for row in report.rows:
        if row.metric in ("energy_score", "spread_skill", "outside_share"):
            assert value(again, row.row, row.metric, row.horizon) == pytest.approx(
                row.value, rel=1e-5
            )


def test_one_sample_has_no_spread_and_no_ranks(shared_evaluation: Any, tmp_path: Path) -> None:
    single = run_forecast(shared_evaluation.config(out=str(tmp_path), num_samples=1))
    assert single.rank_histogram == []
    assert find_row(single.rows, horizon="mid", row="samples", metric="energy_score") is None
    assert "The samples and what came" not in (tmp_path / "report.html").read_text()
