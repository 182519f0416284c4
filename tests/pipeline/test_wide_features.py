"""Layers side by side, their principal components and rectangles, through every command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deltatok.evaluate.inference.model import DeltaWorld
from deltatok.pipeline.audit import audit_cache
from deltatok.pipeline.commands.extract import main as extract
from deltatok.pipeline.commands.pipeline import main as pipeline_main
from deltatok.pipeline.commands.shards import VerifyConfig
from deltatok.pipeline.commands.shards import main as shards
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
from deltatok.shards.deltas.reader import DeltaShards
from deltatok.shards.errors import UsageError
from deltatok.shards.patches.projection import read_projection
from deltatok.shards.patches.reader import PatchShards

from .conftest import TINY

Fails = Callable[..., None]
SIZE = "frame_size: 32\n"


@pytest.fixture(scope="module")
def run(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with two of three layers, 24 of their 32 channels, frames of 32x64."""
    root = tmp_path_factory.mktemp("wide")
    make_tiny_backbone(
        TinyBackboneConfig(
            out=str(root / "backbone"), hidden_size=16, num_hidden_layers=3, num_attention_heads=2
        )
    )
    text = TINY.format(root=tiny_inputs).replace(f"{tiny_inputs}/backbone", f"{root}/backbone")
    first, second, last = text.split(SIZE)
    wide = "frame_size: 32x64\n      layers: [1, 3]\n      pca: "
    text = f'{first}{wide}24\n{second}{wide}"${{out}}/patches"\n{last}'
    (root / "wide.yaml").write_text(text)
    assert pipeline_main(["run", str(root / "wide.yaml"), "--out", str(root / "run")]) == 0
    return root / "run"


def words(run: Path, root: Path, *more: str) -> list[str]:
    line = ["--videos", str(root / "world/train"), "--backbone", str(run.parent / "backbone")]
    return [*line, "--layers", "1,3", "--frame-size", "32x64", "--workers", "1", *more]


def test_every_stage_takes_them(run: Path) -> None:
    patches, val = PatchShards(run / "patches"), PatchShards(run / "val-patches")
    assert patches.shape == (8, 8, 24)
    assert patches.grid == (2, 4)
    assert patches.info.identity["backbone"] == val.info.identity["backbone"]
    assert patches.info.files.keys() >= {"pca.npy"}
    report = json.loads((run / "report" / "report.json").read_text())
    metrics = {(row["row"], row["metric"]) for row in report["rows"]}
    assert {("best", "miou"), ("discriminative", "feature_loss")} <= metrics


def test_forecasts_from_pixels_find_layers_and_components(run: Path, tmp_path: Path) -> None:
    world = DeltaWorld.from_pretrained(run, backbone=run.parent / "backbone", device="cpu")
    assert world.parts.backbone.layers == (1, 3)
    assert world.parts.backbone.hidden_size == 24
    assert (world.parts.frame_size, world.parts.grid) == ((32, 64), (2, 4))
    frames = np.random.default_rng(0).integers(0, 256, (4, 40, 80, 3), dtype=np.uint8)
    futures = world.predict(frames, fps=5, num_samples=2, seed=7)
    assert futures.features.shape == (2, 3, 8, 24)
    world.save_pretrained(tmp_path / "bundle")
    moved = (tmp_path / "bundle").rename(tmp_path / "moved")
    again = DeltaWorld.from_pretrained(moved, device="cpu")
    assert again.parts.frame_size == (32, 64)
    np.testing.assert_array_equal(
        again.predict(frames, fps=5, num_samples=2, seed=7).features.numpy(),
        futures.features.numpy(),
    )
    (moved / "backbone" / "pca.npy").unlink()
    with pytest.raises(UsageError, match=r"24 principal components .* no pca\.npy beside it"):
        DeltaWorld.from_pretrained(moved, device="cpu")


