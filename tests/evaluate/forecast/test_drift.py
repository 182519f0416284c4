"""Rollouts of many steps: each step's scores against plain computations, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deltatok.evaluate.forecast.drift import drift_rows
from deltatok.evaluate.forecast.intervals import draw_weights
from deltatok.evaluate.forecast.rollout import HorizonForecast
from deltatok.evaluate.forecast.run import run_forecast
from deltatok.evaluate.report.drift import drift_section, read_drift, read_drift_mious
from deltatok.evaluate.report.rows import DRIFT_ROWS, find_value
from deltatok.evaluate.report.write import Report
from deltatok.shards.errors import CacheMismatch, UsageError
from deltatok.shards.patches.reader import PatchShards

STEPS = 3
"""Windows have 7 frames, of which 4 are seen."""


@pytest.fixture(scope="module")
def report(shared_evaluation: Any, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of rollouts that are as long as the mid horizon, on the same windows."""
    out = str(tmp_path_factory.mktemp("drift"))
    return run_forecast(shared_evaluation.config(out=out, drift_steps=STEPS))


def curve(report: Report, row: str, metric: str, key: str = "value") -> list[float]:
    assert report.drift is not None
    found = [e for e in report.drift["rows"] if (e["row"], e["metric"]) == (row, metric)]
    assert [entry["step"] for entry in found] == list(range(1, STEPS + 1))
    return [entry[key] for entry in found]


def test_steps_of_the_mid_horizon_are_those_of_the_report(report: Report) -> None:
    by_step = report.probes["feature_loss_by_step"]
    for row in (
        "copy_last",
        "discriminative",
        "mean",
        "reconstruction",
        "reconstruction_open_loop",
    ):
        assert curve(report, row, "feature_loss") == pytest.approx(by_step[row], rel=1e-6), row
        wanted = find_value(report.rows, horizon="mid", row=row, metric="miou")
        assert curve(report, row, "miou")[-1] == pytest.approx(wanted), row
    assert curve(report, "best", "feature_loss")[-1] == pytest.approx(by_step["best"][-1])
    assert curve(report, "present", "feature_loss") == [0] * STEPS
    assert report.drift is not None
    assert (report.drift["steps"], report.drift["num_windows"], report.drift["num_clips"]) == (
        3,
        5,
        3,
    )
    assert report.drift["step_s"] == pytest.approx(report.step_s)


def copied(tokens: NDArray[np.float16]) -> NDArray[np.float64]:
    """Smooth-L1 loss (beta 0.1) of copying frame 3, of windows (W, T, N, D): (W, STEPS)."""
    off = np.abs(tokens[:, 4:].astype(np.float64) - tokens[:, 3:4].astype(np.float64))
    return np.where(off < 0.1, off**2 / 0.2, off - 0.05).mean(axis=(2, 3))


def test_copying_loses_at_every_step_what_it_is_off_and_grows_by_the_mean_slope(
    shared_evaluation: Any, report: Report
) -> None:
    cache = PatchShards(shared_evaluation.path("patches"))
    losses = copied(cache.tokens(list(range(5))))
    assert curve(report, "copy_last", "feature_loss") == pytest.approx(
        losses.mean(axis=0), rel=1e-5
    )
    order = list(dict.fromkeys(cache.clip_index.tolist()))  # of their first windows
    clips = np.stack([losses[cache.clip_index == clip].sum(axis=0) for clip in order])
    counts = np.bincount(cache.clip_index)[order]
    weights = draw_weights(3, "sequences", 0)
    drawn = (weights @ clips) / (weights @ counts)[:, None]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    assert curve(report, "copy_last", "feature_loss", "interval_low") == pytest.approx(
        low, rel=1e-4
    )
    assert curve(report, "copy_last", "feature_loss", "interval_high") == pytest.approx(
        high, rel=1e-4
    )
    assert report.drift is not None
    (growth,) = (e for e in report.drift["growth"] if e["row"] == "copy_last")
    slopes = (drawn[:, -1] - drawn[:, 0]) / (STEPS - 1)  # of the same draws
    wanted = [(losses[:, -1] - losses[:, 0]).mean() / 2, *np.quantile(slopes, [0.025, 0.975])]
    found = [growth[key] for key in ("value", "interval_low", "interval_high")]
    assert found == pytest.approx(wanted, rel=1e-4)


def test_the_best_is_chosen_at_every_step_and_the_sample_is_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2, 5, 4, 3, 6, generator=generator)
    truth = torch.randn(2, 4, 3, 6, generator=generator)
    plain = HorizonForecast(truth=truth, rows={"mean": truth, "best": truth}, samples=samples)
    rows = drift_rows(plain)
    assert torch.equal(rows["sample"], samples[:, 0])
    off = torch.nn.functional.smooth_l1_loss(
        samples, truth[:, None].expand_as(samples), beta=0.1, reduction="none"
    ).mean(dim=(3, 4))
    chosen = set()
    for window in range(2):
        for step in range(4):
            best = int(off[window, :, step].argmin())
            chosen.add(best)
            assert torch.equal(rows["best"][window, step], samples[window, best, step])
    assert len(chosen) > 1


