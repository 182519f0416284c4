"""The folder in which a cache for an address is made: shards go to the store as they are finished.

    CACHE_DIR/uploads/<16 hex>/     a cache folder like any other, and upload.json

The writers of a cache say what they have written: `shard_done`, `shard_taken_back`, `top_changed`.
In an upload folder a finished shard's data goes to the store, then its done-record, and the local
data is dropped: the disk holds what is being made, and done-records of less than 1 kB each. The
store decides what is done: `out_folder` begins with what lies there, so that a run goes on after a
kill, on this machine or another.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import DeltatokError, UsageError
from ..files import is_address, local_path, remove, sha256_file, write_bytes
from ..schema import read_json
from .mirror import cache_dir
from .store import NewFile, Store, StoredObject, new_file, open_store

UPLOAD = "upload.json"
THREADS = 8
BEFORE_SHARDS = (
    *("pca.npy", "channel_scale.npy", "black.npy", "NOTICE.txt", "plan.json", "cache.json"),
)
"""What a run goes on with; cache.json, which says what cache it is, last."""
MUTABLE = ("plan.json", "quarantine.jsonl", "index.jsonl", "cache.json")
"""Files that are replaced; the others are created once."""
_SUFFIXES = (".zarr.zip", ".tar")
_RECORD = re.compile(r"shards/[0-9]{6,9}\.json")
_PART = re.compile(r"plan/[0-9]{6,}-[0-9a-f]{16}\.jsonl")


def out_folder(place: Path | str) -> Path:
    """The folder to make the cache of `place` in: itself, or the upload folder of an address with
    everything of it that a run goes on with.

    Raises UsageError for a store that cannot be written, or that replaces what it was asked to
    create; else what stores raise.
    """
    text = os.fspath(place)
    if not is_address(text):
        return local_path(place)
    store = open_store(text)
    store.probe()
    folder = cache_dir() / "uploads" / hashlib.sha256(store.url.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / UPLOAD, json.dumps({"url": store.url}).encode())
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be written ({error.strerror}): give another --cache-dir"
        ) from error
    _url_of.cache_clear()
    _take_over(store, folder)
    return folder


def shard_done(folder: Path, shard: int) -> None:
    """A done-record was written: in an upload folder, sends the shard."""
    store = _store_of(folder)
    if store is not None:
        _send_shard(store, folder, shard)


def shard_taken_back(folder: Path, shard: int) -> None:
    """A shard is to be made again: in an upload folder, takes it out of the store, its record
    first."""
    store = _store_of(folder)
    if store is not None:
        for suffix in (".json", *_SUFFIXES):
            store.delete(f"shards/{shard:06d}{suffix}")


def top_changed(folder: Path, name: str) -> None:
    """A file beside the shards, or a part of the plan, was written: in an upload folder, sends
    it."""
    store = _store_of(folder)
    if store is not None:
        _send_top(store, folder, name)


def take_records(folder: Path) -> None:
    """Fetches, into an upload folder, the done-records that other machines have sent since."""
    store = _store_of(folder)
    if store is not None:
        there = {item.name: item for item in store.list("shards/")}
        _take_all(store, folder, _records_of(there))


def top_begun(folder: Path, name: str) -> None:
    """The first cache.json of a cache was written: in an upload folder, creates it in the store;
    CacheMismatch where another run has begun another cache there."""
    store = _store_of(folder)
    if store is not None:
        store.create([new_file(folder, name)])


@functools.lru_cache(maxsize=64)
def _url_of(folder: Path) -> str | None:
    path = folder / UPLOAD
    return str(read_json(path)["url"]) if path.is_file() else None


def _store_of(folder: Path) -> Store | None:
    url = _url_of(folder)
    return None if url is None else open_store(url)


def _send_top(store: Store, folder: Path, name: str) -> None:
    if name in MUTABLE:
        store.replace(name, (folder / name).read_bytes())
    else:
        store.create([new_file(folder, name)])


def _send_shard(store: Store, folder: Path, shard: int) -> None:
    record = f"shards/{shard:06d}.json"
    promised = read_json(folder / record)["file"]
    files: list[NewFile] = []
    for suffix in _SUFFIXES:
        name = f"shards/{shard:06d}{suffix}"
        if (folder / name).is_file():
            if promised is None or sha256_file(folder / name) != promised["sha256"]:
                raise DeltatokError(
                    f"{folder / name}: is not as its done-record says: delete both and run again"
                )
            files.append(NewFile(name, folder / name, promised["sha256"]))
    store.create([*files, new_file(folder, record)])
    for file in files:
        remove(folder / file.name)


def _take_over(store: Store, folder: Path) -> None:
    """Makes the folder and the store agree. What the store has counts; what only the folder has,
    since a run was killed before it sent it, is sent."""
    there = {item.name: item for item in store.list()}
    for name, file in there.items():
        if name in BEFORE_SHARDS or _PART.fullmatch(name):
            _take(store, folder, file)
    for name in BEFORE_SHARDS:
        if name not in there and (folder / name).is_file():
            for part in sorted(folder.glob("plan/*.jsonl")) if name == "plan.json" else ():
                _send_top(store, folder, f"plan/{part.name}")
            _send_top(store, folder, name)
    records = _records_of(there)
    ours = {f"shards/{path.name}" for path in (folder / "shards").glob("*.json")}
    for name in sorted(ours - records.keys()):
        shard = int(Path(name).stem)
        if read_json(folder / name)["file"] is None or any(
            (folder / "shards" / f"{shard:06d}{suffix}").is_file() for suffix in _SUFFIXES
        ):
            _send_shard(store, folder, shard)
        else:  # its data was taken out of the store, or is another run's
            remove(folder / name)
    _take_all(store, folder, records)


def _records_of(there: Mapping[str, StoredObject]) -> dict[str, StoredObject]:
    return {name: file for name, file in there.items() if _RECORD.fullmatch(name)}


def _take_all(store: Store, folder: Path, files: Mapping[str, StoredObject]) -> None:
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(lambda name: _take(store, folder, files[name]), sorted(files)))


def _take(store: Store, folder: Path, file: StoredObject) -> None:
    """The store's file in place of ours, unless it is one that never changes, or a done-record of
    the same size: the same shard made of the same clips."""
    path, fixed = folder / file.name, file.name.startswith(("shards/", "plan/"))
    if not (fixed and path.is_file() and path.stat().st_size == file.size):
        store.fetch(file.name, path, size=None, sha256=None)
