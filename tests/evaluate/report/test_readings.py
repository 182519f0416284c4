"""What the page says of its tables is what their numbers say: a win, a tie, nothing to say."""

import numpy as np
import pytest

from deltatok.evaluate.forecast.sequences import Score, SequenceScores
from deltatok.evaluate.report import readings
from deltatok.evaluate.report.paper_rows import PaperComparison
from deltatok.evaluate.report.rows import ReportRow


def row(name: str, value: float, *bounds: float, metric: str = "miou") -> ReportRow:
    low, high = bounds or (None, None)
    return ReportRow(
        dataset="d",
        horizon="mid",
        row=name,
        metric=metric,
        value=value,
        interval_low=low,
        interval_high=high,
    )


def read(rows: list[ReportRow], scores: SequenceScores | None = None) -> str:
    return readings.read_scores(rows, scores or SequenceScores())


def test_the_winner_is_named_with_its_lead() -> None:
    rows = [
        row("copy_last", 0.28, 0.26, 0.32),
        row("discriminative", 0.514, 0.46, 0.57),
        row("mean", 0.33, 0.31, 0.37),
        row("best", 0.634, 0.6, 0.67),
        row("reconstruction", 0.7),  # has seen the future: cannot win
        row("present", 0.76),
    ]
    assert read(rows) == (
        "mIoU %, mid: Best sample wins with 63.4 [60.0,\u00a067.0], 12.0 points ahead of "
        "Discriminative, 51.4 [46.0,\u00a057.0]. Of the forecasts that are one answer: "
        "Discriminative wins with 51.4 [46.0,\u00a057.0], 18.4 points ahead of Mean of samples, "
        "33.0 [31.0,\u00a037.0]."
    )


@pytest.mark.parametrize(("noise", "is_sure"), [(0.0, True), (0.6, False)])
def test_the_lead_has_the_interval_of_pairs(noise: float, is_sure: bool) -> None:
    rng = np.random.default_rng(0)
    scores, losses = SequenceScores(), rng.uniform(0.5, 4.0, 40)  # clips differ more than rows do
    noises = rng.standard_normal(40)
    gaps = 0.1 + noise * (noises - noises.mean())
    for i, (loss, gap) in enumerate(zip(losses, gaps, strict=True)):
        scores.windows[f"clip {i}"] = 1
        for name, value in (("best", loss), ("discriminative", loss + gap)):
            scores.add(Score("mid", name, "feature_loss"), 0, f"clip {i}", value, 1)
    rows = [
        row("best", float(losses.mean()), metric="feature_loss"),
        row("discriminative", float((losses + gaps).mean()), metric="feature_loss"),
    ]
    text = read(rows, scores)
    assert "Best sample wins with" in text
    assert "ahead of Discriminative" in text
    assert ("that is not sure" in text) == (not is_sure)
    if is_sure:
        assert "0.1 [0.1,\u00a00.1] ahead" in text


def test_a_tie_has_no_winner() -> None:
    text = read([row("mean", 0.5), row("copy_last", 0.50001), row("best", 0.4)])  # as it is shown
    tie = "a tie, Copy last (lower bound) and Mean of samples have the same 50.0."
    assert text == f"mIoU %, mid: {tie} Of the forecasts that are one answer: {tie}"


@pytest.mark.parametrize(
    ("metric", "lead"), [("rmse", "0.5 m ahead"), ("feature_loss", "0.5 ahead")]
)
def test_of_errors_the_smaller_wins(metric: str, lead: str) -> None:
    rows = [row("mean", 1.5, metric=metric), row("copy_last", 2.0, metric=metric)]
    text = read(rows)
    assert "Mean of samples wins with 1.5" in text
    assert lead in text


def test_without_forecasts_nothing_is_said() -> None:
    assert read([]) == ""
    assert read([row("present", 0.5)]) == ""
    assert "Best sample alone was scored, 50.0" in read([row("best", 0.5)])
    assert readings.read_modes([], {}, num_samples=2) == ""
    assert readings.read_calibration({"overlap": 0.5}) == readings.read_bins({"overlap": 0.5}) == ""
    assert readings.read_steps({}) == readings.read_probes({}) == readings.read_best_of_k([]) == ""
    assert readings.read_classes([], ()) == ""


def test_the_best_sample_is_held_against_the_papers() -> None:
    same = PaperComparison(dataset="kitti", differences=())
    other = PaperComparison(dataset="kitti", differences=("frames seen: 3, paper 4",))
    better = readings.read_paper([row("best", 3.5, metric="rmse")], same)
    assert better.startswith("This run's best sample is 0.21 m better at mid: 3.5 against 3.71")
    assert "0.29 m worse" in readings.read_paper([row("best", 4.0, metric="rmse")], same)
    assert "is equal" in readings.read_paper([row("best", 3.71, metric="rmse")], same)
    assert "no best sample" in readings.read_paper([], same)
    text = readings.read_paper([row("best", 1.0, metric="rmse")], other)
    assert text.startswith("No row of this run may stand beside them.")
    assert "0.36 m better at mid: 3.71 against 4.07 of its DINO-world" in text


