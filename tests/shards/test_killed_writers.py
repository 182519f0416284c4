"""Killed anywhere: a shard is whole and promised, or it is not there and is made again."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deltatok.shards import DeltaShards, PatchShards
from deltatok.shards.cache import finish_cache, reopen_cache
from deltatok.shards.deltas.writer import write_delta_shard
from deltatok.shards.files import (
    create_bytes,
    is_partial,
    partial_path,
    publish,
    remove,
    remove_partials,
    sha256_file,
    write_bytes,
)
from deltatok.shards.patches.writer import write_patch_shard
from deltatok.shards.records import read_done
from deltatok.shards.tools.verify import verify_cache

STEPS = ("replace", "rename", "unlink", "rmdir", "mkdir")
"""What gives and takes names; between two of them a kill leaves the same folder."""


class Killed(BaseException):
    """What a kill looks like from inside: nothing after it runs."""


class Killer:
    """Lets `steps` of these calls happen, then none any more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        for name in STEPS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            if self.left == 0:
                raise Killed
            self.left -= 1
            return call(*arguments, **keywords)

        return counted


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("kind", ["patches", "deltas"])
@pytest.mark.parametrize("again", [False, True], ids=["first_time", "shard_was_done"])
def test_a_writer_killed_at_any_step_loses_nothing(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str, again: bool
) -> None:
    cache = request.getfixturevalue(kind)

    def write() -> None:
        if kind == "patches":
            write_patch_shard(cache.folder, 1, cache.rows[1], dtype="float16", seed=7)
        else:
            write_delta_shard(cache.folder, 1, cache.rows[1], block_windows=2)

    wanted = tree(cache.folder)
    record = cache.folder / "shards/000001.json"
    killer = Killer(monkeypatch)
    kills = 0
    for steps in range(0, 1000, 3 if again else 1):
        if not again:
            record.unlink(missing_ok=True)
        killer.left = steps
        try:
            write()
        except Killed:
            kills += 1
        else:
            break
        finally:
            killer.left = -1
        if read_done(cache.folder, 1) is not None:
            # Promised, so it is there, whole: the old one or the new one.
            found = tree(cache.folder)
            assert {name: found[name] for name in wanted} == wanted
        write()
        remove_partials(cache.folder / "shards")
        assert tree(cache.folder) == wanted
    assert kills > 0
    assert verify_cache(cache.folder, deep=True).problems == []


def test_a_leftover_without_done_record_is_replaced(patches: Any, deltas: Any) -> None:
    wanted = tree(patches.folder)
    (patches.folder / "shards/000000.json").unlink()
    (patches.folder / "shards/000000.zarr.zip").write_bytes(b"half")
    write_patch_shard(patches.folder, 0, patches.rows[0], dtype="float16", seed=7)
    assert tree(patches.folder) == wanted

    wanted = tree(deltas.folder)
    (deltas.folder / "shards/000000.json").unlink()
    (deltas.folder / "shards/000000.tar").write_bytes(b"half")
    write_delta_shard(deltas.folder, 0, deltas.rows[0], block_windows=2)
    assert tree(deltas.folder) == wanted


def test_readers_do_not_see_a_shard_without_done_record(patches: Any, little: Any) -> None:
    (patches.folder / "shards/000001.json").unlink()
    (patches.folder / "shards/000002.zarr.zip").touch()
    reopen_cache(patches.folder)
    assert PatchShards(patches.folder, allow_incomplete=True).num_windows == 5


def test_leftover_partials_do_not_disturb_readers(patches: Any, deltas: Any) -> None:
    for folder, reader in ((patches.folder, PatchShards), (deltas.folder, DeltaShards)):
        (folder / "shards/000007.zarr.zip.partial-1-0123abcd").touch()
        (folder / "shards/000007.json.partial-1-0123abcd").write_text("{")
        (folder / "cache.json.partial-1-0123abcd").write_text("{")
        reader(folder)
        finish_cache(folder)
        assert len(verify_cache(folder).problems) == 3


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_partials_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    mine = partial_path(tmp_path / "x.tar")
    suffix = mine.name.rsplit("-", 1)[1]
    dead = tmp_path / f"x.zarr.partial-{dead_process()}-{suffix}"
    huge = tmp_path / f"x.tar.partial-{10**30}-{suffix}"
    living = tmp_path / f"x.tar.partial-{os.getppid()}-{suffix}"
    (dead / "tokens").mkdir(parents=True)
    (dead / "tokens/c").write_bytes(b"half")
    others = [tmp_path / "x.tar", tmp_path / "partial-1-0", tmp_path / "x.partial-1-01234567.json"]
    for path in (mine, huge, living, *others):
        path.touch()
    assert sorted(remove_partials(tmp_path)) == sorted([mine, dead, huge])
    assert sorted(tmp_path.iterdir()) == sorted([living, *others])
    assert remove_partials(tmp_path / "missing") == []


