"""The protocol on evaluation caches, whole, against a second computation in plain loops."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deltatok.evaluate.forecast.config import ForecastConfig
from deltatok.evaluate.forecast.run import run_forecast
from deltatok.evaluate.forecast.windows import label_of_crop
from deltatok.evaluate.report.rows import HORIZONS, find_value
from deltatok.evaluate.report.write import Report
from deltatok.shards.patches.reader import PatchShards
from deltatok.train.data.order import generator
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.heads import DepthHead, DepthHeadConfig, SegmentationHead

NUM_CONTEXT, TARGET, NUM_SAMPLES = 4, 6, 3
STEPS = {"short": 1, "mid": 3}
ROWS = (
    *("copy_last", "discriminative", "regressor_null", "mean", "best"),
    *("reconstruction", "reconstruction_open_loop", "present"),
)


@dataclass(frozen=True)
class Case:
    """An evaluation cache and how its frames and labels are shaped."""

    kind: str
    frame: tuple[int, int]
    label: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.kind}-{self.frame[0]}x{self.frame[1]}-{self.label[0]}x{self.label[1]}"


CASES = (
    Case("segmentation", (20, 34), (20, 35)),  # overlapping crops, an odd label one pixel off
    Case("segmentation", (34, 20), (33, 20)),  # portrait
    Case("depth", (17, 41), (17, 41)),  # squeezed to 2:1: no overlap, odd
    Case("depth", (16, 16), (16, 16)),  # one crop
)


@dataclass(frozen=True)
class Evaluation:
    """The folders of a case."""

    root: Path
    case: Case

    def config(self, **changes: Any) -> ForecastConfig:
        paths = {
            name: str(self.root / name)
            for name in ("patches", "labels", "tokenizer", "world", "discriminative", "head", "out")
        }
        settings: dict[str, Any] = {
            "dataset": "tiny",
            "num_samples": NUM_SAMPLES,
            "batch_windows": 4,
            "num_pictures": 0,
            "device": "cpu",
        }
        return ForecastConfig(**paths | settings | changes)


def build(root: Path, case: Case, write_evaluation_cache: Any, make: Any) -> Evaluation:
    write_evaluation_cache(
        root / "patches", root / "labels", kind=case.kind, frame_shape=case.frame,
        label_shape=case.label,
    )  # fmt: skip
    patches = PatchShards(root / "patches").info.identity
    make.write_models(root, patches)
    if case.kind == "depth":
        config = DepthHeadConfig(in_size=32, max_depth=10.0, num_bins=16)
        head = DepthHead(config, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            head.head.weight.mul_(30)
        head.save_pretrained(root / "head", {"patches": patches})
    return Evaluation(root, case)


@pytest.fixture(scope="module", params=CASES, ids=str)
def evaluation(
    request: Any,
    tmp_path_factory: pytest.TempPathFactory,
    write_evaluation_cache: Any,
    make: Any,
) -> Evaluation:
    root = tmp_path_factory.mktemp("targets")
    return build(root, request.param, write_evaluation_cache, make)


@pytest.fixture(scope="module")
def report(evaluation: Evaluation) -> Report:
    """The whole evaluation of a case, with a picture, in ROOT/out."""
    return run_forecast(evaluation.config(num_pictures=1))


def value(report: Report, horizon: str, row: str, metric: str) -> float:
    found = find_value(report.rows, horizon=horizon, row=row, metric=metric)
    assert found is not None
    return found


class Plain:
    """The protocol once more: a crop, a sample and a pixel at a time."""

    def __init__(self, root: Path, case: Case) -> None:
        self.cache = PatchShards(root / "patches")
        self.black = torch.tensor(self.cache.black)[None]
        self.tokenizer = DeltaTok.from_pretrained(root / "tokenizer")
        self.world = DeltaWorldNetwork.from_pretrained(root / "world")
        self.discriminative = DeltaWorldNetwork.from_pretrained(root / "discriminative")
        kind = SegmentationHead if case.kind == "segmentation" else DepthHead
        self.head: Any = kind.from_pretrained(root / "head")
        self.labels = root / "labels"
        self.case = case

    def encode(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.encode(before, after, grid=self.cache.grid)

    def decode(self, z: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.decode(z, before, grid=self.cache.grid)

    def crops(self) -> dict[str, list[int]]:
        """Target -> windows, left or top first."""
        found: dict[str, list[int]] = {}
        for index in range(len(self.cache)):
            found.setdefault(self.cache.window(index)["clip"], []).append(index)
        return {
            key: sorted(windows, key=lambda index: self.cache.window(index)["crop"][:2])
            for key, windows in found.items()
        }

    def roll(
        self, world: DeltaWorldNetwork, queries: torch.Tensor, x: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Features (N, D) after the last step, and the delta tokens (1, D) of every step."""
        frames = [self.black, *(frame[None] for frame in x)]
        z = [self.encode(a, b) for a, b in pairwise(frames)]
        now = x[-1:]
        for query in queries:
            past = torch.stack(z, dim=1)
            new = world.predict(
                query, times[None, len(z) : len(z) + 1], past, times[None, : len(z)]
            )
            z.append(new[:, 0])
            now = self.decode(z[-1], now)
        return now[0], z[len(x) :]

    def features(self, key: str, crop: int, index: int, horizon: str) -> dict[str, torch.Tensor]:
        """Every row's features (N, D) of the target, of one crop."""
        steps = STEPS[horizon]
        x = torch.tensor(self.cache.tokens([index])[0])
        times = torch.tensor(self.cache.timestamps_s([index])[0])
        first = TARGET + 1 - steps - NUM_CONTEXT
        context, clip = x[first : first + NUM_CONTEXT], (times - times[0])[first:]
        shape = (steps, NUM_SAMPLES, 1, 24)
        drawn = torch.randn(shape, generator=generator("forecast", 0, horizon, key, crop))
        noise = drawn * self.world.config.initializer_range
        rolled = [
            self.roll(self.world, noise[:, sample, None], context, clip)
            for sample in range(NUM_SAMPLES)
        ]
        samples = [features for features, _ in rolled]
        learned = self.discriminative.q_embed.weight[None, None].expand(steps, 1, 1, -1)
        forecast, centre = self.roll(self.discriminative, learned, context, clip)
        weights = torch.randn(
            NUM_SAMPLES, NUM_SAMPLES, generator=generator("regressor null", 0, horizon, key, crop)
        )
        nulls = []
        for row in weights:
            now = context[-1:]
            for step in range(steps):
                z = [tokens[step] for _, tokens in rolled]
                middle = sum(z) / NUM_SAMPLES
                away = sum(w * (one - middle) for w, one in zip(row, z, strict=True))
                now = self.decode(centre[step] + away / (NUM_SAMPLES - 1) ** 0.5, now)
            nulls.append(now[0])
        closed, opened = context[-1:], context[-1:]
        for frame in range(TARGET + 1 - steps, TARGET + 1):
            closed = self.decode(self.encode(closed, x[frame][None]), closed)
            opened = self.decode(self.encode(x[frame - 1][None], x[frame][None]), opened)
        return {
            "copy_last": context[-1],
            "discriminative": forecast,
            "regressor_null": min(nulls, key=lambda one: loss(one, x[TARGET])),
            "mean": sum(samples) / NUM_SAMPLES,
            "best": min(samples, key=lambda one: loss(one, x[TARGET])),
            "reconstruction": closed[0],
            "reconstruction_open_loop": opened[0],
            "present": x[TARGET],
        }

    def read(self, features: torch.Tensor) -> np.ndarray[Any, Any]:
        """Logits (C, h, w) or metres (1, h, w)."""
        height, width = self.cache.grid
        return np.asarray(self.head(features.T.reshape(1, -1, height, width))[0].double())

    def pixel(self, maps: list[np.ndarray[Any, Any]], y: int, x: int) -> np.ndarray[Any, Any]:
        """What is predicted for a pixel of the label, (C,): seen by the crop of its half."""
        height, width = self.case.label
        if len(maps) == 1:
            return sample(maps[0], y, x, height, width)
        if height > width:  # portrait: as the same thing turned
            turned = [m.swapaxes(1, 2) for m in maps]
            return self._wide(turned, x, y, width, height)
        return self._wide(maps, y, x, height, width)

    def _wide(
        self, maps: list[np.ndarray[Any, Any]], y: int, x: int, height: int, width: int
    ) -> np.ndarray[Any, Any]:
        half = width // 2
        right = x >= half
        if max(self.case.frame) < 2 * min(self.case.frame):  # squares of the label's height
            column = x - (width - height) if right else x
            return sample(maps[right], y, column, height, height)
        return sample(maps[right], y, x - half if right else x, height, width - half)


