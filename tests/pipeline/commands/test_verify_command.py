"""deltatok-shards verify as users run it: names, exit codes, JSON, repair and extraction after."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deltatok.pipeline.commands.extract import main as extract
from deltatok.pipeline.commands.shards import main as shards
from deltatok.shards.files import partial_path

Fails = Callable[..., None]


def extraction(root: Path, out: Path) -> list[str]:
    words = ["--videos", str(root / "world/train"), "--out", str(out), "--workers", "1"]
    words += ["--backbone", str(root / "backbone"), "--frame-size", "32", "--num-frames", "2"]
    return [*words, "--windows", "2", "--frames-per-shard", "4"]


@pytest.fixture(scope="module")
def extracted(tiny_inputs: Path) -> Path:
    """A patch cache of three clips in three shards."""
    out = tiny_inputs / "verified"
    assert extract(extraction(tiny_inputs, out)) == 0
    return out


@pytest.fixture
def cache(extracted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(extracted, tmp_path / "cache"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timings.jsonl"
    }


def test_every_problem_is_named_and_written(
    cache: Path, tmp_path: Path, fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "shards/000000.zarr.zip").unlink()
    (cache / "shards/stranger").touch()
    words = ["verify", str(cache), "--json", str(tmp_path / "found.json")]
    assert shards(words) == 1
    said = capsys.readouterr()
    assert "000000.zarr.zip: cannot be read" in said.out
    assert "shards/stranger: 1 files in no done-record" in said.out
    assert "2 problems in all" in said.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["damaged_shards"] == [0]
    assert found["orphans"] == {"shards/stranger": 1}
    assert len(found["problems"]) == 2
    fails(shards, ["verify", str(tmp_path / "missing")], 2, "no such folder")


def test_what_repair_removes_is_made_again_byte_for_byte(
    tiny_inputs: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(cache)
    path = cache / "shards/000001.zarr.zip"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    (cache / "shards/000002.json").unlink()
    (cache / "shards/000002.zarr.zip.partial-999999999-0123abcd").touch()
    assert shards(["verify", str(cache), "--repair"]) == 0
    said = capsys.readouterr().out
    assert f"removed {cache}/shards/000001.json" in said
    assert "run the command that made it again" in said
    assert extract(extraction(tiny_inputs, cache)) == 0
    assert shards(["verify", str(cache), "--deep"]) == 0
    assert contents(cache) == before


def test_what_repair_may_not_mend_is_an_error(cache: Path, fails: Fails) -> None:
    (cache / "black.npy").write_bytes(b"x")
    fails(shards, ["verify", str(cache), "--repair"], 1, "nothing here may mend", "black.npy")


def test_what_is_left_is_judged_by_its_kind_not_by_its_words(
    cache: Path, tmp_path: Path, fails: Fails
) -> None:
    folder = cache.rename(tmp_path / "x: not marked: not finished: y")
    (folder / "black.npy").write_bytes(b"x")
    fails(shards, ["verify", str(folder), "--repair"], 1, "nothing here may mend", "black.npy")


def test_a_whole_cache_says_how_deep_it_was_looked_at(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, words in ([], "every byte"), (["--deep"], "every value"):
        assert shards(["verify", str(cache), *flags]) == 0
        assert f"{words} checked: ok" in capsys.readouterr().out


def test_nothing_is_repaired_while_somebody_writes(cache: Path, fails: Fails) -> None:
    path = cache / "shards/000001.zarr.zip"
    path.write_bytes(b"")
    own = partial_path(cache / "shards/000002.zarr.zip")
    partial = own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-"))
    partial.touch()
    fails(shards, ["verify", str(cache), "--repair"], 2, f"{partial}: a process is writing to it")
    assert path.exists()
    partial.rename(own)  # of a process that ended
    assert shards(["verify", str(cache), "--repair"]) == 0
    assert not path.exists()
    assert not own.exists()


def test_a_repair_that_cannot_write_says_so(cache: Path, fails: Fails) -> None:
    (cache / "quarantine.jsonl").unlink()
    (cache / "quarantine.jsonl").mkdir()
    fails(shards, ["verify", str(cache), "--repair"], 2, "quarantine.jsonl", "cannot be")
