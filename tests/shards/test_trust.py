"""What a reader takes for the shard it was promised: missing, empty, swapped, linked, stale."""

import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import CacheMismatch, DamagedShard, DeltaShards, PatchShards
from deltatok.shards.cache import NOTICE, finish_cache, reopen_cache
from deltatok.shards.deltas.writer import write_delta_shard
from deltatok.shards.files import sha256_file
from deltatok.shards.index import INDEX
from deltatok.shards.patches.writer import write_patch_shard
from deltatok.shards.tools.info import describe_cache
from deltatok.shards.tools.repair import repair_cache
from deltatok.shards.tools.verify import verify_cache


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cache counts as large: its files are not looked at when it is opened."""
    monkeypatch.setattr("deltatok.shards.reader.EAGER_SHARDS", 0)


def equal_shards(little: Any, folder: Path, *, kind: str) -> Path:
    """A cache of two shards whose files have the same sizes."""
    cache = little.make_patches(folder) if kind == "patches" else little.make_deltas(folder)
    keys = [entry.key for entry in cache.plan if entry.shard == 1]
    if kind == "patches":
        rows = little.patch_rows(5, keys, seed=9)
        write_patch_shard(folder, 1, rows, dtype="float16", seed=7)
    else:
        rows = little.delta_rows(5, keys, seed=9)
        write_delta_shard(folder, 1, rows, block_windows=2)
    finish_cache(folder)
    return folder


def swap(first: Path, second: Path) -> None:
    third = first.with_name("third")
    first.rename(third)
    second.rename(first)
    third.rename(second)


def test_a_patch_shard_swapped_with_another_says_so_itself(little: Any, tmp_path: Path) -> None:
    folder = equal_shards(little, tmp_path / "cache", kind="patches")
    first, second = (folder / f"shards/00000{shard}.zarr.zip" for shard in range(2))
    if first.stat().st_size != second.stat().st_size:
        pytest.fail("the two files must be equally long")
    swap(first, second)
    for verify, words in (("size", "attribute keys is not that"), ("sha256", "another shard's")):
        reader = PatchShards(folder, verify=verify)
        for read in (reader.tokens, reader.stored_tokens, reader.timestamps_s):
            with pytest.raises((CacheMismatch, DamagedShard), match=words):
                read([0])
    assert verify_cache(folder).damaged == [0, 1]


def test_a_tar_swapped_with_another_shards_is_refused(little: Any, tmp_path: Path) -> None:
    folder = equal_shards(little, tmp_path / "cache", kind="deltas")
    first, second = (folder / f"shards/00000{shard}.tar" for shard in range(2))
    if first.stat().st_size != second.stat().st_size:
        pytest.fail("the two files must be equally long")
    swap(first, second)
    for read in ("tokens", "timestamps_s", "window"):
        with pytest.raises(DamagedShard, match=r"shard 000000: .*000000\.tar.*another shard's"):
            getattr(DeltaShards(folder), read)([0] if read != "window" else 0)


@contextmanager
def file_operations() -> Iterator[list[tuple[str, str]]]:
    """The names of the files that are opened or listed within, by Python's own audit."""
    seen: list[tuple[str, str]] = []
    is_on = [True]

    def note(event: str, details: tuple[Any, ...]) -> None:
        # A number is a descriptor that was opened before.
        is_file = is_on and details and not isinstance(details[0], int)
        if is_file and event in ("open", "os.listdir", "os.scandir"):
            seen.append((event, Path(str(details[0])).name))

    sys.addaudithook(note)  # for ever
    yield seen
    is_on.clear()


@pytest.mark.parametrize("verify", ["size", "sha256"])
@pytest.mark.parametrize("kind", ["patches", "deltas"])
def test_a_finished_cache_opens_by_cache_json_and_index_alone(
    request: pytest.FixtureRequest, kind: str, verify: Any
) -> None:
    cache = request.getfixturevalue(kind)
    with file_operations() as seen:
        reader: Any = (PatchShards if kind == "patches" else DeltaShards)(
            cache.folder, verify=verify
        )
        opened = list(seen)
        assert reader.num_windows == 11
        assert reader.arrangement.startswith("sha256:")
        assert seen == opened
        assert reader.keys == [entry.key for entry in cache.plan]
        planned = seen[len(opened) :]
    assert opened == [("open", "cache.json"), ("open", INDEX)]
    assert planned[0] == ("open", "plan.json")
    assert len(set(planned)) == 2
    wanted = cache.expected["tokens"].astype(np.float16)
    np.testing.assert_array_equal(reader.tokens([7, 2, 10]).astype(np.float16), wanted[[7, 2, 10]])
    names = [reader.keys[clip] for clip in reader.clip_index]
    assert names == cache.expected["key"].tolist()


