"""A pipeline file for one's own videos: what it holds, and that it runs."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deltatok.pipeline import init
from deltatok.pipeline.commands.pipeline import main
from deltatok.pipeline.init import InitConfig, init_pipeline
from deltatok.pipeline.stages import read_pipeline
from deltatok.shards.errors import UsageError


@pytest.fixture
def make(tiny_inputs: Path, tmp_path: Path) -> Any:
    """Config of the tiny videos, in a folder of the test."""

    def config(**changes: Any) -> InitConfig:
        fields: dict[str, Any] = {
            "videos": (str(tiny_inputs / "world" / "train"),),
            "backbone": str(tiny_inputs / "backbone"),
            "file": str(tmp_path / "mine.yaml"),
            "out": str(tmp_path / "mine"),
        }
        return InitConfig(**fields | changes)

    return config


def test_the_file_is_a_pipeline_and_its_lists_divide_the_clips(make: Any, tmp_path: Path) -> None:
    file = init_pipeline(make())
    pipeline = read_pipeline(file, out=None, settings=[])
    names = [stage.name for stage in pipeline.stages]
    assert names == ["patches", "tokenizer", "world", "val-patches", "report"]
    train, val = (
        set((tmp_path / f"mine.{part}.txt").read_text().split()) for part in ("train", "val")
    )
    assert train
    assert val
    assert not train & val
    assert pipeline.stages[0].settings["exclude"] == str(tmp_path / "mine.val.txt")


def test_the_pipeline_runs(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = init_pipeline(make())
    words = ["run", str(file)]
    for setting in (
        *("patches.frame_size=32", "patches.num_windows=4", "val-patches.frame_size=32"),
        *("tokenizer.steps=2", "tokenizer.warmup_steps=1", "tokenizer.allow_stuck=true"),
        *("tokenizer.batch_size=14", "world.batch_size=2"),  # for 4 windows a clip
        *("world.steps=2", "world.warmup_steps=1"),
    ):
        words += ["--set", setting]
    assert main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "mine" / "report" / "report.html").is_file()


def test_a_file_that_is_there_is_kept(make: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(UsageError, match=r"mine\.yaml"):
        init_pipeline(make())
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_a_folder_without_videos_is_refused(make: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty"):
        init_pipeline(make(videos=(str(tmp_path / "empty"),)))
    assert not (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize("suffix", ["tar", "zip"])
def test_videos_inside_an_archive_are_probed(
    make: Any, tiny_inputs: Path, tmp_path: Path, suffix: str
) -> None:
    train = tiny_inputs / "world" / "train"
    archive = shutil.make_archive(str(tmp_path / "clips"), suffix, train)
    inside = init_pipeline(make(videos=(archive,))).read_text()
    beside = init_pipeline(make(file=str(tmp_path / "beside.yaml"))).read_text()
    probed = [
        re.findall(r"about [\d.]+ s long, \d+ pixels high", text) for text in (inside, beside)
    ]
    assert probed[0] == probed[1] != []


def test_videos_that_cannot_be_read_are_refused(make: Any, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for name in "ab":
        (tmp_path / "bad" / f"{name}.mp4").write_bytes(b"no video")
    with pytest.raises(UsageError, match=r"none of 2 videos"):
        init_pipeline(make(videos=(str(tmp_path / "bad"),)))


def test_a_size_that_the_machine_cannot_hold_says_what_fits(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "_gpu_bytes", lambda device: 0.0)
    with pytest.raises(UsageError, match="--size small fits"):
        init_pipeline(make(size="base"))


def test_a_machine_too_small_for_any_size_says_what_is_missing(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(init.psutil, "virtual_memory", lambda: SimpleNamespace(total=1e9))
    with pytest.raises(UsageError, match=r"too small for any size.* 3 GB .*there are 1\.0"):
        init_pipeline(make())
    assert not (tmp_path / "mine.yaml").exists()


def test_batches_fit_the_clips_there_are(make: Any) -> None:
    """Of three clips one validates, and one of the two that train does so in training."""
    pipeline = read_pipeline(init_pipeline(make()), out=None, settings=[])
    by_name = {stage.name: stage.settings for stage in pipeline.stages}
    windows = by_name["patches"]["num_windows"]
    assert by_name["world"]["batch_size"] == windows // 2
    assert by_name["tokenizer"]["batch_size"] == min(32, 7 * windows // 2)


def test_a_disk_that_is_too_small_says_how_many_clips_fit(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UsageError, match=r"videos of \d+ clips at most"):
        init_pipeline(make())


def test_released_sizes_start_each_stage_from_the_one_before(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(init, "_gpu_bytes", lambda device: 80e9)
    pipeline = read_pipeline(init_pipeline(make(size="released")), out=None, settings=[])
    by_name = {stage.name: stage.settings for stage in pipeline.stages}
    assert by_name["tokenizer-2"]["start_from"] == str(tmp_path / "mine" / "tokenizer-1")
    assert by_name["tokenizer-1"]["patches"] == str(tmp_path / "mine" / "patches-256")
    assert by_name["report"]["world"] == str(tmp_path / "mine" / "world")


def test_the_width_of_a_backbone_is_its_configs_or_its_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 48}))
    assert init.backbone_width(str(tmp_path)) == 48
    assert init.backbone_width("facebook/dinov3-vitl16-pretrain-lvd1689m") == 1024
    with pytest.raises(UsageError, match="somebody/else"):
        init.backbone_width("somebody/else")