def test_two_processes_may_remove_the_same_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "000000.zarr.partial-1-00000000"
    partial.mkdir()
    (partial / "zarr.json").touch()
    (partial / "other").touch()
    rmtree = shutil.rmtree

    def interrupted(path: Path) -> None:
        """As rmtree does where another one unlinks a file that it has listed."""
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        (path / "zarr.json").unlink()
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    remove(partial)
    assert not partial.exists()


def test_partials_of_other_machines_are_kept_for_a_day(tmp_path: Path) -> None:
    suffix = partial_path(tmp_path / "x").name.rsplit("-", 1)[1]
    other = "0000" if suffix[:4] != "0000" else "1111"
    fresh, stale = (tmp_path / f"x.partial-1-{other}000{index}" for index in range(2))
    fresh.touch()
    stale.touch()
    os.utime(stale, (1e9, 1e9))
    assert remove_partials(tmp_path) == [stale]


def test_partial_names_are_fresh_and_known(tmp_path: Path) -> None:
    names = {partial_path(tmp_path / "000000.zarr").name for _ in range(20)}
    assert len(names) > 15
    assert all(is_partial(Path(name)) for name in names)
    assert not is_partial(tmp_path / "000000.zarr")


def test_a_failed_write_leaves_the_old_file_and_no_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_bytes(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deltatok.shards.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["patches", "deltas"])
def test_a_shard_that_another_process_finished_meanwhile_is_not_touched(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """At no moment is a promised file away, so a kill of the second writer cannot lose it."""
    cache = request.getfixturevalue(kind)
    data = [path for path in (cache.folder / "shards").rglob("*") if path.suffix != ".json"]
    before = {path: path.stat().st_ino for path in data}
    killer = Killer(monkeypatch)
    if kind == "patches":
        write_patch_shard(cache.folder, 1, cache.rows[1], dtype="float16", seed=7)
    else:
        write_delta_shard(cache.folder, 1, cache.rows[1], block_windows=2)
    assert killer.left < -1  # it did count
    assert {path: path.stat().st_ino for path in data} == before


def test_a_shard_that_appears_while_it_is_moved_is_taken_as_it_is(
    patches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tree(patches.folder)
    final, aside = patches.folder / "shards/000001.zarr.zip", patches.folder / "aside"
    final.rename(aside)
    (patches.folder / "shards/000001.json").unlink()

    def late(partial: Path, final: Path) -> None:
        aside.rename(final)  # the other process is a moment faster
        partial.rename(final)

    monkeypatch.setattr("deltatok.shards.records.publish", late)
    write_patch_shard(patches.folder, 1, patches.rows[1], dtype="float16", seed=7)
    assert tree(patches.folder) == wanted


def test_of_many_that_create_a_file_at_once_one_does(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: create_bytes(path, b"%d" % n), range(8)))
    assert sum(made) == 1
    assert path.read_bytes() == b"%d" % made.index(True)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["patches", "deltas"])
def test_a_failed_shard_leaves_the_old_one_and_no_partial(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    cache = request.getfixturevalue(kind)
    wanted = tree(cache.folder)
    suffix = ".zarr.zip" if kind == "patches" else ".tar"
    remove(cache.folder / f"shards/000001{suffix}")  # else it is there already, as it would be

    def full(partial: Path, final: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deltatok.shards.records.publish", full)
    with pytest.raises(OSError, match="No space left"):
        if kind == "patches":
            write_patch_shard(cache.folder, 1, cache.rows[1], dtype="float16", seed=7)
        else:
            write_delta_shard(cache.folder, 1, cache.rows[1], block_windows=2)
    left = {name for name in wanted if "000001" not in name}
    assert left <= set(tree(cache.folder)) <= set(wanted)
    assert read_done(cache.folder, 1) is None


def test_publish_replaces_a_folder(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    publish(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["old", "new"]


def test_everything_is_flushed_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this a power cut can leave a named file of zeros."""
    events: list[str] = []

    def fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    replace = os.rename

    def rename(source: Any, target: Any) -> None:
        events.append(f"-> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)
    partial = tmp_path / "group.partial"
    (partial / "tokens").mkdir(parents=True)
    (partial / "tokens/data").touch()
    publish(partial, tmp_path / "group")
    assert events == ["data", "tokens", "group.partial", "-> group", tmp_path.name]