@pytest.mark.parametrize("kind", ["patches", "deltas"])
def test_each_shard_is_hashed_once_by_threads_forks_and_pickled_readers(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    hashed: list[str] = []

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    folder = request.getfixturevalue(kind).folder
    monkeypatch.setattr("deltatok.shards.records.sha256_file", counting)
    reader: Any = (PatchShards if kind == "patches" else DeltaShards)(folder, verify="sha256")
    assert hashed == []
    reader.tokens([0])
    assert [name.partition(".")[0] for name in hashed] == ["000000"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda window: reader.tokens([window % 11]), range(200)))
    reader.load()
    assert sorted(name.partition(".")[0] for name in hashed) == ["000000", "000001"]
    with file_operations() as seen:
        again = pickle.loads(pickle.dumps(reader))
        assert seen == []
    np.testing.assert_array_equal(again.tokens([10, 0]), reader.tokens([10, 0]))
    assert len(hashed) == 2
    if (child := os.fork()) == 0:
        good = np.array_equal(again.tokens([10, 0]), reader.tokens([10, 0])) and len(hashed) == 2
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "cannot be read"),
        (lambda path: path.write_bytes(b""), "0 bytes, the done-record says"),
    ],
)
def test_a_missing_or_empty_file_of_a_large_cache_is_refused_on_read(
    patches: Any, damage: Any, words: str
) -> None:
    reader = PatchShards(patches.folder)
    reader.tokens([0])
    damage(patches.folder / "shards/000001.zarr.zip")
    with pytest.raises(DamagedShard, match=f"shard 000001: .*{words}"):
        reader.tokens([10])


def test_a_missing_file_of_a_small_cache_is_refused_on_opening(patches: Any) -> None:
    (patches.folder / "shards/000001.zarr.zip").rename(patches.folder / "elsewhere")
    with pytest.raises(DamagedShard, match=r"shard 000001: .*000001.zarr.zip: cannot be read"):
        PatchShards(patches.folder)


def test_a_shard_that_was_made_again_behind_the_index_is_noticed(little: Any, deltas: Any) -> None:
    rows = little.delta_rows(5, deltas.rows[0].keys, seed=11)
    write_delta_shard(deltas.folder, 0, rows, block_windows=2)
    with pytest.raises(DamagedShard, match=r"000000\.tar: its SHA-256 is not that"):
        DeltaShards(deltas.folder).tokens([0])
    assert verify_cache(deltas.folder).damaged == [0]
    finish_cache(deltas.folder)
    np.testing.assert_array_equal(DeltaShards(deltas.folder).tokens(np.arange(5)), rows.tokens)


def put_index(folder: Path, data: bytes) -> None:
    """As index.jsonl, and in cache.json: what only a forger, or a later release, does."""
    (folder / INDEX).write_bytes(data)
    path = folder / "cache.json"
    value = json.loads(path.read_text())
    value["files"][INDEX] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(value))


def test_an_index_that_is_missing_cut_or_of_another_cache_is_refused(
    little: Any, patches: Any, tmp_path: Path
) -> None:
    path, other = patches.folder / INDEX, little.make_patches(tmp_path / "o", dtype="bfloat16")
    good = path.read_bytes()
    for data, words in (
        (
            good[:-1],
            r"index\.jsonl: \d+ bytes, cache\.json says \d+: it was cut, or is the index of",
        ),
        ((other.folder / INDEX).read_bytes(), "is not the one that cache.json tells of: .*another"),
        (None, "cannot be read"),
    ):
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(DamagedShard, match=f"{words}.*verify --repair"):
            PatchShards(patches.folder)
        assert any(INDEX in problem.text for problem in verify_cache(patches.folder).problems)
    repair_cache(patches.folder, verify_cache(patches.folder))
    assert path.read_bytes() == good
    assert PatchShards(patches.folder).num_windows == 11


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [lines[0].replace(b":1,", b":2,"), *lines[1:]], "format_version 2, this"),
        (lambda lines: [lines[0].replace(b"rows", b"r"), *lines[1:]], "line 1: format_version 1"),
        (lambda lines: lines[:2], "has 1 shards with 5 windows, cache.json says 2 with 11"),
        (lambda lines: [*lines[:2], lines[2][:-1]], "lines 2 to 3: wanted a list on each"),
        (lambda lines: [*lines[:2], lines[1] + b"," + lines[2]], "wanted one list on each"),
        (lambda lines: [*lines[:2], b'{"clips":3}'], "wanted a list on each"),
        (lambda lines: [*lines[:2], b"[3]"], "wanted lists of 5"),
        (lambda lines: [*lines[:2], lines[2].replace(b"[3,6", b"[3,6.0")], "rows: wanted integers"),
        (lambda lines: [*lines[:2], lines[2].replace(b"[3,6", b"[3,-6")], "rows: wanted integers"),
        (lambda lines: [*lines[:2], lines[2].replace(b"[3,6", b"[3,true")], "rows: wanted int"),
        (lambda lines: [*lines[:2], lines[2].replace(b"[3,6", b"[3,9999999999")], "at most"),
        (lambda lines: [*lines[:2], lines[2].replace(b"[3,6", b"[3,0")], "a file where there are"),
        (lambda lines: [*lines[:2], lines[2][:-3] + b'"]'], "hashes of 64 hex digits"),
        (lambda lines: [*lines[:2], lines[2][:-4] + b'zz"]'], "hashes of 64 hex digits"),
        (lambda lines: [*lines[:2], b" " * 5000 + lines[2]], "wanted a list on each|too long"),
    ],
)
def test_a_made_up_index_is_refused_by_the_line(patches: Any, change: Any, words: str) -> None:
    lines = (patches.folder / INDEX).read_bytes().splitlines()
    put_index(patches.folder, b"\n".join(change(lines)) + b"\n")
    with pytest.raises((DamagedShard, CacheMismatch), match=words):
        PatchShards(patches.folder)


