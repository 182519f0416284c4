"""index.jsonl: what a reader needs to know of every shard of a finished cache, in one file.

    {"format_version":1,"columns":["clips","rows","bytes","sha256","keys_sha256"]}
    [64,256,402653184,"9f86...","60e3..."]     a line a shard: its number is the line's, less 2
    [0,0,0,null,"4f53..."]                     none of its clips has windows: there is no file

Made of the done-records when a cache is finished; cache.json has its size and SHA-256. In memory it
is NumPy columns of 96 bytes a shard, which forked processes share.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import CacheMismatch, DamagedShard
from .files import open_regular
from .records import MAX_ROWS, DoneRecord, StoredFile
from .schema import MAX_COUNT, STORED, load, parse_json, shown

INDEX = "index.jsonl"
INDEX_VERSION = 1
COLUMNS = ["clips", "rows", "bytes", "sha256", "keys_sha256"]
REPAIR = "`deltatok-shards verify --repair` on the cache makes it again from the done-records"

_BATCH_BYTES = 2**20
"""Read and parsed at once: about 5,000 shards."""
_MAX_LINE_BYTES = 1024
"""A line of ours has about 200."""
_BATCH_RECORDS = 4096
_DIGEST = np.dtype((np.void, 32))
_NO_SHA256 = "0" * 64
_HEX = re.compile(r"[0-9a-f]*")


@dataclass(frozen=True, kw_only=True)
class ShardColumns:
    """S finished shards, ascending by number."""

    shard: NDArray[np.int64]
    """int64 (S,): their numbers."""
    clips: NDArray[np.int64]
    """int64 (S,): clips that have windows."""
    rows: NDArray[np.int64]
    """int64 (S,): windows."""
    bytes: NDArray[np.int64]
    """int64 (S,): of the shard's file, 0 where it has none."""
    sha256: NDArray[np.void]
    """(S,) items of 32 bytes: of that file, zeros where there is none."""
    keys_sha256: NDArray[np.void]
    """(S,) items of 32 bytes: see `plan.keys_sha256`."""

    def __len__(self) -> int:
        return len(self.shard)

    def take(self, chosen: NDArray[Any]) -> "ShardColumns":
        """These shards, by a mask or their places."""
        return ShardColumns(**{name: column[chosen] for name, column in vars(self).items()})

    def file(self, place: int) -> StoredFile:
        """The file of a shard that has one."""
        return StoredFile(bytes=int(self.bytes[place]), sha256=bytes(self.sha256[place]).hex())

    @staticmethod
    def concatenate(parts: "Iterable[ShardColumns]") -> "ShardColumns":
        """The shards of one part after the other."""
        columns = [vars(part) for part in (_columns([], []), *parts)]
        return ShardColumns(
            **{name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
        )

    @staticmethod
    def of(records: Iterable[DoneRecord]) -> "ShardColumns":
        """What done-records say, taken a few thousand at a time."""
        lines = ((record.shard, index_values(record)) for record in records)
        batches = iter(lambda: list(itertools.islice(lines, _BATCH_RECORDS)), [])
        return ShardColumns.concatenate(_columns(*zip(*batch, strict=True)) for batch in batches)


def index_header() -> bytes:
    """The first line of index.jsonl."""
    return _line({"format_version": INDEX_VERSION, "columns": COLUMNS})


def index_line(record: DoneRecord) -> bytes:
    """The line of a shard."""
    return _line(index_values(record))


def index_values(record: DoneRecord) -> list[Any]:
    """What index.jsonl tells of a shard, in the order of COLUMNS."""
    file = record.file
    num_bytes, sha256 = (0, None) if file is None else (file.bytes, file.sha256)
    return [record.clips, record.rows, num_bytes, sha256, record.keys_sha256]


def _line(value: Any) -> bytes:
    return f"{json.dumps(value, separators=(',', ':'))}\n".encode()


def read_index(folder: Path, file: StoredFile) -> ShardColumns:
    """The index of the finished cache `folder`, whose cache.json tells of `file`.

    Raises DamagedShard if it is missing, another than that one, or malformed; CacheMismatch for a
    newer format_version.
    """
    path = folder / INDEX
    try:
        with os.fdopen(open_regular(path), "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != file.bytes:
                raise DamagedShard(
                    f"{path}: {size} bytes, cache.json says {file.bytes}: it was cut, or is the "
                    f"index of another cache: {REPAIR}"
                )
            if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
                raise DamagedShard(
                    f"{path}: is not the one that cache.json tells of: it was changed, or is the "
                    f"index of another cache: {REPAIR}"
                )
            opened.seek(0)
            return _parse(opened, str(path))
    except OSError as error:
        raise DamagedShard(f"{path}: cannot be read ({error.strerror}): {REPAIR}") from error


@dataclass(frozen=True, kw_only=True)
class _Version:
    format_version: int


@dataclass(frozen=True, kw_only=True)
class _Header(_Version):
    columns: list[str]


def _parse(file: BinaryIO, where: str) -> ShardColumns:
    header = parse_json(file.readline(_MAX_LINE_BYTES), where=f"{where}: line 1")
    version = load(_Version, header, where=f"{where}: line 1", how=STORED).format_version
    if version > INDEX_VERSION:
        raise CacheMismatch(
            f"{where}: format_version {version}, this release reads up to {INDEX_VERSION}: "
            "update deltatok"
        )
    columns = load(_Header, header, where=f"{where}: line 1", how=STORED).columns
    if version < 1 or columns != COLUMNS:
        raise DamagedShard(
            f"{where}: line 1: format_version {version} and columns {shown(columns)}, wanted "
            f"{INDEX_VERSION} and {COLUMNS}: {REPAIR}"
        )
    return ShardColumns.concatenate(_parse_batches(file, where))


def _parse_batches(file: BinaryIO, where: str) -> Iterator[ShardColumns]:
    shard, rest = 0, b""
    while block := file.read(_BATCH_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            raise DamagedShard(f"{where}: line {shard + len(lines) + 2} is too long: {REPAIR}")
        between = f"{where}: lines {shard + 2} to {shard + len(lines) + 1}"
        if not all(line[:1] == b"[" and line[-1:] == b"]" for line in lines):
            raise DamagedShard(f"{between}: wanted a list on each: {REPAIR}")
        values = parse_json(b"[%s]" % b",".join(lines), where=between)
        if len(values) != len(lines):
            raise DamagedShard(f"{between}: wanted one list on each: {REPAIR}")
        try:
            yield _columns(range(shard, shard + len(lines)), values)
        except ValueError as error:
            raise DamagedShard(f"{between}: {error}: {REPAIR}") from error
        shard += len(lines)
    if rest:
        raise DamagedShard(f"{where}: its last line is cut: {REPAIR}")


def _columns(shards: Sequence[int], lines: Sequence[Any]) -> ShardColumns:
    """The columns of `lines`, lists in the order of COLUMNS; ValueError for what is none."""
    if not all(type(line) is list and len(line) == len(COLUMNS) for line in lines):
        raise ValueError(f"wanted lists of {len(COLUMNS)}")
    clips, rows, sizes, sha256, keys_sha256 = zip(*lines, strict=True) if lines else ((),) * 5
    numbers = {}
    for name, column, most in (
        ("clips", clips, MAX_COUNT),
        ("rows", rows, MAX_ROWS),
        ("bytes", sizes, MAX_COUNT),
    ):
        if not set(map(type, column)) <= {int} or not min(column, default=0) >= 0:
            raise ValueError(f"{name}: wanted integers from 0")
        if max(column, default=0) > most:
            raise ValueError(f"{name} is {max(column)}, wanted at most {most}")
        numbers[name] = np.array(column, dtype=np.int64)
    has_file = np.array([value is not None for value in sha256], dtype=np.bool_)
    if (has_file != (numbers["rows"] > 0)).any() or numbers["bytes"][~has_file].any():
        raise ValueError("wanted a file where there are windows, and only there")
    return ShardColumns(
        shard=np.array(shards, dtype=np.int64),
        **numbers,
        sha256=_digests([_NO_SHA256 if value is None else value for value in sha256]),
        keys_sha256=_digests(keys_sha256),
    )


def _digests(texts: Sequence[Any]) -> NDArray[np.void]:
    if not set(map(type, texts)) <= {str} or not set(map(len, texts)) <= {64}:
        raise ValueError("wanted hashes of 64 hex digits")
    text = "".join(texts)
    if not _HEX.fullmatch(text):
        raise ValueError("wanted hashes of 64 hex digits")
    return np.frombuffer(bytes.fromhex(text), dtype=_DIGEST)
