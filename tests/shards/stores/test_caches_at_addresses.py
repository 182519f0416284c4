"""A cache at an address is read, made and copied as one in a folder is."""

import hashlib
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import CacheMismatch, DamagedShard, DeltaShards, PatchShards, UsageError
from deltatok.shards.cache import checksum, finish_cache, open_cache, reopen_cache
from deltatok.shards.deltas.writer import write_delta_shard
from deltatok.shards.plan import make_plan, write_plan
from deltatok.shards.records import done_shards, remove_done
from deltatok.shards.stores import upload as uploads
from deltatok.shards.stores.mirror import CACHE_LIMIT, cache_dir, local_folder
from deltatok.shards.stores.push import pull, push
from deltatok.shards.stores.store import ObjectStore, StoredObject, open_store
from deltatok.shards.stores.upload import out_folder
from deltatok.shards.tools.verify import verify_cache

Count = Callable[[], list[str]]
every_store = pytest.mark.parametrize("address", ["file", "s3", "hf"], indirect=True)
folder_store = pytest.mark.parametrize("address", ["file"], indirect=True)


def quiet(_: int) -> None:
    pass


def files(folder: Path) -> dict[str, bytes]:
    """All that belongs to the cache."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("timings.jsonl", "upload.json")
    }


def stored(address: str) -> dict[str, bytes]:
    store = open_store(address)
    return {item.name: b"".join(store.chunks(item.name)) for item in store.list()}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that object stores were asked for, by get and list."""
    names: list[str] = []
    get, listing = ObjectStore.chunks, ObjectStore.list

    def chunks(self: ObjectStore, name: str, *, stamp: str = "") -> Any:
        names.append(name)
        return get(self, name, stamp=stamp)

    def listed(self: ObjectStore, prefix: str = "") -> Any:
        names.append(f"list {prefix}")
        return listing(self, prefix)

    monkeypatch.setattr(ObjectStore, "chunks", chunks)
    monkeypatch.setattr(ObjectStore, "list", listed)
    return names


@every_store
def test_pushed_cache_is_read_from_its_address(address: str, patches: Any) -> None:
    done = push(patches.folder, address, progress=quiet)
    assert (done.shards, done.moved) == (2, 2)
    reader, local = PatchShards(address), PatchShards(patches.folder)
    windows = np.arange(len(local))
    np.testing.assert_array_equal(reader.tokens(windows), local.tokens(windows))
    np.testing.assert_array_equal(reader.black, local.black)
    assert (reader.keys, reader.labels) == (local.keys, local.labels)
    assert (reader.fingerprint, reader.arrangement) == (local.fingerprint, local.arrangement)


@every_store
def test_pushed_and_pulled_is_the_same(address: str, deltas: Any, tmp_path: Path) -> None:
    push(deltas.folder, address, progress=quiet)
    done = pull(address, tmp_path / "again", progress=quiet)
    assert done.moved == 2
    assert files(tmp_path / "again") == files(deltas.folder)
    assert verify_cache(tmp_path / "again", deep=True).problems == []


@every_store
def test_pushed_again_moves_nothing(address: str, deltas: Any, tmp_path: Path) -> None:
    push(deltas.folder, address, progress=quiet)
    before = stored(address)
    assert push(deltas.folder, address, progress=quiet).moved == 0
    assert stored(address) == before
    pull(address, tmp_path / "again", progress=quiet)
    assert pull(address, tmp_path / "again", progress=quiet).moved == 0


@folder_store
def test_push_that_was_stopped_goes_on(
    address: str, deltas: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = ObjectStore.create

    def fails(self: ObjectStore, new: Any) -> bool:
        if any(file.name.startswith("shards/000001") for file in new):
            raise KeyboardInterrupt
        return create(self, new)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "create", fails)
        with pytest.raises(KeyboardInterrupt):
            push(deltas.folder, address, progress=quiet)
    with pytest.raises(CacheMismatch, match=r"no cache\.json"):
        DeltaShards(address)
    assert push(deltas.folder, address, progress=quiet).moved == 1
    assert len(DeltaShards(address)) == len(DeltaShards(deltas.folder))


@folder_store
def test_address_of_another_cache_takes_no_push(address: str, deltas: Any, patches: Any) -> None:
    push(deltas.folder, address, progress=quiet)
    with pytest.raises(CacheMismatch, match="another cache"):
        push(patches.folder, address, progress=quiet)
    with pytest.raises(CacheMismatch, match="delta"):
        PatchShards(address)


@folder_store
def test_damaged_shard_is_not_pushed(address: str, deltas: Any, little: Any) -> None:
    little.flip_byte(deltas.folder / "shards" / "000001.tar", 2000)
    with pytest.raises(DamagedShard, match="000001"):
        push(deltas.folder, address, progress=quiet)


