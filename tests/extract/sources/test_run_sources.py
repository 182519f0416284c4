"""Whole extractions from archives and lists: the same windows, and class and split in the cache."""

import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.run import run_extraction
from deltatok.pipeline.commands.extract import main as extract
from deltatok.shards import PatchShards
from deltatok.shards.plan import Plan
from deltatok.shards.records import read_done
from deltatok.shards.windows import WindowColumns

MakeConfig = Callable[..., ExtractConfig]


def _table(folder: Path) -> WindowColumns:
    return PatchShards(folder).table()


@pytest.mark.parametrize("kind", ["tar", "zip", "deflated zip"])
def test_archive_gives_the_cache_that_the_folder_gives(
    finished: Path,
    clips: Path,
    make_config: MakeConfig,
    backbone: Backbone,
    tmp_path: Path,
    kind: str,
) -> None:
    archive = tmp_path / f"clips.{kind[-3:]}"
    files = sorted(clips.iterdir())
    if kind == "tar":
        with tarfile.open(archive, "w") as tar:
            for path in files:
                tar.add(path, arcname=path.name)
    else:
        method = zipfile.ZIP_DEFLATED if kind == "deflated zip" else zipfile.ZIP_STORED
        with zipfile.ZipFile(archive, "w", method) as zipped:
            for path in files:
                zipped.write(path, path.name)
    config = make_config(videos=(str(archive),))
    run_extraction(config, backbone=backbone)
    ours, theirs = PatchShards(config.out), PatchShards(finished)
    assert ours.keys == theirs.keys
    assert np.array_equal(ours.load(), theirs.load())
    assert np.array_equal(_table(Path(config.out)).crop, _table(finished).crop)
    sizes = [
        {entry.key: entry.size_bytes for entry in Plan.open(out)} for out in (config.out, finished)
    ]
    assert sizes[0] == sizes[1]


LATIN = os.fsdecode(b"caf\xe9.mp4")