def sample(map_: np.ndarray[Any, Any], y: int, x: int, height: int, width: int) -> Any:
    """Pixel (y, x) of a map (C, h, w) that is resized to height x width: bilinear, pixel centres,
    edges continued."""

    def between(place: int, size: int, small: int) -> tuple[int, int, float]:
        at = max((place + 0.5) * small / size - 0.5, 0.0)
        low = min(int(at), small - 1)
        return low, min(low + 1, small - 1), at - low

    top, bottom, down = between(y, height, map_.shape[1])
    left, right, along = between(x, width, map_.shape[2])
    upper = map_[:, top, left] * (1 - along) + map_[:, top, right] * along
    lower = map_[:, bottom, left] * (1 - along) + map_[:, bottom, right] * along
    return upper * (1 - down) + lower * down


def loss(prediction: torch.Tensor, truth: torch.Tensor) -> float:
    """Smooth-L1, beta 0.1, by its definition."""
    away = (prediction - truth).abs().double()
    return torch.where(away < 0.1, away**2 / 0.2, away - 0.05).mean().item()


@torch.no_grad()
@pytest.mark.parametrize("horizon", HORIZONS)
def test_rows_equal_a_straight_line_computation(
    evaluation: Evaluation, report: Report, horizon: str
) -> None:
    case, plain = evaluation.case, Plain(evaluation.root, evaluation.case)
    losses: dict[str, list[float]] = {row: [] for row in ROWS}
    squares: dict[str, list[float]] = {row: [] for row in ROWS}
    pairs: dict[str, list[tuple[int, int]]] = {row: [] for row in ROWS}
    for key, windows in plain.crops().items():
        found = [plain.features(key, crop, index, horizon) for crop, index in enumerate(windows)]
        stored = np.asarray(Image.open(plain.labels / f"{key}.png"))
        assert stored.shape == case.label
        for row in ROWS:
            losses[row] += [loss(rows[row], rows["present"]) for rows in found]
            maps = [plain.read(rows[row]) for rows in found]
            for (y, x), wanted in np.ndenumerate(stored):
                if wanted == (255 if case.kind == "segmentation" else 0):
                    continue
                got = plain.pixel(maps, y, x)
                if case.kind == "segmentation":
                    pairs[row].append((int(wanted), int(got.argmax())))
                else:
                    squares[row].append((got.item() - wanted / 256) ** 2)
    for row in ROWS:
        got = value(report, horizon, row, "feature_loss")
        assert got == pytest.approx(np.mean(losses[row]), rel=1e-4, abs=1e-7)
        if case.kind == "segmentation":
            assert value(report, horizon, row, "miou") == pytest.approx(mean_iou(pairs[row]))
        else:
            wanted = np.mean(squares[row]) ** 0.5
            assert value(report, horizon, row, "rmse") == pytest.approx(wanted, rel=1e-4)


