"""The forecast evaluation end to end, on a tiny cache with tiny models."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deltatok.evaluate.forecast.run import run_forecast
from deltatok.evaluate.report.rows import (
    ENSEMBLE_METRICS,
    HORIZONS,
    ROW_NAMES,
    ReportRow,
    find_value,
)
from deltatok.shards.patches.reader import PatchShards
from deltatok.train.data.order import generator
from deltatok.train.models.configs import DINOWorldConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.models.heads import SegmentationHead

NUM_CONTEXT, TARGET = 4, 6
BOUNDS = {"copy_last", "reconstruction", "reconstruction_open_loop", "present"}
DELTA_ROWS = [name for name in ROW_NAMES if not name.startswith(("dinoworld", "predictions"))]
STEPS = {"short": 1, "mid": 3}


@pytest.fixture(scope="module")
def rows(shared_evaluation: Any, tmp_path_factory: pytest.TempPathFactory) -> list[ReportRow]:
    """The rows of the whole tiny evaluation."""
    out = str(tmp_path_factory.mktemp("whole"))
    return run_forecast(shared_evaluation.config(out=out)).rows


def value(rows: list[ReportRow], horizon: str, row: str, metric: str) -> float:
    found = find_value(rows, horizon=horizon, row=row, metric=metric)
    assert found is not None
    return found


class StraightLine:
    """The protocol written down once more, a window at a time, nothing shared but the models."""

    def __init__(self, tiny: Any) -> None:
        self.cache = PatchShards(tiny.path("patches"))
        self.black = torch.tensor(self.cache.black)[None]
        self.tokenizer = DeltaTok.from_pretrained(tiny.path("tokenizer"))
        self.world = DeltaWorldNetwork.from_pretrained(tiny.path("world"))
        self.discriminative = DeltaWorldNetwork.from_pretrained(tiny.path("discriminative"))
        self.head = SegmentationHead.from_pretrained(tiny.path("head"))
        self.labels = Path(tiny.path("labels"))

    def encode(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.encode(before, after, grid=self.cache.grid)

    def decode(self, z: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.decode(z, before, grid=self.cache.grid)

    def roll(
        self, world: DeltaWorldNetwork, queries: torch.Tensor, x: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Last features (1, N, D) and delta tokens (H, D) of one sample; queries (H, 1, 1, Dp), x
        the context frames."""
        frames = [self.black, *(frame[None] for frame in x)]
        z = torch.stack([self.encode(a, b) for a, b in pairwise(frames)], dim=1)
        features = x[-1:]
        for query in queries:
            count = z.shape[1]
            now = times[None, count : count + 1]
            new = world.predict(query, now, z, times[None, :count])
            features = self.decode(new[:, 0], features)
            z = torch.cat([z, new], dim=1)
        return features, z[0, len(x) :]

    def window(self, index: int, horizon: str) -> dict[str, torch.Tensor]:
        """Every row's features (N, D) at the target frame."""
        steps = STEPS[horizon]
        x = torch.tensor(self.cache.tokens([index])[0])
        times = torch.tensor(self.cache.timestamps_s([index])[0])
        start = TARGET - steps - NUM_CONTEXT + 1
        context, clip_times = x[start : start + NUM_CONTEXT], (times - times[0])[start : TARGET + 1]
        drawn = torch.randn(steps, 6, 1, 24, generator=generator("forecast", 0, horizon, index))
        noise = drawn * self.world.config.initializer_range
        rolled = [
            self.roll(self.world, noise[:, sample][:, None], context, clip_times)
            for sample in range(6)
        ]
        samples = [features[0] for features, _ in rolled]
        losses = [loss(sample, x[TARGET]) for sample in samples]
        learned = self.discriminative.q_embed.weight[None, None].expand(steps, 1, 1, -1)
        forecast, centre = self.roll(self.discriminative, learned, context, clip_times)
        nulls = self.nulls(index, horizon, centre, torch.stack([z for _, z in rolled]), context)
        null_losses = [loss(null, x[TARGET]) for null in nulls]
        open_loop = context[-1:]
        for frame in range(TARGET - steps + 1, TARGET + 1):
            open_loop = self.decode(self.encode(x[frame - 1][None], x[frame][None]), open_loop)
        reconstruction = context[-1:]
        for frame in x[TARGET - steps + 1 : TARGET + 1]:
            z = self.encode(reconstruction, frame[None])
            reconstruction = self.decode(z, reconstruction)
        return {
            "copy_last": context[-1],
            "discriminative": forecast[0],
            "regressor_null": nulls[int(np.argmin(null_losses))],
            "mean": torch.stack(samples).mean(dim=0),
            "best": samples[int(np.argmin(losses))],
            "reconstruction": reconstruction[0],
            "reconstruction_open_loop": open_loop[0],
            "present": x[TARGET],
        }

    def nulls(
        self,
        index: int,
        horizon: str,
        centre: torch.Tensor,
        samples: torch.Tensor,
        context: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Features (N, D) of six draws around centre (H, D), spread as samples (6, H, D) are."""
        drawn = torch.randn(6, 6, generator=generator("regressor null", 0, horizon, index))
        features = []
        for weights in drawn:
            now = context[-1:]
            for step, z in enumerate(centre):
                away = samples[:, step] - samples[:, step].mean(dim=0)
                offset = sum(w * one for w, one in zip(weights, away, strict=True)) / 5**0.5
                now = self.decode((z + offset)[None], now)
            features.append(now[0])
        return features

    def label(self, index: int) -> np.ndarray[Any, Any]:
        key = self.cache.keys[int(self.cache.clip_index[index])]
        frame = int(self.cache.frame_index([index])[0, TARGET])
        return np.load(self.labels / f"{key}.npy")[frame]

    def classes(self, features: torch.Tensor, size: tuple[int, int]) -> np.ndarray[Any, Any]:
        height, width = self.cache.grid
        grid = features.T.reshape(1, -1, height, width)
        logits = F.interpolate(self.head(grid), size=size, mode="bilinear", align_corners=False)
        return logits[0].argmax(dim=0).numpy()


def loss(prediction: torch.Tensor, truth: torch.Tensor) -> float:
    """Smooth-L1, beta 0.1, by its definition."""
    difference = (prediction - truth).abs().double()
    return torch.where(difference < 0.1, difference**2 / 0.2, difference - 0.05).mean().item()


def mean_iou(confusion: np.ndarray[Any, Any]) -> float:
    both = np.diag(confusion)
    either = confusion.sum(0) + confusion.sum(1) - both
    return float((both[either > 0] / either[either > 0]).mean())


@torch.no_grad()
@pytest.mark.parametrize("horizon", HORIZONS)
def test_rows_equal_a_straight_line_computation(
    shared_evaluation: Any, rows: list[ReportRow], horizon: str
) -> None:
    plain = StraightLine(shared_evaluation)
    losses: dict[str, list[float]] = {name: [] for name in DELTA_ROWS}
    confusion = {name: np.zeros((4, 4)) for name in DELTA_ROWS}
    for index in range(len(plain.cache)):
        label = plain.label(index)
        seen = label != 255
        features = plain.window(index, horizon)
        for name, row in features.items():
            losses[name].append(loss(row, features["present"]))
            classes = plain.classes(row, (label.shape[0], label.shape[1]))
            np.add.at(confusion[name], (label[seen], classes[seen]), 1)
    for name in DELTA_ROWS:
        assert value(rows, horizon, name, "feature_loss") == pytest.approx(
            np.mean(losses[name]), rel=1e-5
        )
        assert value(rows, horizon, name, "miou") == pytest.approx(mean_iou(confusion[name]))


def test_both_horizons_score_the_same_target(rows: list[ReportRow]) -> None:
    short, mid = (value(rows, horizon, "present", "miou") for horizon in HORIZONS)
    assert short == mid


@pytest.mark.parametrize("batch_windows", [1, 3, 5])
def test_rows_do_not_depend_on_the_batch_size(
    shared_evaluation: Any, rows: list[ReportRow], tmp_path: Path, batch_windows: int
) -> None:
    config = shared_evaluation.config(out=str(tmp_path), batch_windows=batch_windows)
    for got, wanted in zip(run_forecast(config).rows, rows, strict=True):
        assert (got.horizon, got.row, got.metric) == (wanted.horizon, wanted.row, wanted.metric)
        assert got.value == pytest.approx(wanted.value, rel=1e-5)


def test_the_same_run_twice_writes_the_same_numbers(shared_evaluation: Any, tmp_path: Path) -> None:
    first, second = (
        run_forecast(shared_evaluation.config(out=str(tmp_path / name))) for name in ("a", "b")
    )
    assert (first.rows, first.probes, first.best_of_k) == (
        second.rows,
        second.probes,
        second.best_of_k,
    )


def test_another_seed_draws_other_samples(
    shared_evaluation: Any, rows: list[ReportRow], tmp_path: Path
) -> None:
    other = run_forecast(shared_evaluation.config(out=str(tmp_path), seed=1)).rows
    assert value(other, "mid", "mean", "feature_loss") != value(rows, "mid", "mean", "feature_loss")
    assert value(other, "mid", "copy_last", "feature_loss") == value(
        rows, "mid", "copy_last", "feature_loss"
    )


def test_no_global_random_state_is_touched(shared_evaluation: Any, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run_forecast(shared_evaluation.config(out=str(tmp_path)))
    assert torch.equal(torch.get_rng_state(), before)


def test_best_of_k_falls_to_the_best_row(shared_evaluation: Any, tmp_path: Path) -> None:
    report = run_forecast(shared_evaluation.config(out=str(tmp_path)))
    curve = [point["feature_loss"] for point in report.best_of_k if point["horizon"] == "mid"]
    assert len(curve) == 6
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] == pytest.approx(value(report.rows, "mid", "best", "feature_loss"))


def test_without_a_world_model_only_the_bounds_are_left(
    shared_evaluation: Any, tmp_path: Path
) -> None:
    config = shared_evaluation.config(out=str(tmp_path), world=None, discriminative=None)
    report = run_forecast(config)
    assert {row.row for row in report.rows} == BOUNDS
    assert report.best_of_k == []
    assert "sample_spread" not in report.probes


def test_without_labels_only_features_are_scored(shared_evaluation: Any, tmp_path: Path) -> None:
    config = shared_evaluation.config(out=str(tmp_path), head=None, labels=None, num_pictures=1)
    report = run_forecast(config)
    assert {row.metric for row in report.rows} == {"feature_loss", *ENSEMBLE_METRICS}
    rows = {row.row for row in report.rows if row.metric == "feature_loss"}
    assert rows == set(DELTA_ROWS)


def test_report_json_holds_what_programs_read(shared_evaluation: Any, tmp_path: Path) -> None:
    report = run_forecast(shared_evaluation.config(out=str(tmp_path)))
    stored = json.loads((tmp_path / "report.json").read_text())
    assert {"rows", "probes", "provenance", "seconds", "best_of_k", "config"} <= stored.keys()
    assert [ReportRow(**row) for row in stored["rows"]] == report.rows
    assert stored["config"]["num_samples"] == 6
    assert stored["provenance"]["cache"]["fingerprint"].startswith("sha256:")
    assert all(stored["provenance"][role]["checked"] for role in ("tokenizer", "world", "head"))
    wanted = {"z_swap_ratio", "zero_z_ratio", "copy_last_ratio", "z_participation_ratio"}
    assert wanted <= stored["probes"].keys()


def test_longer_windows_are_cut_after_the_target(
    shared_evaluation: Any, rows: list[ReportRow], tmp_path: Path
) -> None:
    """With 2 steps the window's last frame plays no part: the target is frame 5."""
    config = shared_evaluation.config(out=str(tmp_path), mid_steps=2)
    report = run_forecast(config)
    cache = PatchShards(shared_evaluation.path("patches"))
    tokens = torch.tensor(cache.tokens(range(len(cache))))
    wanted = np.mean([loss(window[3], window[5]) for window in tokens])
    assert value(report.rows, "mid", "copy_last", "feature_loss") == pytest.approx(wanted)


def test_dino_world_can_be_the_discriminative_model(
    shared_evaluation: Any, make: Any, rows: list[ReportRow], tmp_path: Path
) -> None:
    config = DINOWorldConfig(
        hidden_size=32,
        predictor_hidden_size=32,
        predictor_num_hidden_layers=1,
        predictor_num_heads=2,
        rope_axis_sizes=(4, 4, 4),
    )
    world = DINOWorld(config, generator=torch.Generator().manual_seed(0))
    world.save_pretrained(tmp_path / "dino", {"patches": make.identity("uniform", "aaaa")})
    report = run_forecast(
        shared_evaluation.config(out=str(tmp_path), discriminative=str(tmp_path / "dino"))
    )
    assert report.provenance["discriminative"]["checked"] is True
    assert value(report.rows, "mid", "discriminative", "feature_loss") != value(
        rows, "mid", "discriminative", "feature_loss"
    )


def test_bfloat16_gives_nearly_the_same_rows(
    shared_evaluation: Any, rows: list[ReportRow], tmp_path: Path
) -> None:
    report = run_forecast(shared_evaluation.config(out=str(tmp_path), autocast="bfloat16"))
    assert report.config["autocast"] == "bfloat16"
    for name in DELTA_ROWS:
        got, wanted = (value(r, "mid", name, "feature_loss") for r in (report.rows, rows))
        assert got == pytest.approx(wanted, rel=0.02)
