"""Mode recall and precision of a forecast evaluation, several seeds, and intervals."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from deltatok.evaluate.forecast.config import ForecastConfig
from deltatok.evaluate.forecast.modes import KnownFutures, ModeScorer, write_futures
from deltatok.evaluate.forecast.rollout import HorizonForecast, WindowBatch
from deltatok.evaluate.forecast.run import run_forecast
from deltatok.evaluate.forecast.scores import class_maps
from deltatok.evaluate.forecast.sequences import SequenceScores
from deltatok.evaluate.forecast.windows import UniformWindows
from deltatok.evaluate.report.rows import (
    FREQUENCY_METRICS,
    MODE_METRICS,
    find_row,
    find_value,
)
from deltatok.evaluate.report.write import Report, report_json
from deltatok.shards.errors import UsageError
from deltatok.shards.evaluation.targets import windows_of_clips
from deltatok.shards.patches.reader import PatchShards
from deltatok.train.models.heads import SegmentationHead

SIZE = (10, 14)


@pytest.fixture(scope="module")
def known(shared_evaluation: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Futures of every window: what the head reads from the true target (0.6), and from the frame
    the short horizon sees last (0.4), which is at the same time what `copy_last` shows there."""
    folder = tmp_path_factory.mktemp("known")
    cache = PatchShards(shared_evaluation.path("patches"))
    head = SegmentationHead.from_pretrained(shared_evaluation.path("head"))
    clips: dict[str, dict[tuple[int, int], KnownFutures]] = {}
    for index in range(len(cache)):
        frames = cache.frame_index([index])[0].tolist()
        tokens = torch.tensor(cache.tokens([index])[0])
        with torch.no_grad():
            maps = class_maps(head, tokens[[6, 5]], grid=cache.grid, size=SIZE)
        found = KnownFutures(
            probability=np.array([0.6, 0.4]),
            classes=maps,
            background=-1,
        )
        pairs = {(frames[3], frames[6]): found, (frames[5], frames[6]): found}
        clips.setdefault(cache.keys[int(cache.clip_index[index])], {}).update(pairs)
    for key, futures in clips.items():
        write_futures(folder, key, futures, background=-1)
    return str(folder)