def mean_iou(pairs: list[tuple[int, int]]) -> float:
    """Over the classes that occur in labels or predictions."""
    table = np.array(pairs)
    ious = []
    for number in range(4):
        shared = ((table == number).all(axis=1)).sum()
        either = ((table == number).any(axis=1)).sum()
        if either:
            ious.append(shared / either)
    return float(np.mean(ious))


def test_the_batch_size_changes_no_number(
    evaluation: Evaluation, report: Report, tmp_path: Path
) -> None:
    config = evaluation.config(out=str(tmp_path), batch_windows=1)
    for got, wanted in zip(run_forecast(config).rows, report.rows, strict=True):
        assert (got.horizon, got.row, got.metric) == (wanted.horizon, wanted.row, wanted.metric)
        assert got.value == pytest.approx(wanted.value, rel=1e-5)


def test_pictures_of_crops_are_drawn(evaluation: Evaluation, report: Report) -> None:
    names = {path.name for path in (evaluation.root / "out" / "pictures").iterdir()}
    kind = "classes" if evaluation.case.kind == "segmentation" else "depth"
    assert {f"{kind}-0.png", "features-0.png"} <= names
    crops = 4 if evaluation.case.frame == (16, 16) else 8
    assert f"{crops} crops of 4 targets" in (evaluation.root / "out" / "report.html").read_text()


def test_the_label_of_a_crop_is_what_it_shows() -> None:
    label = np.arange(4 * 7, dtype=np.uint8).reshape(4, 7)
    crops = np.array([[10, 5, 40, 40], [10, 35, 40, 40]], np.float32)  # of a frame 40 x 70
    np.testing.assert_array_equal(label_of_crop(label, crops, 0), label[:, :4])
    np.testing.assert_array_equal(label_of_crop(label, crops, 1), label[:, 3:])


def test_targets_of_one_sequence_are_kept_together(evaluation: Evaluation, report: Report) -> None:
    text = (evaluation.root / "out" / "sequences.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    crops = 1 if evaluation.case.frame == (16, 16) else 2
    assert {line["sequence"]: line["windows"] for line in lines} == {
        "a": 2 * crops,
        "town/b": 2 * crops,
    }