@pytest.mark.parametrize(
    "kind", ["file", "folder", "list", "list of labels", "tar", "zip, newline", "newline"]
)
def test_name_that_no_cache_can_hold_is_refused_before_anything_is_written(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    shutil.copy(clips / "c0.mp4", folder / "plain.mp4")
    name = "two\nlines.mp4" if "newline" in kind else LATIN
    given = {"file": folder / name, "list": folder / "l.txt", "list of labels": folder / "l.csv"}
    if kind == "tar":
        with tarfile.open(folder / "w.tar", "w") as tar:
            tar.add(clips / "c1.mp4", arcname=name)
    elif kind == "zip, newline":
        with zipfile.ZipFile(folder / "w.zip", "w") as archive:
            archive.write(clips / "c1.mp4", name)
    elif kind == "list of labels":
        (folder / "l.csv").write_bytes(b"path,label\nplain.mp4,caf\xe9.mp4\n")
    else:
        shutil.copy(clips / "c1.mp4", folder / name)
        (folder / "l.txt").write_bytes(b"plain.mp4\ncaf\xe9.mp4\n")
    words = ["--videos", str(given.get(kind, folder)), "--backbone", "none", "--out", str(out)]
    assert extract(words) == 2
    shown = r"'two\nlines.mp4'" if "newline" in kind else r"b'caf\xe9.mp4'"
    assert shown in capsys.readouterr().err.replace("w/", "")
    assert not out.exists()


def test_frame_that_has_no_valid_name_is_told_of_in_the_quarantine(
    clips: Path, make_config: MakeConfig, backbone: Backbone, tmp_path: Path
) -> None:
    folder = tmp_path / "videos"
    (folder / "frames").mkdir(parents=True)
    shutil.copy(clips / "c0.mp4", folder)
    (folder / "frames" / os.fsdecode(b"caf\xe9_0.5.jpg")).write_bytes(b"no image")
    config = make_config(videos=(str(folder),), max_quarantined=0.5)
    assert run_extraction(config, backbone=backbone).quarantined == 1
    (line,) = (Path(config.out) / "quarantine.jsonl").read_text().splitlines()
    assert "caf\\udce9_0.5.jpg cannot be decoded" in json.loads(line)["reason"]
    assert PatchShards(config.out).keys == ["c0.mp4"]


def test_class_and_split_of_a_list_are_in_the_plan_and_the_reader(
    clips: Path, make_config: MakeConfig, backbone: Backbone, tmp_path: Path
) -> None:
    rows = ["path,label,split", *(f"c{i}.mp4,class {i},train" for i in range(3)), "c3.mp4,,"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    config = make_config(videos=(str(tmp_path / "list.csv"),), root=str(clips))
    run_extraction(config, backbone=backbone)
    plan = {entry.key: (entry.label, entry.split) for entry in Plan.open(config.out)}
    assert plan["c1.mp4"] == ("class 1", "train")
    assert plan["c3.mp4"] == (None, None)
    (part,) = (Path(config.out) / "plan").iterdir()
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    (bare,) = (clip for line in lines for clip in line["clips"] if clip["key"] == "c3.mp4")
    assert "label" not in bare
    patches = PatchShards(config.out)
    assert patches.labels == [plan[key][0] for key in patches.keys]
    assert patches.splits == [plan[key][1] for key in patches.keys]


def test_slices_of_shards_together_make_the_whole_cache(
    finished: Path,
    make_config: MakeConfig,
    backbone: Backbone,
    digests: Callable[[Path], dict[str, str]],
) -> None:
    config = make_config(shard_of="0/2")
    assert run_extraction(config, backbone=backbone).shards_done_now == 2
    assert read_done(config.out, 1) is None
    assert run_extraction(make_config(shard_of="1/2"), backbone=backbone).shards_done_now == 1
    assert digests(Path(config.out)) == digests(finished)


def test_slices_of_machines_without_a_common_folder_are_put_together(
    finished: Path,
    make_config: MakeConfig,
    backbone: Backbone,
    tmp_path: Path,
    digests: Callable[[Path], dict[str, str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    here, there = (make_config(shard_of=f"{i}/2", out=str(tmp_path / f"{i}")) for i in (0, 1))
    run_extraction(here, backbone=backbone)
    assert "2 of 3 shards are done" in caplog.text
    assert "copied into it and the command is run again" in caplog.text
    run_extraction(there, backbone=backbone)
    shutil.copytree(Path(there.out, "shards"), Path(here.out, "shards"), dirs_exist_ok=True)
    summary = run_extraction(here, backbone=backbone)
    assert "(60 frames, " in summary.summary_line()
    assert "in 3 shards, none to make; 1 of 6 clips in quarantine" in summary.summary_line()
    assert digests(Path(here.out)) == digests(finished)


def test_first_shards_of_a_limit_are_those_of_the_whole_cache(
    finished: Path, make_config: MakeConfig, backbone: Backbone
) -> None:
    config = make_config(limit=4, max_quarantined=0.5)
    assert run_extraction(config, backbone=backbone).clips == 4
    for shard in (0, 1):
        mine, whole = read_done(config.out, shard), read_done(finished, shard)
        assert mine is not None
        assert mine == whole


@pytest.mark.parametrize("kind", ["file", "tar"])
def test_video_that_changes_between_plan_and_run_is_quarantined(
    clips: Path,
    make_config: MakeConfig,
    backbone: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in (0, 1):
        shutil.copy(clips / f"c{number}.mp4", folder)
    if kind == "tar":
        with tarfile.open(folder / "w.tar", "w") as tar:
            tar.add(clips / "c2.mp4", arcname="c2.mp4")
    victim = folder / ("w.tar" if kind == "tar" else "c1.mp4")
    begin = Backbone.black_tokens  # called after the plan is written, before any clip is decoded

    def change(self: Backbone, frame_size: int) -> object:
        victim.write_bytes(victim.read_bytes()[:-100])
        return begin(self, frame_size)

    monkeypatch.setattr(Backbone, "black_tokens", change)
    config = make_config(videos=(str(folder),), max_quarantined=1.0)
    assert run_extraction(config, backbone=backbone).quarantined == 1
    (line,) = (Path(config.out) / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["clip"] == ("w/c2.mp4" if kind == "tar" else "c1.mp4")
    assert "was changed" in json.loads(line)["reason"]