def test_an_index_whose_last_line_has_no_end_is_refused(patches: Any) -> None:
    put_index(patches.folder, (patches.folder / INDEX).read_bytes()[:-1])
    with pytest.raises(DamagedShard, match="its last line is cut"):
        PatchShards(patches.folder)


def test_a_done_record_of_a_later_release_is_refused(patches: Any) -> None:
    path = patches.folder / "shards/000000.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    reopen_cache(patches.folder)
    with pytest.raises(CacheMismatch, match=r"000000.json: format_version 2, .*reads up to 1"):
        PatchShards(patches.folder, allow_incomplete=True)


@pytest.mark.usefixtures("large")
def test_an_unfinished_cache_is_read_by_its_records(patches: Any) -> None:
    reopen_cache(patches.folder)
    (patches.folder / "shards/000001.json").unlink()
    assert PatchShards(patches.folder, allow_incomplete=True).num_windows == 5


@pytest.mark.parametrize("name", ["000000.zarr.zip", "."])
def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(
    patches: Any, tmp_path: Path, name: str
) -> None:
    path = patches.folder / "shards" / name
    outside = tmp_path / "outside"
    shutil.move(path, outside)
    (patches.folder / "shards" / name if name != "." else patches.folder / "shards").symlink_to(
        outside
    )
    with pytest.raises(DamagedShard, match=r"shard 000000: .*is a link to .*outside of the cache"):
        PatchShards(patches.folder)
    assert any("is a link to" in problem.text for problem in verify_cache(patches.folder).problems)


def test_a_cache_that_is_a_link_itself_is_read(patches: Any, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(patches.folder)
    assert PatchShards(tmp_path / "link").tokens([0, 10]).shape == (2, 3, 4, 6)
    assert verify_cache(tmp_path / "link").problems == []


@pytest.mark.parametrize("name", ["cache.json", "plan.json", "black.npy", "shards/000000.json"])
def test_pipes_and_devices_in_place_of_files_are_refused_at_once(patches: Any, name: str) -> None:
    for make in (os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero")):
        path = patches.folder / name
        path.unlink()
        make(path)
        if name != "cache.json":
            assert verify_cache(patches.folder).problems
        if name.startswith("shards/"):
            continue  # no reader of a finished cache reads it
        with pytest.raises((DamagedShard, ValueError)):
            reader = PatchShards(patches.folder)
            _ = reader.black, reader.labels


def test_every_cache_carries_its_terms(patches: Any, deltas: Any) -> None:
    for cache in (patches, deltas):
        text = (cache.folder / NOTICE).read_text()
        assert cache.info.licence in text
        assert "DINOv3 License" in text
        assert describe_cache(cache.folder)["licence"] == cache.info.licence
    (patches.folder / NOTICE).unlink()
    assert any(NOTICE in problem.text for problem in verify_cache(patches.folder).problems)


@pytest.mark.parametrize("edit", [("DINOv3 License", "Public Domain"), ("checksum", "chocksum")])
def test_verify_finds_any_edit_of_cache_json(patches: Any, edit: tuple[str, str]) -> None:
    path = patches.folder / "cache.json"
    path.write_text(path.read_text().replace(*edit))
    assert any(
        "changed by hand" in problem.text for problem in verify_cache(patches.folder).problems
    )


def test_shards_under_the_cache_json_of_another_cache_are_refused(
    little: Any, patches: Any, tmp_path: Path
) -> None:
    other = little.make_patches(tmp_path / "other", dtype="bfloat16")
    shutil.copy(other.folder / "cache.json", patches.folder / "cache.json")
    with pytest.raises(DamagedShard, match="or is the index of another cache"):
        PatchShards(patches.folder)