@pytest.fixture(scope="module")
def report(shared_evaluation: Any, known: str, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """An evaluation with futures and two seeds; class maps are one future if they are equal."""
    out = str(tmp_path_factory.mktemp("modes"))
    return run_forecast(
        shared_evaluation.config(out=out, futures=known, mode_overlap=1.0, num_seeds=2)
    )


def share_of_windows_whose_futures_look_alike(known: str) -> float:
    alike = []
    for path in Path(known).rglob("*.npz"):
        with np.load(path) as file:
            pairs = file["classes"].reshape(-1, 2, *SIZE)  # short and mid of every window
        alike += [(one == other).all() for one, other in pairs]
    return float(np.mean(alike))


def value(report: Report, horizon: str, row: str, metric: str) -> float:
    found = find_value(report.rows, horizon=horizon, row=row, metric=metric)
    assert found is not None
    return found


def test_forecasts_of_known_futures_have_known_recall_and_precision(
    report: Report, known: str
) -> None:
    merged = share_of_windows_whose_futures_look_alike(known)
    assert merged < 0.5
    for row, probability in (("present", 0.6), ("copy_last", 0.4)):
        weighted = merged + (1 - merged) * probability
        assert value(report, "short", row, "mode_precision") == 1
        recall = value(report, "short", row, "mode_recall")
        assert recall == pytest.approx(merged + (1 - merged) * 0.5)
        assert value(report, "short", row, "mode_recall_weighted") == pytest.approx(weighted)


def test_every_sample_counts_at_its_last_step(shared_evaluation: Any, known: str) -> None:
    config = shared_evaluation.config(futures=known, mode_overlap=1.0)
    cache = PatchShards(config.patches)
    head = SegmentationHead.from_pretrained(config.head)
    x = torch.tensor(cache.tokens([0]))
    other = 100 * torch.ones_like(x[:, 0])
    last = torch.stack([x[:, 6], x[:, 5], other], dim=1)[:, :, None]  # both futures, and none
    samples = torch.cat([torch.zeros_like(last).expand(-1, -1, 2, -1, -1), last], dim=2)
    forecast = HorizonForecast(
        truth=x[:, 4:],
        rows={"present": samples[:, 0], "mean": samples[:, 2]},
        samples=samples,
    )
    batch = WindowBatch(indices=(0,), names=((0,),), x=x, times=torch.zeros(1, 7), z=x[..., 0])
    scores, sequence = SequenceScores(), cache.keys[int(cache.clip_index[0])]
    with torch.no_grad():
        scorer = ModeScorer(config, cache, head, UniformWindows(config, cache, None))
        scorer.add("mid", forecast, batch, seed=0, scores=scores)
    found = {score[1:]: part[0][sequence][0, 0] for score, part in scores.parts.items()}
    assert found["samples", "mode_recall"] == 1
    assert found["samples", "mode_precision"] == pytest.approx(2 / 3)
    assert found["present", "mode_precision"] == 1
    assert found["mean", "mode_precision"] == 0


def test_recall_and_precision_are_told_as_pairs(report: Report) -> None:
    found = report_json(report)["mode_pairs"]
    pairs = {(pair["horizon"], pair["row"]): pair for pair in found["pairs"]}
    assert {row for _, row in pairs} == {"copy_last", "discriminative", "mean", "samples"} | {
        "reconstruction",
        "present",
    }
    for (horizon, row), pair in pairs.items():
        assert pair["recall"] == value(report, horizon, row, "mode_recall")
        assert pair["precision"] == value(report, horizon, row, "mode_precision")
        assert pair["recall_low"] <= pair["recall"] <= pair["recall_high"]
        assert pair["precision_low"] <= pair["precision"] <= pair["precision_high"]
    assert found["text"].startswith("mode recall | mode precision, mid-term %: All samples 0.0 [")
    page = (Path(report.config["out"]) / "report.html").read_text()
    for part in re.findall(r"<table>.*?</table>|<p.*?</p>", page, re.DOTALL):
        assert ("mode recall" in part.lower()) == ("mode precision" in part.lower())


def test_the_distance_of_frequencies_has_its_two_parts(report: Report, known: str) -> None:
    merged = share_of_windows_whose_futures_look_alike(known)
    wanted = {
        "frequency_distance": (1 - merged) * 0.4,  # of one forecast, of probability 0.6
        "impossible_mass": 0.0,
        "excess_mass": (1 - merged) * 0.4,
        "likeliest_share": 1.0,
        "likeliest_probability": merged + (1 - merged) * 0.6,
    }
    for metric, number in wanted.items():
        assert value(report, "short", "present", metric) == pytest.approx(number), metric
    for metric, number in (("frequency_distance", 1), ("impossible_mass", 1), ("excess_mass", 0)):
        assert value(report, "mid", "samples", metric) == pytest.approx(number)
    # A share of no hits is no number.
    assert find_value(report.rows, horizon="mid", row="samples", metric="likeliest_share") is None


def test_random_models_hit_no_future(report: Report) -> None:
    """Random weights draw no picture that equals a future to the pixel."""
    for row in ("samples", "discriminative"):
        assert value(report, "mid", row, "mode_precision") == 0
        assert value(report, "mid", row, "mode_recall") == 0


def test_calibration_is_in_the_probes_and_on_the_page(report: Report, known: str) -> None:
    modes, merged = report.probes["modes"], share_of_windows_whose_futures_look_alike(known)
    assert modes["overlap"] == 1
    for horizon in ("short", "mid"):
        assert modes[horizon]["modes_per_window"] == 2 - merged
        assert sum(part["modes"] for part in modes[horizon]["reliability"]) == 2 * 5 * (2 - merged)
    assert modes["mid"]["frequency_distance"] == pytest.approx(1)  # no sample hits a future
    page = (Path(report.config["out"]) / "report.html").read_text()
    assert "<h2>Modes</h2>" in page
    assert "6 true draws (expected)" in page


def test_rows_of_samples_are_means_over_seeds(
    shared_evaluation: Any, report: Report, tmp_path: Path
) -> None:
    single = [
        run_forecast(shared_evaluation.config(out=str(tmp_path / str(seed)), seed=seed))
        for seed in (0, 1)
    ]
    for row in report.rows:
        if row.metric in (*MODE_METRICS, *FREQUENCY_METRICS):
            continue
        alone = [value(one, row.horizon, row.row, row.metric) for one in single]
        if row.row in ("best", "mean", "regressor_null", "samples"):
            assert row.by_seed == pytest.approx(alone, rel=1e-5)
            assert row.metric == "miou" or alone[0] != alone[1]
        else:
            assert row.by_seed == []
        assert row.value == pytest.approx(np.mean(alone), rel=1e-5)


def test_probes_and_curve_are_those_of_the_first_seed(
    shared_evaluation: Any, report: Report, tmp_path: Path
) -> None:
    single = run_forecast(shared_evaluation.config(out=str(tmp_path)))
    assert report.best_of_k == single.best_of_k
    assert report.probes["sample_spread"] == single.probes["sample_spread"]


def test_intervals_hold_the_value_and_do_not_change_between_runs(
    shared_evaluation: Any, report: Report, known: str, tmp_path: Path
) -> None:
    again = run_forecast(
        shared_evaluation.config(
            out=str(tmp_path), futures=known, mode_overlap=1.0, num_seeds=2, batch_windows=5
        )
    )
    for row in report.rows:
        assert row.interval_low is not None and row.interval_high is not None
        assert row.interval_low <= row.interval_high
        found = find_row(again.rows, horizon=row.horizon, row=row.row, metric=row.metric)
        assert found is not None
        assert (found.interval_low, found.interval_high) == pytest.approx(
            (row.interval_low, row.interval_high), rel=1e-5
        )
    losses = find_row(report.rows, horizon="mid", row="copy_last", metric="feature_loss")
    assert losses is not None and losses.interval_low is not None
    assert losses.interval_low < losses.value < (losses.interval_high or 0)


def test_noise_scale_zero_makes_all_samples_alike(shared_evaluation: Any, tmp_path: Path) -> None:
    found = run_forecast(shared_evaluation.config(out=str(tmp_path), noise_scale=0.0))
    assert found.probes["sample_spread"]["mid"] == pytest.approx(0, abs=1e-5)


def test_futures_of_a_class_that_the_head_does_not_know_are_refused(
    shared_evaluation: Any, known: str, tmp_path: Path
) -> None:
    for path in Path(known).rglob("*.npz"):
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        arrays["classes"][0, 0, 0] = 77
        target = tmp_path / path.relative_to(known)
        target.parent.mkdir(parents=True, exist_ok=True)
        np.savez(target, **arrays)
    with pytest.raises(UsageError, match="futures have class 77, the head knows 0 to 3"):
        run_forecast(shared_evaluation.config(out=str(tmp_path / "out"), futures=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"futures": "x", "head": None, "labels": None}, "--futures without --head"),
        ({"futures": "nowhere"}, "no such folder"),
        ({"mode_overlap": 0.0}, "mode_overlap"),
        ({"noise_scale": -1.0}, "noise_scale"),
        ({"num_seeds": 0}, "num_seeds"),
    ],
)
def test_settings_of_no_use_are_refused(
    shared_evaluation: Any, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        run_forecast(shared_evaluation.config(out=str(tmp_path), **change))


def test_report_json_is_strict_json(report: Report) -> None:
    text = (Path(report.config["out"]) / "report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in report.json"))


