"""DINO-Foresight's set-up, end to end on small stand-ins: configs/foresight with everything small.

A random DINOv2 with registers, four layers, their principal components, rectangular frames, delta
tokens, a self-attention predictor, heads for classes and depth, both reports.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from deltatok.pipeline.commands import evaluate, extract, train
from deltatok.shards.patches.projection import read_projection
from deltatok.shards.patches.reader import PatchShards
from deltatok.train.engine.model_folder import read_class

pytestmark = pytest.mark.slow

HEIGHT, WIDTH = 60, 120
SMALL = "56x112"
"""4 x 8 patches of 14 pixels."""
SEQUENCES, FRAMES = 8, 12
FPS = ["--fps", "5", "--stride-s", "0.2", "--workers", "1", "--device", "cpu"]
MODEL = {
    "tokenizer": "num_hidden_layers=2 num_attention_heads=2 intermediate_size=48",
    "world": "predictor_hidden_size=32 predictor_num_hidden_layers=2 predictor_num_heads=2 "
    "rope_axis_sizes=12 rope_unrotated_size=4",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Textured frames over which a bright square moves to the right; it is class 1, 2 m near, and
    the ground is class 0, 10 m away. Training and validation sequences."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(2 * SEQUENCES):
        split = "train" if number < SEQUENCES else "val"
        ground = rng.integers(0, 120, (HEIGHT // 4, WIDTH // 4, 3)).repeat(4, 0).repeat(4, 1)
        top, left, speed = rng.integers(0, 36), rng.integers(0, 30), rng.integers(2, 6)
        for frame in range(FRAMES):
            classes = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
            at = left + speed * frame
            classes[top : top + 24, at : at + 24] = 1
            picture = np.where(classes[..., None] == 1, 230, ground).astype(np.uint8)
            depth = np.where(classes == 1, 2000, 10_000).astype(np.uint16)
            for folder, pixels in (("images", picture), ("labels", classes), ("depth", depth)):
                path = root / folder / split / f"s{number}" / f"{frame:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone") / "dinov2"
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        patch_size=14,
        image_size=56,
        num_register_tokens=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Dinov2WithRegistersModel(config)
        for value in model.parameters():
            value.data.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    means = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(means))
    return folder


@dataclass(frozen=True)
class Setup:
    """Where everything lies that the set-up made."""

    out: Path
    data: Path
    backbone: Path

    def path(self, name: str) -> str:
        return str(self.out / name)

    def extract(self, config: str, *words: str, split: str, labels: str = "labels") -> None:
        line = ["--config", f"configs/foresight/{config}.yaml", "--dataset", "sequences"]
        line += ["--root", str(self.data), "--backbone", str(self.backbone), "--layers", "1,2,3,4"]
        line += ["--images", f"images/{split}/*/*.png", "--labels", f"{labels}/{split}/*/*.png"]
        assert extract.main([*line, "--frame-size", SMALL, *FPS, *words]) == 0

    def train(self, kind: str, config: str, *words: str, steps: int) -> None:
        line = [kind, "--config", f"configs/foresight/{config}.yaml", "--steps", str(steps)]
        line += ["--warmup-steps", "5", "--batch-size", "16", "--lr", "3e-3", "--device", "cpu"]
        line += ["--precision", "float32", "--eval-every", str(steps), "--save-every", str(steps)]
        for setting in MODEL.get(kind, "").split():
            line += ["--set", f"model.{setting}"]
        assert train.main([*line, *words]) == 0

    def report(self, name: str, *words: str) -> dict[str, Any]:
        line = ["forecast", "--tokenizer", self.path("tokenizer"), "--device", "cpu"]
        line += ["--discriminative", self.path("world"), "--labels", str(self.data)]
        assert evaluate.main([*line, "--out", self.path(name), "--num-pictures", "1", *words]) == 0
        found: dict[str, Any] = json.loads((self.out / name / "report.json").read_text())
        return found


@pytest.fixture(scope="module")
def setup(data: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    setup = Setup(out=tmp_path_factory.mktemp("out"), data=data, backbone=backbone)
    at = setup.path
    # DINO-Foresight's 1,152 of 3,072 channels are three of eight.
    setup.extract("targets-train", "--out", at("train"), "--pca", "40", split="train")
    setup.extract("targets-val", "--out", at("val"), "--pca", at("train"), split="val")
    setup.train(
        *("tokenizer", "tokenizer", "--patches", at("train"), "--deltas", at("deltas")),
        *("--out", at("tokenizer"), "--micro-batch-size", "16", "--allow-stuck"),
        steps=100,
    )
    setup.train("world", "world", "--deltas", at("deltas"), "--out", at("world"), steps=100)
    setup.train(
        *("head", "head-segmentation", "--patches", at("train"), "--labels", str(data)),
        *("--num-classes", "2", "--out", at("head")),
        steps=200,
    )
    return setup


def value(report: Mapping[str, Any], row: str, metric: str, horizon: str = "mid") -> float:
    (found,) = [
        entry["value"]
        for entry in report["rows"]
        if (entry["row"], entry["metric"], entry["horizon"]) == (row, metric, horizon)
    ]
    return float(found)


def test_caches_share_components_of_whole_frames(setup: Setup) -> None:
    trained, val = PatchShards(setup.path("train")), PatchShards(setup.path("val"))
    assert trained.grid == val.grid == (4, 8)
    assert trained.shape == (5, 32, 40)
    assert val.shape == (7, 32, 40)
    assert read_projection(trained.folder).components.shape == (40, 96)
    identity = trained.info.identity
    assert identity["backbone"] == val.info.identity["backbone"]
    assert identity["backbone"]["layers"] == [1, 2, 3, 4]
    assert identity["preprocessing"]["frame_size"] == [56, 112]
    assert len(val) == len(val.keys)  # one window a target, no squares
    assert val.crop.tolist() == [[0, 0, HEIGHT, WIDTH]] * len(val)


def test_the_report_has_miou_of_forecasts_between_the_bounds(setup: Setup) -> None:
    assert read_class(setup.path("world")) == "SelfAttentionWorld"
    report = setup.report("report", "--patches", setup.path("val"), "--head", setup.path("head"))
    present, copied = (value(report, row, "miou") for row in ("present", "copy_last"))
    assert present > 0.6
    assert copied < present
    # So few steps make no good forecast, but one that is read by the head as the others are.
    assert 0.3 < value(report, "discriminative", "miou") < present
    assert 0 < value(report, "discriminative", "feature_loss") < 2
    page = (setup.out / "report" / "report.html").read_text(encoding="utf-8")
    assert "Discriminative" in page


def test_the_report_of_depth_has_delta1(setup: Setup) -> None:
    depth = ["--kind", "depth", "--steps-per-m", "1000", "--pca", setup.path("train")]
    for split, frames in (("train", "1"), ("val", "7")):
        setup.extract(
            *("targets-depth", "--out", setup.path(f"depth-{split}"), "--num-frames", frames),
            *(*depth, "--split", split),
            split=split,
            labels="depth",
        )
    setup.train(
        *("head", "head-depth", "--patches", setup.path("depth-train"), "--max-depth", "12"),
        *("--labels", str(setup.data), "--out", setup.path("depth-head")),
        steps=200,
    )
    report = setup.report(
        *("depth-report", "--patches", setup.path("depth-val")),
        *("--head", setup.path("depth-head")),
    )
    assert 0.5 < value(report, "present", "delta1") <= 1
    assert value(report, "copy_last", "delta1") < value(report, "present", "delta1")
    assert value(report, "present", "rmse") < value(report, "copy_last", "rmse")


def test_a_tokenizer_of_another_cache_s_components_is_refused(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    setup.extract("targets-val", "--out", setup.path("own"), "--pca", "40", split="val")
    words = ["--patches", setup.path("own"), "--tokenizer", setup.path("tokenizer")]
    assert extract.main([*words, "--out", setup.path("refused")]) == 4
    assert "backbone.pca.sha256" in capsys.readouterr().err
