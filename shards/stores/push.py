"""A finished cache as a whole: to a store, and from one into a folder.

Both go on where they were killed. To a store, a shard comes before its done-record and cache.json
comes last; into a folder likewise, so that what is half there is no finished cache. Every file is
held against the SHA-256 that the cache promises, before it is sent and after it was fetched.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..cache import CacheInfo, data_suffix, parse_cache_info, read_cache_info
from ..errors import CacheMismatch, DamagedShard, damaged_shard
from ..files import disk_errors, is_partial, local_path, sha256_file, write_bytes
from ..index import INDEX, ShardColumns, read_index
from ..plan import PLAN, Plan
from ..records import DoneRecord, StoredFile, iterate_done, read_done, shard_path
from ..schema import MAX_JSON_BYTES, parse_json
from .mirror import top_files
from .store import NewFile, Store, new_file, open_store

THREADS = 8

Progress = Callable[[int], None]
"""Called with the bytes of each shard that is there now."""


@dataclass(frozen=True)
class Transfer:
    """What was done."""

    shards: int
    """Of the cache."""
    moved: int
    """Shards that were not there before."""
    bytes: int
    """Of all shards."""


def push(
    folder: Path | str, url: str, *, progress: Progress, beside: Mapping[str, bytes] | None = None
) -> Transfer:
    """Copies the finished cache in `folder` to the store at `url`.

    beside: other files to put there, by name (a README.md and its picture). Raises CacheMismatch
    for a cache that is not finished, and where another one lies at `url`; DamagedShard for a shard
    that is not as its done-record says; else what stores raise.
    """
    folder = local_path(folder)
    info = read_cache_info(folder)
    if not info.complete:
        raise CacheMismatch(f"{folder}: is not finished: run the command that makes it again")
    store = open_store(url)
    store.probe()
    _check_is_ours(store, info)
    for name, data_beside in (beside or {}).items():
        store.replace(name, data_beside)
    there = {item.name for item in store.list("shards/")}
    moved = num_shards = num_bytes = 0

    def send(records: Sequence[DoneRecord]) -> int:
        files = [file for record in records for file in _shard_files(folder, info, record)]
        store.create(files)
        for record in records:
            progress(record.file.bytes if record.file else 0)
        return len(records)

    def waiting() -> Iterator[DoneRecord]:
        nonlocal num_shards, num_bytes
        for record in iterate_done(folder):
            num_shards += 1
            size = record.file.bytes if record.file else 0
            num_bytes += size
            if f"shards/{record.shard:06d}.json" in there:
                progress(size)
            else:
                yield record

    records = waiting()
    with ThreadPoolExecutor(THREADS) as threads:
        while batch := list(islice(records, THREADS * store.shards_at_once)):
            step = store.shards_at_once
            parts = [batch[start : start + step] for start in range(0, len(batch), step)]
            moved += sum(threads.map(send, parts))
    _push_top(store, folder, info)
    return Transfer(num_shards, moved, num_bytes)


def _push_top(store: Store, folder: Path, info: CacheInfo) -> None:
    """The files beside the shards of a finished cache, cache.json last."""
    _push_plan(store, folder)
    for name in sorted(info.files.keys() - {PLAN}):
        store.replace(name, (folder / name).read_bytes())
    store.replace("cache.json", (folder / "cache.json").read_bytes())


def _push_plan(store: Store, folder: Path) -> None:
    """The plan: its parts, which never change, then plan.json."""
    plan = Plan.open(folder)
    there = {item.name for item in store.list("plan/")}
    for part in plan.parts:
        if part.file not in there:
            store.create([new_file(folder, part.file)])
    store.replace(PLAN, (folder / PLAN).read_bytes())


def _shard_files(folder: Path, info: CacheInfo, record: DoneRecord) -> list[NewFile]:
    """A shard's data and, behind it, its done-record; DamagedShard if the data is not as the
    record says."""
    files = []
    if record.file is not None:
        path = shard_path(folder, record.shard, data_suffix(info))
        got = sha256_file(path)
        if got != record.file.sha256:
            raise damaged_shard(f"shard {record.shard:06d}: {path}: not as its done-record says")
        files.append(NewFile(f"shards/{path.name}", path, got))
    return [*files, new_file(folder, f"shards/{record.shard:06d}.json")]


def pull(url: str, folder: Path | str, *, progress: Progress) -> Transfer:
    """Copies the finished cache at `url` into `folder`, which is new, empty, or an earlier pull.

    Raises CacheMismatch where no finished cache lies at `url` or another one in `folder`,
    DamagedShard for a file that is not as promised, DeltatokError for a full disk; else what stores
    raise.
    """
    folder, store = local_path(folder), open_store(url)
    data, info = _read_remote_info(store)
    if (folder / "cache.json").exists():
        if read_cache_info(folder).fingerprint != info.fingerprint:
            raise CacheMismatch(f"{folder}: holds another cache: give another folder")
    elif folder.is_dir() and _strangers(folder, info):
        raise CacheMismatch(f"{folder}: holds something else: give a new or empty folder")
    for top in top_files(info.files, where=store.at("cache.json")):
        _fetch(store, folder, top.name, size=top.size, sha256=top.sha256)
    for part in Plan.open(folder).parts:
        _fetch(store, folder, part.file, size=part.bytes, sha256=part.sha256)
    shards = read_index(folder, StoredFile(**info.files[INDEX]))

    def take(place: int) -> int:
        number, moved = int(shards.shard[place]), 0
        if shards.rows[place]:
            file = shards.file(place)
            name = f"shards/{number:06d}{data_suffix(info)}"
            moved = _fetch(store, folder, name, size=file.bytes, sha256=file.sha256)
            progress(file.bytes)
        _take_record(store, folder, shards, place)
        return moved

    with ThreadPoolExecutor(THREADS) as threads:
        moved = sum(threads.map(take, range(len(shards))))
    with disk_errors(folder):
        write_bytes(folder / "cache.json", data)
    return Transfer(len(shards), moved, int(shards.bytes.sum()))


def _strangers(folder: Path, info: CacheInfo) -> set[str]:
    ours = {"shards", "plan", *info.files}
    return {path.name for path in folder.iterdir() if not is_partial(path)} - ours


def _read_remote_info(store: Store) -> tuple[bytes, CacheInfo]:
    """The cache.json of a finished cache: its bytes, and what they say."""
    data = store.read("cache.json", max_bytes=MAX_JSON_BYTES)
    if data is None:
        raise CacheMismatch(f"{store.url}: not a deltatok cache (it has no cache.json)")
    where = store.at("cache.json")
    info = parse_cache_info(parse_json(data, where=where), where=where)
    if not info.complete:
        raise CacheMismatch(f"{store.url}: is not finished: run the command that makes it again")
    return data, info


def _check_is_ours(store: Store, info: CacheInfo) -> None:
    data = store.read("cache.json", max_bytes=MAX_JSON_BYTES)
    if data is not None:
        where = store.at("cache.json")
        there = parse_cache_info(parse_json(data, where=where), where=where)
        if there.fingerprint != info.fingerprint:
            raise CacheMismatch(f"{store.url}: holds another cache: give another address")


def _fetch(store: Store, folder: Path, name: str, *, size: int, sha256: str) -> int:
    """1 if the file was fetched, 0 if it was there."""
    path = folder / name
    if path.is_file() and path.stat().st_size == size and sha256_file(path) == sha256:
        return 0
    store.fetch(name, path, size=size, sha256=sha256)
    return 1


def _take_record(store: Store, folder: Path, shards: ShardColumns, place: int) -> None:
    number = int(shards.shard[place])
    name = f"shards/{number:06d}.json"
    if not (folder / name).exists():
        store.fetch(name, folder / name, size=None, sha256=None)
    record = read_done(folder, number)
    wanted = shards.keys_sha256[place].tobytes().hex()
    if record is None or (record.rows, record.keys_sha256) != (int(shards.rows[place]), wanted):
        raise DamagedShard(
            f"{store.at(name)}: is not the done-record of the shard that {INDEX} tells of: put "
            f"the right one there, and delete {folder / name}"
        )
