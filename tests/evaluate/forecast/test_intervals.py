"""Scores by sequence, and bootstrap intervals: against plain computations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassJaccardIndex

from deltatok.evaluate.forecast.intervals import NUM_RESAMPLES, Resamples, draw_weights
from deltatok.evaluate.forecast.run import run_forecast
from deltatok.evaluate.forecast.scores import class_counts, confusion_matrix, squared_errors
from deltatok.evaluate.forecast.sequences import (
    Score,
    SequenceScores,
    Sums,
    read_sequences,
    sequences_jsonl,
    values,
)
from deltatok.evaluate.report.rows import find_row
from deltatok.shards.errors import UsageError


def test_class_counts_add_up_to_torchmetrics_miou() -> None:
    generator = torch.Generator().manual_seed(0)
    metric = MulticlassJaccardIndex(5, ignore_index=255)
    sums, counts = np.zeros(5), np.zeros(5)
    for _ in range(3):
        classes = torch.randint(0, 4, (9, 7), generator=generator)  # class 4 never occurs
        label = torch.randint(0, 4, (9, 7), generator=generator)
        label[:2] = 255
        metric.update(classes[None], label[None])
        found = class_counts(confusion_matrix(classes[None], label[None], num_classes=5))
        sums, counts = sums + found[0], counts + found[1]
    assert values("miou", sums, counts) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_squared_errors_add_up_to_torchmetrics_rmse() -> None:
    generator = torch.Generator().manual_seed(0)
    metric, total = MeanSquaredError(squared=False), np.zeros(2)
    for _ in range(3):
        metres, label = torch.rand(2, 1, 9, 7, generator=generator).split(1)
        label[..., :2] = 0
        metric.update(metres[label > 0], label[label > 0])
        total += squared_errors(metres, label[0])
    found = values("rmse", total[:1], total[1:])
    assert found == pytest.approx(float(metric.compute()), rel=1e-6)


def test_resampled_values_equal_scoring_the_drawn_sequences_again() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, size=(6, 4)).astype(float)
    sums = Sums(counts * rng.uniform(size=(6, 4)), counts)
    found = Resamples(6).resampled("miou", {0: sums})
    weights = draw_weights(6, "sequences", 0).astype(int)
    for resample in (0, 1, NUM_RESAMPLES - 1):
        drawn = np.repeat(np.arange(6), weights[resample])
        total, count = sums.sums[drawn].sum(axis=0), sums.counts[drawn].sum(axis=0)
        assert found[resample] == pytest.approx((total / count)[count > 0].mean())


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    losses = np.random.default_rng(1).normal(3, 1, size=(400, 1))
    found = Resamples(400).estimate("feature_loss", {0: Sums(losses, np.ones((400, 1)))})
    error = 1.96 * losses.std() / 20
    assert found.value == pytest.approx(losses.mean())
    assert found.low == pytest.approx(losses.mean() - error, abs=0.015)
    assert found.high == pytest.approx(losses.mean() + error, abs=0.015)


def test_seeds_that_disagree_widen_the_interval() -> None:
    losses, ones = np.linspace(0, 1, 50)[:, None], np.ones((50, 1))
    one = Resamples(50).estimate("feature_loss", {0: Sums(losses, ones)})
    two = Resamples(50).estimate(
        "feature_loss", {0: Sums(losses - 0.3, ones), 1: Sums(losses + 0.3, ones)}
    )
    assert two.value == pytest.approx(one.value)
    assert two.low is not None and one.low is not None
    assert two.low < one.low - 0.1  # half the resamples have one seed alone


def test_one_sequence_has_no_interval() -> None:
    found = Resamples(1).estimate("feature_loss", {0: Sums(np.ones((1, 1)), np.ones((1, 1)))})
    assert (found.value, found.low, found.high) == (1.0, None, None)


def test_rmse_is_the_root_of_the_mean_square() -> None:
    assert values("rmse", np.array([18.0]), np.array([2.0])) == 3


def test_sequences_are_read_as_they_were_written(tmp_path: Path) -> None:
    scores = SequenceScores()
    score = Score("mid", "best", "miou")
    scores.windows.update(["b", "a", "b"])
    scores.add(score, 0, "b", [1, 0, 2.5], [3, 0, 4])
    scores.add(score, 0, "b", [1, 0, 1], [1, 0, 1])
    scores.add(score, 3, "a", [0, 1, 0], [0, 2, 0])
    (tmp_path / "sequences.jsonl").write_bytes(sequences_jsonl(scores))
    found = read_sequences(tmp_path)
    assert dict(found.windows) == {"b": 2, "a": 1}
    by_seed = found.by_seed(score, ["a", "b"])
    assert by_seed[0].sums.tolist() == [[0, 0, 0], [2, 0, 3.5]]
    assert by_seed[3].counts.tolist() == [[0, 2], [0, 0]]


LINE = '{"sequence": "a", "windows": 1, "scores": {"mid": {"best": {"miou": {"0": [%s]}}}}}\n'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]\n",
        '{"sequence": "a"}\n',
        "{\n",
        LINE % "[1]",
        LINE % "[-1, 1, 1]",
        LINE % "[1000000000, 1, 1]",
        LINE % "[0, NaN, 1]",
        LINE % "[0, 1, -1]",
    ],
)
def test_a_file_without_scores_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "sequences.jsonl").write_text(text)
    with pytest.raises(UsageError, match="evaluate again"):
        read_sequences(tmp_path)


def test_a_report_can_be_scored_again_from_its_sequences(
    shared_evaluation: Any, tmp_path: Path
) -> None:
    report = run_forecast(shared_evaluation.config(out=str(tmp_path)))
    scores = read_sequences(tmp_path)
    assert dict(scores.windows) == {"a.mp4": 2, "sub/b.mp4": 1, "c.mp4": 2}
    assert len(scores.parts) == len(report.rows)
    for score in scores.parts:
        (sums,) = scores.by_seed(score, scores.windows).values()
        row = find_row(report.rows, horizon=score.horizon, row=score.row, metric=score.metric)
        assert row is not None
        assert Resamples(3).value(score.metric, sums) == pytest.approx(row.value, rel=1e-6)