def test_classes_are_named_by_what_is_gained() -> None:
    ious: dict[str, list[float | None]] = {
        "discriminative": [0.9, 0.5, 0.2, None],
        "best": [0.95, 0.4, 0.45, None],
    }
    entries = [{"horizon": "mid", "row": name, "iou": found} for name, found in ious.items()]
    assert readings.read_classes(entries, ("ground", "disc")) == (
        "Best sample is best on ground (95.0) and worst on disc (40.0); it gains most over "
        "Discriminative on class 2, 25.0 points."
    )
    entries[1]["iou"] = [0.1, 0.1, 0.1, None]
    assert "it gains on no class over Discriminative" in readings.read_classes(entries, ())


def test_modes_are_held_against_true_draws() -> None:
    rows = [
        row("samples", 0.59, metric="mode_recall"),
        row("discriminative", 0.219, metric="mode_recall"),
        row("discriminative", 0.633, metric="mode_precision"),
        row("present", 0.31, metric="mode_recall"),
        row("samples", 0.477, metric="mode_precision"),
        row("present", 0.95, metric="mode_precision"),
    ]
    found = {
        "mid": {
            "true_draws": {"mode_recall": 0.9, "mode_precision": 1.0},
            "frequency_distance": 0.3,
            "frequency_distance_of_true_draws": 0.1,
            "reliability": [
                {"modes": 1, "frequency": 0.1, "probability": 0.15},
                {"modes": 2, "frequency": 0.8, "probability": 0.5},
            ],
        }
    }
    assert readings.read_modes(rows, found, num_samples=20) == (
        "Mid, % of the possible futures hit | of the forecasts that are one: the samples "
        "59.0 | 47.7; the discriminative forecast 21.9 | 63.3; the true frames as the head reads "
        "them 31.0 | 95.0; 20 true draws 90.0 | 100.0."
    )
    assert readings.read_modes(rows[:1], found, num_samples=20) == ""  # no recall alone
    assert "mid: further than chance alone would leave them" in readings.read_calibration(found)
    assert "80.0 % of the samples hit have a probability of 50.0 %" in readings.read_bins(found)


def test_frequencies_are_off_in_two_ways() -> None:
    numbers = {"frequency_distance": 0.648, "impossible_mass": 0.487, "excess_mass": 0.161}
    rows = [row("samples", value, metric=metric) for metric, value in numbers.items()]
    text = readings.read_frequencies(rows, {}, num_samples=20)
    assert text == (
        "Mid: the samples' frequencies are 64.8 % off; 48.7 % of the samples are no possible "
        "future, and possible ones have 16.1 % too much."
    )
    rows += [row("samples", 0.41, metric="likeliest_share")]
    rows += [row("samples", 0.7, metric="likeliest_probability")]
    found = {"mid": {"frequency_distance_of_true_draws": 0.123}}
    text = readings.read_frequencies(rows, found, num_samples=20)
    assert "16.1 % too much (chance alone gives 20 true draws 12.3 %)" in text
    assert "The likeliest future comes too rarely: it is 41.0 % of the hits, by the" in text
    assert readings.read_frequencies([], {}, num_samples=20) == ""


@pytest.mark.parametrize(
    ("swap", "copy", "words"),
    [
        (7.94, 0.215, ("needs the right", "is better than copying")),
        (1.01, 1.2, ("ignores its", "is no better than copying")),
    ],
)
def test_probes_say_whether_the_tokenizer_is_alive(
    swap: float, copy: float, words: tuple[str, ...]
) -> None:
    text = readings.read_probes({"z_swap_ratio": swap, "copy_last_ratio": copy})
    assert all(word in text for word in words)


def test_losses_are_read_from_first_to_last() -> None:
    assert readings.read_steps({"best": [0.1, 0.2], "present": [0.0, 0.0]}) == (
        "From the first step to the last: Best sample 0.1 to 0.2 (2.0 times)."
    )
    curve = [
        {"horizon": "mid", "k": k, "feature_loss": v, "mean_feature_loss": m}
        for k, v, m in ((1, 0.4, 0.4), (2, 0.25, 0.35), (3, 0.2, 0.3))
    ]
    assert readings.read_best_of_k(curve) == (
        "Mid: the best of 3 has 50 % less loss than one sample; half of that is there with 2. "
        "Their mean, which no truth chooses, has 25 % less."
    )
    flat = [point | {"feature_loss": 0.4} for point in curve]
    assert "all alike" in readings.read_best_of_k(flat)