@folder_store
def test_opening_asks_for_the_files_beside_the_shards_alone(
    address: str, patches: Any, asked: list[str]
) -> None:
    push(patches.folder, address, progress=quiet)
    asked.clear()
    reader = PatchShards(address)
    assert len(asked) <= 6
    assert not any(name.startswith(("shards/", "list")) for name in asked)
    asked.clear()
    reader.tokens([0])
    assert asked == ["shards/000000.zarr.zip"]
    PatchShards(address).tokens([0, 1])
    assert asked[1:] == ["cache.json"]


@folder_store
def test_flipped_byte_in_the_store_is_refused_by_name(
    address: str, deltas: Any, little: Any
) -> None:
    push(deltas.folder, address, progress=quiet)
    little.flip_byte(Path(address.removeprefix("file://")) / "shards" / "000001.tar", 2000)
    reader = DeltaShards(address)
    reader.tokens([0])
    with pytest.raises(DamagedShard, match=r"shards/000001\.tar"):
        reader.tokens([len(reader) - 1])
    assert not (reader.folder / "shards" / "000001.tar").exists()


def tell(address: str, files: dict[str, Any]) -> None:
    """Adds these to what the cache.json at an address says of files."""
    store = open_store(address)
    info = json.loads(store.read("cache.json", max_bytes=10**6) or b"")
    info["files"] |= files
    store.replace("cache.json", json.dumps({**info, "checksum": checksum(info)}).encode())


@folder_store
@pytest.mark.parametrize(
    "name", ["../evil", "/tmp/evil", "a/b", "..", "", "a\0", "mirror.json", "cache.json"]
)
def test_file_of_a_hostile_cache_json_leaves_no_folder(
    address: str, deltas: Any, tmp_path: Path, name: str
) -> None:
    push(deltas.folder, address, progress=quiet)
    evil = b"evil"
    (Path(address.removeprefix("file://")).parent / "evil").write_bytes(evil)
    tell(address, {name: {"bytes": 4, "sha256": hashlib.sha256(evil).hexdigest()}})
    for take in (DeltaShards, lambda url: pull(url, tmp_path / "in" / "pulled", progress=quiet)):
        with pytest.raises(DamagedShard, match="names the file"):
            take(address)
    assert not (tmp_path / "in").exists()