HALVES = {0: np.s_[:, :17], 1: np.s_[:, 17:]}
"""Of class maps 20 x 34, what left and right crops are scored on."""


def read_half(head: SegmentationHead, tokens: torch.Tensor, *, second: bool) -> NDArray[np.uint8]:
    """What a head reads from one of two overlapping crops (N, D), for its half (20, 17)."""
    with torch.no_grad():
        logits = head(tokens.T.reshape(1, 32, 3, 3).float())
    square = F.interpolate(logits, size=(20, 20), mode="bilinear", align_corners=False)
    classes = square.argmax(dim=1)[0, :, 3:] if second else square.argmax(dim=1)[0, :, :17]
    return classes.numpy().astype(np.uint8)


@pytest.mark.parametrize("named_by", ["target", "sequence"])
def test_crops_of_an_evaluation_cache_are_held_against_their_half_of_known_futures(
    write_evaluation_cache: Any, make: Any, tmp_path: Path, named_by: str
) -> None:
    """Futures of whole frames: what the head reads from both crops' true targets (0.6), and from
    the frame that `copy_last` shows at the short horizon (0.4)."""
    write_evaluation_cache(tmp_path / "patches", tmp_path / "labels")
    cache = PatchShards(tmp_path / "patches")
    make.write_models(tmp_path, cache.info.identity)
    head = SegmentationHead.from_pretrained(tmp_path / "head")
    alike: list[bool] = []
    files: dict[str, dict[tuple[int, int], KnownFutures]] = {}
    for key, crops in windows_of_clips(cache).items():  # left, right
        classes = np.empty((2, 20, 34), np.uint8)
        for crop, window in enumerate(crops):
            tokens = torch.tensor(cache.tokens([window])[0])
            for future, frame in enumerate((6, 5)):
                half = read_half(head, tokens[frame], second=crop == 1)
                classes[future][HALVES[crop]] = half
            alike.append(bool((classes[0][HALVES[crop]] == classes[1][HALVES[crop]]).all()))
        known = KnownFutures(probability=np.array([0.6, 0.4]), classes=classes, background=-1)
        frames = cache.frame_index([crops[0]])[0].tolist()
        pairs = {(frames[3], frames[6]): known, (frames[5], frames[6]): known}
        name = key if named_by == "target" else key.rsplit("/", 1)[0]
        files.setdefault(name, {}).update(pairs)
    for name, pairs in files.items():
        write_futures(tmp_path / "futures", name, pairs, background=-1)
    folders = ("patches", "labels", "tokenizer", "world", "discriminative", "head", "futures")
    config = ForecastConfig(
        **{folder: str(tmp_path / folder) for folder in folders},
        out=str(tmp_path / "out"),
        num_samples=3,
        num_pictures=0,
        mode_overlap=1.0,
        device="cpu",
    )
    report, merged = run_forecast(config), float(np.mean(alike))
    assert merged < 0.5
    for row, probability in (("present", 0.6), ("copy_last", 0.4)):
        assert value(report, "short", row, "mode_precision") == 1
        recall = merged + (1 - merged) * 0.5
        assert value(report, "short", row, "mode_recall") == pytest.approx(recall)
        weighted = merged + (1 - merged) * probability
        assert value(report, "short", row, "mode_recall_weighted") == pytest.approx(weighted)
    assert value(report, "mid", "samples", "mode_precision") == 0  # of random models
    text = (tmp_path / "out" / "sequences.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert sorted(line["sequence"] for line in lines) == ["a", "town/b"]
    assert all("mode_recall" in line["scores"]["mid"]["samples"] for line in lines)


def test_a_target_without_futures_is_named(
    write_evaluation_cache: Any, make: Any, tmp_path: Path
) -> None:
    write_evaluation_cache(tmp_path / "patches", tmp_path / "labels")
    make.write_models(tmp_path, PatchShards(tmp_path / "patches").info.identity)
    (tmp_path / "futures").mkdir()
    folders = ("patches", "labels", "tokenizer", "head", "futures", "out")
    paths = {folder: str(tmp_path / folder) for folder in folders}
    with pytest.raises(UsageError, match=r"clip \S+/0000.9: no futures"):
        run_forecast(ForecastConfig(**paths, device="cpu"))