def test_an_audit_finds_no_difference(run: Path, tiny_inputs: Path) -> None:
    videos, backbone = (str(tiny_inputs / "world/train"),), str(run.parent / "backbone")
    config = VerifyConfig(dir=str(run / "patches"), audit=2, videos=videos, backbone=backbone)
    report = audit_cache(config)
    assert report.differing == {}
    assert report.windows == 8


def test_delta_tokens_straight_from_videos_are_those_of_the_patch_cache(
    run: Path, tiny_inputs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deltas"
    more = ["--pca", str(run / "patches"), "--tokenizer", str(run / "tokenizer"), "--windows", "4"]
    assert extract(words(run, tiny_inputs, *more, "--out", str(out))) == 0
    fused, encoded = DeltaShards(out), DeltaShards(run / "deltas")
    assert fused.info.identity["patches"] == encoded.info.identity["patches"]
    np.testing.assert_allclose(
        fused.tokens(range(len(fused))), encoded.tokens(range(len(encoded))), atol=2e-2
    )
    assert read_projection(out).identity() == read_projection(run / "patches").identity()
    assert shards(["verify", str(out), "--deep"]) == 0


def test_a_plan_and_a_preview_are_made(run: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    plan = ["--pca", "24", "--plan", "--probe-clips", "1", "--json", str(tmp_path / "plan.json")]
    assert extract(words(run, tiny_inputs, *plan, "--out", str(tmp_path / "planned"))) == 0
    assert not (tmp_path / "planned").exists()
    page = str(tmp_path / "page.html")
    assert shards(["preview", str(run / "patches"), "--out", page]) == 0
    assert Path(page).stat().st_size


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (["--layers", "2,3", "--pca", "24"], "backbone.layers[1]"),
        (["--pca", "24", "--limit", "2"], "backbone.pca.sha256"),
        (["--pca", "16"], "backbone.pca.components"),
        (["--pca", "PATCHES", "--frame-size", "32"], "preprocessing.frame_size is 32, but 32x64"),
    ],
)
def test_a_tokenizer_of_another_cache_is_refused(
    changes: list[str], field: str, run: Path, tiny_inputs: Path, tmp_path: Path, fails: Fails
) -> None:
    given = [str(run / "patches") if word == "PATCHES" else word for word in changes]
    cache = str(tmp_path / "cache")
    assert extract(words(run, tiny_inputs, *given, "--out", cache)) == 0
    encode = ["--patches", cache, "--tokenizer", str(run / "tokenizer")]
    fails(extract, [*encode, "--out", str(tmp_path / "deltas")], 4, field.replace("[1]", ""))


def test_a_cache_is_gone_on_with_only_by_the_same_layers(
    run: Path, tiny_inputs: Path, tmp_path: Path, fails: Fails
) -> None:
    shutil.copytree(run / "patches", tmp_path / "patches")
    line = words(run, tiny_inputs, "--windows", "4", "--out", str(tmp_path / "patches"))
    assert extract([*line, "--pca", "24"]) == 0
    fails(extract, [*line, "--pca", "24", "--layers", "1,2"], 4, "backbone.layers")
    fails(extract, [*line, "--pca", "24", "--frame-size", "64"], 4, "preprocessing.frame_size")
    fails(extract, line, 4, "backbone.pca")


def test_layers_and_components_that_cannot_be_are_refused(
    run: Path, tiny_inputs: Path, tmp_path: Path, fails: Fails
) -> None:
    line = words(run, tiny_inputs, "--out", str(tmp_path / "cache"))
    for more, text in (
        (["--layers", "1,4"], "has blocks 1 to 3"),
        (["--layers", "1,1"], "layers: got (1, 1)"),
        (["--pca", "33"], "features have 32 channels"),
        (["--pca", "0"], "pca: got 0"),
        (["--pca", str(tiny_inputs / "nothing")], "no such folder"),
        (["--frame-size", "32x60"], "frame size 60"),
    ):
        fails(extract, [*line, *more], 2, text)
