"""index.jsonl: which shard holds which windows, so that opening a cache reads no done-records.

    {"keys": ["a.mp4", ...], "record": {"bytes": 812, "sha256": "..."}, "rows": 64, "shard": 0}

One line a shard, in order. Made from the done-records when a cache is finished, its own hash goes
into cache.json. It promises nothing: a shard's done-record is read when the shard is, and must have
the hash that is written here, so an index that is out of date is noticed, never followed.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import DamagedShard
from .records import DoneRecord, StoredFile, parse_done, shard_path
from .schema import STORED, load, parse_json, read_file

INDEX = "index.jsonl"
MAX_INDEX_BYTES = 2**30
"""Several million shards (a guess)."""


@dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """One shard, done."""

    shard: int
    rows: int
    """Windows."""
    keys: list[str]
    """Its clips that have windows, as in the done-record."""
    record: StoredFile
    """The done-record."""


def index_bytes(folder: Path, records: Iterable[DoneRecord]) -> bytes:
    """The index.jsonl for these done-records, in shard order."""
    return b"".join(_line(folder, record) for record in records)


def read_index(folder: Path, *, sha256: str) -> list[IndexEntry] | None:
    """The entries, in shard order; None if it is not there. DamagedShard if it is not the one with
    this hash, or malformed."""
    path = folder / INDEX
    if not path.exists():
        return None
    advice = "delete it: it is made again when the cache is finished, and readers do without"
    data = read_file(path, max_bytes=MAX_INDEX_BYTES, advice=advice)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedShard(f"{path}: was changed since the cache was finished: {advice}")
    entries = []
    for number, line in enumerate(data.splitlines(), start=1):
        where = f"{path}: line {number}"
        entries.append(load(IndexEntry, parse_json(line, where=where), where=where, how=STORED))
        if entries[-1].shard != number - 1:
            raise DamagedShard(f"{where}: shard {entries[-1].shard}, wanted {number - 1}: {advice}")
    return entries


def read_indexed(folder: Path, entry: IndexEntry) -> DoneRecord:
    """The done-record that `entry` tells of; DamagedShard if there is another one."""
    path = shard_path(folder, entry.shard, ".json")
    data = read_file(path)
    record = parse_done(parse_json(data, where=str(path)), entry.shard, where=str(path))
    told = (entry.record.sha256, entry.rows, entry.keys)
    if (hashlib.sha256(data).hexdigest(), record.rows, record.keys) != told:
        raise DamagedShard(
            f"{path}: is not the done-record that {INDEX} tells of: the shard was changed since "
            "the cache was finished; run the command that made the cache again"
        )
    return record


def _line(folder: Path, record: DoneRecord) -> bytes:
    data = read_file(shard_path(folder, record.shard, ".json"))
    entry = {
        "shard": record.shard,
        "rows": record.rows,
        "keys": record.keys,
        "record": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
    }
    return f"{json.dumps(entry, sort_keys=True)}\n".encode()