def test_neither_batches_nor_rollouts_change_other_numbers(
    shared_evaluation: Any, report: Report, tmp_path: Path
) -> None:
    without = run_forecast(shared_evaluation.config(out=str(tmp_path / "a"), drift_steps=0))
    assert without.drift is None
    assert (without.rows, without.probes, without.best_of_k) == (
        report.rows,
        report.probes,
        report.best_of_k,
    )
    config = shared_evaluation.config(out=str(tmp_path / "b"), drift_steps=STEPS, batch_windows=5)
    again = run_forecast(config)
    for row in DRIFT_ROWS:
        if not row.startswith("dinoworld"):
            assert curve(again, row, "feature_loss") == pytest.approx(
                curve(report, row, "feature_loss"), rel=1e-5
            )


def test_windows_that_are_too_short_have_no_long_rollouts(
    shared_evaluation: Any, tmp_path: Path
) -> None:
    report = run_forecast(shared_evaluation.config(out=str(tmp_path)))  # 10 steps, as by default
    assert report.config["drift_steps"] == 10
    assert report.drift is None
    assert json.loads((tmp_path / "report.json").read_text())["drift"] is None
    assert "Rollouts of" not in (tmp_path / "report.html").read_text()


def test_long_windows_may_lie_in_a_cache_of_their_own(
    shared_evaluation: Any, make: Any, report: Report, tmp_path: Path
) -> None:
    tokens = np.random.default_rng(5).normal(size=(5, 7, 6, 32))
    folder = tmp_path / "long"
    make.write_cache(folder, policy="uniform", backbone="aaaa", tokens=tokens)
    config = {"drift_steps": 3, "drift_patches": str(folder), "mid_steps": 2}
    labels = shared_evaluation.path("labels")
    found = run_forecast(
        shared_evaluation.config(out=str(tmp_path / "a"), **config, drift_labels=labels)
    )
    losses = copied(tokens.astype(np.float16)).mean(axis=0)
    assert curve(found, "copy_last", "feature_loss") == pytest.approx(losses, rel=1e-5)
    assert len(curve(found, "sample", "miou")) == 3
    assert found.drift is not None
    assert found.drift["fingerprint"] == PatchShards(folder).info.fingerprint
    unlabelled = run_forecast(shared_evaluation.config(out=str(tmp_path / "b"), **config))
    assert unlabelled.drift is not None
    assert {entry["metric"] for entry in unlabelled.drift["rows"]} == {"feature_loss"}
    assert unlabelled.rows == found.rows
    page = (tmp_path / "b" / "report.html").read_text()
    assert "<h2>Rollouts of 3 steps</h2>" in page
    assert "mIoU % ↑, step" not in page


def test_long_windows_of_no_use_are_refused(
    shared_evaluation: Any, make: Any, write_evaluation_cache: Any, tmp_path: Path
) -> None:
    def run(**settings: Any) -> None:
        run_forecast(shared_evaluation.config(out=str(tmp_path / "out"), **settings))

    own = shared_evaluation.path("patches")
    with pytest.raises(UsageError, match=r"windows of 7 frames.* = 14 frames or more: extract"):
        run(drift_patches=own)
    make.write_cache(tmp_path / "other", policy="uniform", backbone="bbbb")
    with pytest.raises(CacheMismatch, match=r"backbone\.weights_sha256"):
        run(drift_patches=str(tmp_path / "other"), drift_steps=3)
    write_evaluation_cache(tmp_path / "targets", tmp_path / "labels")
    with pytest.raises(UsageError, match="sampling policy evaluation; wanted uniform"):
        run(drift_patches=str(tmp_path / "targets"), drift_steps=3)
    with pytest.raises(UsageError, match="no such folder"):
        run(drift_patches=own, drift_steps=3, drift_labels=str(tmp_path / "none"))
    with pytest.raises(UsageError, match="--drift-labels: of --drift-patches"):
        run(drift_labels=own)
    with pytest.raises(UsageError, match="--drift-patches with --drift-steps 0"):
        run(drift_patches=own, drift_steps=0)
    with pytest.raises(UsageError, match="drift_steps: got -1"):
        run(drift_steps=-1)


def test_a_single_step_has_no_growth(shared_evaluation: Any, tmp_path: Path) -> None:
    report = run_forecast(shared_evaluation.config(out=str(tmp_path), drift_steps=1))
    assert report.drift is not None
    assert report.drift["growth"] == []
    assert "<h2>Rollouts of 1 step" in (tmp_path / "report.html").read_text()


def test_the_page_says_when_a_forecast_is_no_better_than_copying() -> None:
    losses = {
        "copy_last": [0.1, 0.2, 0.3],
        "sample": [0.05, 0.2, 0.4],
        "reconstruction": [0.01] * 3,
    }
    rows = [
        {"row": row, "step": step, "metric": "feature_loss", "value": value, **BOUNDS}
        for row, values in losses.items()
        for step, value in enumerate(values, start=1)
    ]
    growth = [{"row": row, "value": (v[-1] - v[0]) / 2, **BOUNDS} for row, v in losses.items()]
    found = {"steps": 3, "rows": rows, "growth": growth}
    assert read_drift(found) == (
        "A step adds to the feature loss, up to step 3: the tokenizer alone, closed loop 0; one "
        "sample 0.175; copying the last frame 0.1. One sample is no better than copying at step 2 "
        "for the first time."
    )
    assert read_drift_mious(found) == read_drift(None) == read_drift_mious(None) == ""
    section = drift_section(found)
    assert section is not None and section.mious is None
    assert section.losses.body[1] == ["One sample", "0.05", "0.2", "0.4", "0.175"]


BOUNDS = {"interval_low": None, "interval_high": None}