@folder_store
def test_stored_names_that_are_paths_are_not_taken(
    address: str, little: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_again(address, little)
    names = ["plan/../../../evil", "shards/../../../evil.json", "plan/x", "../cache.json"]
    listed = ObjectStore.list

    def hostile(self: ObjectStore, prefix: str = "") -> Any:
        yield from listed(self, prefix)
        yield from (StoredObject(name, 4, "") for name in names)

    fetched: list[str] = []
    fetch = ObjectStore.fetch

    def noted(self: ObjectStore, name: str, *given: Any, **named: Any) -> None:
        fetched.append(name)
        fetch(self, name, *given, **named)

    monkeypatch.setattr(ObjectStore, "list", hostile)
    monkeypatch.setattr(ObjectStore, "fetch", noted)
    out_folder(address)
    assert not set(names) & set(fetched)
    assert "cache.json" in fetched


@folder_store
def test_mirrored_file_that_was_cut_is_fetched_again(address: str, deltas: Any) -> None:
    push(deltas.folder, address, progress=quiet)
    tokens = DeltaShards(address).tokens([0])
    (shard,) = (DeltaShards(address).folder / "shards").glob("*.tar")
    os.truncate(shard, 100)
    np.testing.assert_array_equal(DeltaShards(address).tokens([0]), tokens)


@folder_store
def test_changed_cache_gets_a_new_mirror(address: str, deltas: Any, little: Any) -> None:
    push(deltas.folder, address, progress=quiet)
    before = local_folder(address)
    store = open_store(address)
    info = json.loads(store.read("cache.json", max_bytes=10**6) or b"")
    store.replace("cache.json", json.dumps(info, indent=2).encode())
    assert local_folder(address) != before


@folder_store
def test_pickled_reader_reads_on(address: str, deltas: Any) -> None:
    push(deltas.folder, address, progress=quiet)
    reader = pickle.loads(pickle.dumps(DeltaShards(address)))
    local = DeltaShards(deltas.folder)
    np.testing.assert_array_equal(reader.tokens([0, 3]), local.tokens([0, 3]))


@folder_store
@pytest.mark.parametrize("kind", ["patches", "deltas"])
def test_least_recently_used_shard_makes_room(
    address: str, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(kind).folder
    push(folder, address, progress=quiet)
    sizes = [path.stat().st_size for path in sorted((folder / "shards").glob("*[!n]"))]
    monkeypatch.setenv(CACHE_LIMIT, str(max(sizes) * 1.5 / 1e9))
    kind_of = PatchShards if kind == "patches" else DeltaShards
    reader, local = kind_of(address), kind_of(folder)
    last = len(local) - 1
    for window in (0, last, 0, last, last, 0):
        fresh = kind_of(address)
        for opened in (reader, fresh):
            np.testing.assert_array_equal(opened.tokens([window]), local.tokens([window]))
    kept = sum(path.stat().st_size for path in cache_dir().glob("mirrors/*/shards/*[!n]"))
    assert kept <= max(sizes) * 1.5


@folder_store
def test_limit_below_a_shard_is_refused(
    address: str, deltas: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(deltas.folder, address, progress=quiet)
    monkeypatch.setenv(CACHE_LIMIT, "1e-6")
    with pytest.raises(UsageError, match="cache-limit-gb"):
        DeltaShards(address).tokens([0])
    for text in ("none", "-1", "nan"):
        monkeypatch.setenv(CACHE_LIMIT, text)
        with pytest.raises(UsageError, match="DELTATOK_CACHE_LIMIT_GB"):
            DeltaShards(address).tokens([0])


@folder_store
def test_expected_shards_are_fetched_ahead(
    address: str, patches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(patches.folder, address, progress=quiet)
    reader = PatchShards(address)
    reader.expect(np.arange(len(reader)))
    for path in (reader.folder / f"shards/{shard:06d}.zarr.zip" for shard in range(2)):
        for _ in range(300):
            if path.exists():
                break
            time.sleep(0.1)
        assert path.exists()


def make_again(place: Path | str, little: Any, *, until: int | None = None) -> None:
    """Makes the deltas of `make_deltas`, or goes on with them, as a run does."""
    folder = out_folder(place)
    info = open_cache(folder, little.delta_info())
    assert not info.complete
    clips = [little.Clip(f"clip{i}.mp4", Path(f"/videos/{i}"), i) for i in range(6)]
    plan = write_plan(folder, make_plan(clips, clips_per_shard=3, seed=7))
    for shard, entries in plan.shards():
        if shard not in done_shards(folder):
            if shard == until:
                raise KeyboardInterrupt
            rows = little.delta_rows(4, [entry.key for entry in entries], shard)
            write_delta_shard(folder, shard, rows, block_windows=2)
    finish_cache(folder)


@every_store
def test_cache_made_at_an_address_is_that_of_a_folder(
    address: str, little: Any, tmp_path: Path
) -> None:
    make_again(tmp_path / "local", little)
    make_again(address, little)
    assert stored(address) == files(tmp_path / "local")
    left = {path.name for path in cache_dir().glob("uploads/*/shards/*")}
    assert left == {"000000.json", "000001.json"}  # the data was dropped once it was sent


@every_store
@pytest.mark.parametrize("loses_folder", [False, True])
def test_stopped_run_goes_on_from_the_store(
    address: str, little: Any, tmp_path: Path, loses_folder: bool
) -> None:
    make_again(tmp_path / "local", little)
    with pytest.raises(KeyboardInterrupt):
        make_again(address, little, until=1)
    if loses_folder:
        cache_dir().rename(tmp_path / "another machine's")
    make_again(address, little)
    assert stored(address) == files(tmp_path / "local")


@folder_store
def test_shard_that_was_not_sent_is_sent_later(
    address: str, little: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_again(tmp_path / "local", little)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(uploads, "_send_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            make_again(address, little)
    assert not any(name.startswith("shards/") for name in stored(address))
    make_again(address, little)
    assert stored(address) == files(tmp_path / "local")


@folder_store
def test_other_settings_at_the_same_address_are_refused(address: str, little: Any) -> None:
    make_again(address, little)
    other = little.delta_info(parent_fingerprint="sha256:" + "5" * 64)
    with pytest.raises(CacheMismatch, match="parent_fingerprint"):
        open_cache(out_folder(address), other)


@folder_store
def test_two_runs_with_other_settings_at_once_are_told(
    address: str, little: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = out_folder(address)
    monkeypatch.setenv("DELTATOK_CACHE_DIR", str(tmp_path / "second"))
    second = out_folder(address)
    open_cache(first, little.delta_info())
    other = little.delta_info(parent_fingerprint="sha256:" + "5" * 64)
    with pytest.raises(CacheMismatch, match="other bytes"):
        open_cache(second, other)


@folder_store
def test_shard_that_is_taken_back_leaves_the_store(address: str, little: Any) -> None:
    make_again(address, little)
    folder = out_folder(address)
    reopen_cache(folder)
    remove_done(folder, 1)
    names = set(stored(address))
    assert {name for name in names if name.startswith("shards/")} == {
        "shards/000000.json",
        "shards/000000.tar",
    }
    with pytest.raises(CacheMismatch, match="not finished"):
        DeltaShards(address)
    make_again(address, little)
    assert len(DeltaShards(address)) == 8
