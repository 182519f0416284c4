"""Evaluation caches, labels and heads that do not belong together, and what is said then."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deltatok.evaluate.forecast.config import ForecastConfig
from deltatok.evaluate.forecast.run import run_forecast
from deltatok.evaluate.forecast.windows import EvaluationWindows
from deltatok.shards.errors import CacheMismatch, DamagedShard, UsageError
from deltatok.shards.patches.reader import PatchShards
from deltatok.train.engine.model_folder import weights_sha256
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.heads import (
    DepthHead,
    DepthHeadConfig,
    SegmentationHead,
    SegmentationHeadConfig,
)


@dataclass(frozen=True)
class Folders:
    """A whole evaluation that a test may spoil."""

    root: Path
    write_cache: Callable[..., Any]

    def config(self, **changes: Any) -> ForecastConfig:
        names = ("patches", "labels", "tokenizer", "world", "head", "out")
        paths = {name: str(self.root / name) for name in names}
        settings: dict[str, Any] = {"num_samples": 2, "num_pictures": 0, "device": "cpu"}
        return ForecastConfig(**paths | settings | changes)

    def cache(self, **changes: Any) -> None:
        """The cache and its labels once more, made otherwise."""
        shutil.rmtree(self.root / "patches")
        shutil.rmtree(self.root / "labels")
        self.write_cache(self.root / "patches", self.root / "labels", **changes)

    def head(self, head: SegmentationHead | DepthHead) -> None:
        patches = PatchShards(self.root / "patches").info.identity
        head.save_pretrained(self.root / "head", {"patches": patches})


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, write_evaluation_cache: Any, make: Any
) -> Folders:
    root = tmp_path_factory.mktemp("refusals")
    write_evaluation_cache(root / "patches", root / "labels")
    make.write_models(root, PatchShards(root / "patches").info.identity)
    return Folders(root, write_evaluation_cache)


@pytest.fixture
def folders(whole: Folders, tmp_path: Path) -> Folders:
    shutil.copytree(whole.root, tmp_path, dirs_exist_ok=True)
    return Folders(tmp_path, whole.write_cache)


def test_labels_of_another_size_are_refused(folders: Folders) -> None:
    path = folders.root / "labels" / "a" / "000039.png"
    Image.fromarray(np.zeros((20, 35), np.uint8)).save(path)
    with pytest.raises(UsageError, match=r"20 x 35 pixels, the cache was made with .* 20 x 34"):
        run_forecast(folders.config())


def test_a_missing_label_names_the_target(folders: Folders) -> None:
    (folders.root / "labels" / "a" / "000039.png").unlink()
    with pytest.raises(UsageError, match=r"no such label \(a/000039\)"):
        run_forecast(folders.config())


def test_a_head_of_too_few_classes_is_refused(folders: Folders) -> None:
    folders.head(SegmentationHead(SegmentationHeadConfig(in_size=32, num_classes=2)))
    with pytest.raises(UsageError, match=r"target .*/0000.9: its label has class 3.*0 to 1"):
        run_forecast(folders.config())


def test_a_depth_head_on_class_labels_is_refused(folders: Folders) -> None:
    folders.head(DepthHead(DepthHeadConfig(in_size=32)))
    with pytest.raises(UsageError, match=r"a DepthHead, but .* kind segmentation; .*Segmentation"):
        run_forecast(folders.config())


def test_a_segmentation_head_on_depth_is_refused(folders: Folders) -> None:
    folders.cache(kind="depth")
    with pytest.raises(UsageError, match=r"a SegmentationHead, but .* kind depth; .*DepthHead"):
        run_forecast(folders.config())


def test_a_head_of_another_number_of_classes_than_the_data_set_is_refused(
    folders: Folders, edit_plan: Any
) -> None:
    def edit(lines: list[Any]) -> None:
        for line in lines:
            for clip in line["clips"]:
                clip["target"]["rule"] = {"name": "cityscapes"}

    edit_plan(folders.root / "patches", edit)
    with pytest.raises(UsageError, match=r"4 classes, .* \(cityscapes\) have 19"):
        run_forecast(folders.config())


def test_a_set_without_a_valid_class_is_refused(folders: Folders) -> None:
    for path in (folders.root / "labels").rglob("*.png"):
        Image.fromarray(np.full((20, 34), 255, np.uint8)).save(path)
    with pytest.raises(UsageError, match=r"every pixel of every target frame is 255"):
        run_forecast(folders.config())


def test_a_set_without_a_valid_depth_is_refused(folders: Folders) -> None:
    folders.cache(kind="depth")
    folders.head(DepthHead(DepthHeadConfig(in_size=32)))
    with pytest.raises(UsageError, match=r"no pixel of any target frame has a depth"):
        run_forecast(folders.config(depth_range_m=(50.0, 60.0)))


def test_windows_of_another_length_are_refused(folders: Folders) -> None:
    with pytest.raises(UsageError, match=r"windows of 7 frames .* num_context \+ mid_steps = 6"):
        run_forecast(folders.config(mid_steps=2))


@pytest.mark.parametrize(("low", "high"), [(1.0, 100.0), (1.0, 5.0), (3.0, 100.0), (3.0, 5.0)])
def test_depths_out_of_the_range_count_nowhere(folders: Folders, low: float, high: float) -> None:
    folders.cache(kind="depth")
    folders.head(DepthHead(DepthHeadConfig(in_size=32)))
    windows = EvaluationWindows(
        folders.config(depth_range_m=(low, high)),
        PatchShards(folders.root / "patches"),
        DepthHead(DepthHeadConfig(in_size=32)),
    )
    for batch in windows.batches():
        for frame in windows.labelled(batch):
            found = set(np.unique(frame.label)) - {0.0}
            assert found == {metres for metres in (2.0, 4.0, 6.0, 8.0) if low <= metres <= high}


def test_a_depth_range_without_depth_is_refused(folders: Folders) -> None:
    with pytest.raises(UsageError, match=r"--depth-range-m: no depth --head"):
        run_forecast(folders.config(depth_range_m=(1.0, 3.0)))


def test_windows_without_a_target_are_refused(folders: Folders, edit_plan: Any) -> None:
    edit_plan(folders.root / "patches", lambda lines: lines[0]["clips"][0].pop("target"))
    with pytest.raises(DamagedShard, match=r"clip a/000019 has 2 windows and no target"):
        run_forecast(folders.config())


def test_rows_have_the_name_of_the_data_set(folders: Folders) -> None:
    assert {row.dataset for row in run_forecast(folders.config(world=None)).rows} == {"tiny"}
    named = run_forecast(folders.config(dataset="mine", world=None))
    assert {row.dataset for row in named.rows} == {"mine"} == {named.config["dataset"]}


def test_a_depth_range_that_is_none_is_refused(folders: Folders) -> None:
    with pytest.raises(UsageError, match=r"depth_range_m: got \(3\.0, 1\.0\)"):
        folders.config(depth_range_m=(3.0, 1.0))


def test_a_world_model_of_another_tokenizer_is_refused_with_both_hashes(
    folders: Folders, make: Any
) -> None:
    deltas = {
        "patches": PatchShards(folders.root / "patches").info.identity,
        "tokenizer": {"config": {}, "weights_sha256": "cccc"},
    }
    provenance = folders.root / "world" / "provenance.json"
    provenance.write_text(json.dumps({"deltas": deltas}))
    provenance.with_name("checksums.json").unlink()
    with pytest.raises(CacheMismatch, match=r"tokenizer\.weights_sha256.*cccc") as caught:
        run_forecast(folders.config())
    given = weights_sha256(DeltaTok.from_pretrained(folders.root / "tokenizer"))
    assert given in str(caught.value)
    assert caught.value.exit_code == 4


def test_targets_in_quarantine_are_counted(folders: Folders, caplog: Any) -> None:
    path = folders.root / "patches" / "cache.json"
    info = json.loads(path.read_text())
    info["counts"]["quarantined"] = 1
    path.write_text(json.dumps(info))
    assert run_forecast(folders.config(world=None)).num_clips == 4
    assert "1 of 5 targets are in quarantine and not scored" in caplog.text


@pytest.mark.parametrize("kind", ["segmentation", "depth"])
def test_a_target_without_a_valid_pixel_counts_nowhere(folders: Folders, kind: str) -> None:
    folders.cache(kind=kind)
    if kind == "depth":
        folders.head(DepthHead(DepthHeadConfig(in_size=32)))
    path = folders.root / "labels" / "a" / "000039.png"
    nothing = np.uint16(0) if kind == "depth" else np.uint8(255)
    Image.fromarray(np.full((20, 34), nothing)).save(path)
    rows = run_forecast(folders.config(world=None)).rows
    metric = "rmse" if kind == "depth" else "miou"
    values = [row.value for row in rows if row.metric == metric]
    assert len(values) == 2 * 4
    assert np.isfinite(values).all()
