"""Done-records: what each finished shard holds, whether it is still there, and how it gets there.

    shards/NNNNNN.json   {"shard": 0, "rows": 64, "keys": [...], "files": {"shards/000000.zarr/
                         zarr.json": {"bytes": 1234, "sha256": "..."}, ...}, "abs_max": 3.5,
                         "beyond_float16": 0, "decoder": "pyav", "other_decoders": {},
                         "quarantined": [], "format_version": 1}
    quarantine.jsonl     the clips without windows, of all done-records
    index.jsonl          {"keys": ["a.mp4", ...], "record": {"bytes": 812, "sha256": "..."},
                         "rows": 64, "shard": 0}; a line a shard, in order

A done-record is written last: it promises that the shard beside it is whole. Without one a shard
does not exist: readers skip it, writers replace it. Nothing that differs from run to run (times,
worker counts) is in it: that goes to timings.jsonl.

Files are held against their record in two depths: `size` (there, a regular file inside the cache
folder, of this size) and `sha256` (every byte).

Processes make different shards of a folder, unless somebody starts the same command twice; then two
can finish the same one at once. Same clips, same bytes: `commit_shard` of the second finds the
shard there as it would have written it and leaves it alone. So nothing that a done-record promises
is ever taken away, and whoever comes last writes the same record.

The index is made when a cache is finished, so that opening a large one reads no done-records; its
hash goes into cache.json. It promises nothing: a shard's done-record is read when the shard is, and
must have the hash that is written here, so an index that is out of date is noticed, never followed.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from .errors import DamagedShard, damaged_shard
from .files import (
    flush,
    open_append,
    publish,
    remove,
    sha256_file,
    write_bytes,
    write_json,
)
from .schema import ADVICE, STORED, load, parse_json, read_file, shown

_RECORD_NAME = re.compile(r"([0-9]{6,9})\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_ROWS = 2**31 - 1
RECORD_VERSION = 1
QUARANTINE = "quarantine.jsonl"
INDEX = "index.jsonl"
MAX_INDEX_BYTES = 2**30
"""Several million shards (a guess)."""
MAX_THREADS = 8
"""That read files to hold them against their records (a guess)."""

Verify = Literal["size", "sha256"]

_MAX_TRIES = 10
_IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
"""What moving a folder onto its name ends with when another process did so meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """One clip that gave no windows."""

    clip: str
    stage: str
    """Where it failed: "open", "decode", ..."""
    reason: str
    attempts: int


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file as another one tells of it."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DoneRecord:
    """What a finished shard holds."""

    shard: int
    keys: list[str]
    """The shard's clips that have windows; `clip` arrays index into this list."""
    rows: int
    """Windows."""
    files: dict[str, dict[str, Any]]
    """Path relative to the cache folder -> {"bytes": int, "sha256": 64 hex digits}."""
    abs_max: float = 0.0
    """The largest absolute value of the tokens."""
    beyond_float16: int = 0
    """How many values of the tokens float16 could not hold."""
    decoder: str | None = None
    """What decoded the clips, where that is known: most of them."""
    other_decoders: dict[str, str | None] = field(default_factory=dict)
    """Clip -> what decoded it, of those that `decoder` did not decode."""
    quarantined: list[Quarantined] = field(default_factory=list)

    def decoders(self) -> dict[str, str]:
        """Clip -> the decoder that read it, of the clips of which that is known."""
        named = {key: self.other_decoders.get(key, self.decoder) for key in self.keys}
        return {key: decoder for key, decoder in named.items() if decoder is not None}


@dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """What index.jsonl tells of a shard."""

    shard: int
    rows: int
    keys: list[str]
    record: StoredFile
    """The done-record."""


def shard_path(folder: Path, shard: int, suffix: str) -> Path:
    """`folder`/shards/NNNNNN`suffix`."""
    return folder / "shards" / f"{shard:06d}{suffix}"


def write_done(folder: Path | str, record: DoneRecord) -> None:
    """Writes the done-record: the last step of writing a shard."""
    write_json(
        shard_path(Path(folder), record.shard, ".json"),
        {"format_version": RECORD_VERSION, **asdict(record)},
    )


def read_done(folder: Path | str, shard: int) -> DoneRecord | None:
    """The done-record of a shard, None if it is not done; DamagedShard if it is malformed."""
    data = _read_record(Path(folder), shard)
    return None if data is None else _parse_done(Path(folder), shard, data)


def _read_record(folder: Path, shard: int) -> bytes | None:
    path = shard_path(folder, shard, ".json")
    if not path.is_file():
        return None
    try:
        return read_file(path)
    except DamagedShard:
        if not path.exists():  # taken back by another process just now
            return None
        raise


def _parse_done(folder: Path, shard: int, data: bytes) -> DoneRecord:
    where = str(shard_path(folder, shard, ".json"))
    record = load(DoneRecord, parse_json(data, where=where), where=where, how=STORED)
    if record.shard != shard:
        raise DamagedShard(f"{where}: is the record of another shard: {ADVICE}")
    if len(set(record.keys)) != len(record.keys):
        raise DamagedShard(f"{where}: names a clip twice in keys: {ADVICE}")
    if record.rows > MAX_ROWS:
        raise DamagedShard(f"{where}: rows is {record.rows}, wanted at most {MAX_ROWS}: {ADVICE}")
    for name, entry in record.files.items():
        parts = PurePosixPath(name).parts
        inside = len(parts) > 1 and parts[0] == "shards" and ".." not in parts
        if not inside or "\\" in name or "\0" in name or name != "/".join(parts):
            raise DamagedShard(
                f"{where}: names the file {shown(name)}, wanted a path below shards/: {ADVICE}"
            )
        file = load(StoredFile, entry, where=f"{where}: files[{name!r}]", how=STORED)
        if not _SHA256.fullmatch(file.sha256):
            raise DamagedShard(
                f"{where}: sha256 of {name!r} is {shown(file.sha256)}, wanted 64 hex digits: "
                f"{ADVICE}"
            )
    return record


def remove_done(folder: Path | str, shard: int) -> None:
    """Takes the promise back: from now on the shard is not done, also after a power loss."""
    path = shard_path(Path(folder), shard, ".json")
    path.unlink(missing_ok=True)
    flush(path.parent)  # if it was gone: whoever removed it may have been killed before this


def done_shards(folder: Path | str) -> list[int]:
    """The numbers of the finished shards, ascending."""
    shards = Path(folder) / "shards"
    names = [path.name for path in shards.iterdir()] if shards.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _RECORD_NAME.fullmatch(name)))


def read_all_done(folder: Path | str) -> list[DoneRecord]:
    """The records of all finished shards, in shard order."""
    return [record for record, _ in iterate_done(folder)]


def iterate_done(folder: Path | str) -> Iterator[tuple[DoneRecord, IndexEntry]]:
    """The records of all finished shards, in shard order, and what the index tells of each."""
    for shard in done_shards(folder):
        data = _read_record(Path(folder), shard)
        if data is not None:
            record = _parse_done(Path(folder), shard, data)
            file = StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            yield record, IndexEntry(shard=shard, rows=record.rows, keys=record.keys, record=file)


def index_line(entry: IndexEntry) -> bytes:
    """A line of index.jsonl."""
    file = {"bytes": entry.record.bytes, "sha256": entry.record.sha256}
    return f"{json.dumps({**vars(entry), 'record': file}, sort_keys=True)}\n".encode()


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
    record = _parse_done(folder, entry.shard, data)
    indexed = (entry.record.sha256, entry.rows, entry.keys)
    if (hashlib.sha256(data).hexdigest(), record.rows, record.keys) != indexed:
        raise DamagedShard(
            f"{path}: is not the done-record that {INDEX} tells of: the shard was changed since "
            "the cache was finished; run the command that made the cache again"
        )
    return record


def write_quarantine(
    folder: Path | str, entries: Iterable[Quarantined] | None = None
) -> list[Quarantined]:
    """Writes quarantine.jsonl; gives its entries.

    entries: those of the done-records, from a caller that knows them; None: they are all read,
    which with many shards takes long.
    """
    if entries is None:
        entries = quarantined_of(record for record, _ in iterate_done(folder))
    entries = list(entries)
    write_bytes(Path(folder) / QUARANTINE, quarantine_bytes(entries))
    return entries


def quarantined_of(records: Iterable[DoneRecord]) -> list[Quarantined]:
    """The clips without windows of these records."""
    return [entry for record in records for entry in record.quarantined]


def quarantine_bytes(entries: Iterable[Quarantined]) -> bytes:
    """quarantine.jsonl with these entries: one a line, sorted by clip."""
    entries = sorted(entries, key=lambda entry: (entry.clip, entry.stage))
    return "".join(f"{json.dumps(asdict(entry), sort_keys=True)}\n" for entry in entries).encode()


def append_timing(folder: Path | str, timing: Mapping[str, Any]) -> None:
    """Adds one line to timings.jsonl (kept apart: it differs from run to run)."""
    with open_append(Path(folder) / "timings.jsonl") as file:
        file.write(f"{json.dumps(dict(timing), sort_keys=True)}\n".encode())


def check_files(folder: Path, record: DoneRecord, *, depth: Verify) -> None:
    """Raises DamagedShard for the first file of a shard that is not the promised one."""
    for problem in record_problems(folder, record, depth=depth):
        raise problem


def file_problems(
    folder: Path, records: Sequence[DoneRecord], *, verify: Verify
) -> Generator[DamagedShard, None, None]:
    """Every file that is missing or differs from its done-record, in shard order."""
    # Hashing leaves the interpreter lock, waiting for a network file system does too.
    with ThreadPoolExecutor(max_workers=check_threads()) as pool:
        for problems in pool.map(
            lambda record: list(record_problems(folder, record, depth=verify)), records
        ):
            yield from problems


def record_problems(
    folder: Path, record: DoneRecord, *, depth: Verify
) -> Generator[DamagedShard, None, None]:
    """Every file of a shard that is not the promised one."""
    root = os.path.realpath(folder)
    for name, entry in record.files.items():
        path = folder / name
        try:
            problem = _problem(path, entry, root=root, depth=depth)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        if problem is not None:
            yield damaged_shard(f"shard {record.shard:06d}: {path}: {problem}")


def check_threads() -> int:
    """Threads to read files with."""
    return min(MAX_THREADS, os.cpu_count() or 1)


def leaves(path: Path, root: str) -> bool:
    """Whether links lead from `path` out of the folder `root` (real path)."""
    return not os.path.realpath(path).startswith(f"{root.rstrip('/')}/")


def _problem(path: Path, entry: dict[str, Any], *, root: str, depth: Verify) -> str | None:
    if leaves(path, root):
        target = os.path.realpath(path)
        return f"is a link to {target}, outside of the cache (copy the file into the cache)"
    size = path.stat().st_size
    if not path.is_file():
        return "is no file"
    if size != entry["bytes"]:
        return f"{size} bytes, the done-record says {entry['bytes']}"
    if depth == "size" or sha256_file(path) == entry["sha256"]:
        return None
    return (
        "its SHA-256 is not that of the done-record, the file was changed or damaged, or is "
        "another shard's"
    )


def commit_shard(folder: Path, record: DoneRecord, *, partial: Path, suffix: str) -> DoneRecord:
    """Moves `partial` onto shards/NNNNNN`suffix` and writes the done-record; gives the record.

    record: all but its `files`, which are described here. partial: a file or folder; not there if
    the shard has no windows. Gone afterwards, whatever happens. A shard that is already there with
    other bytes (a leftover, or clips that were tried again) is replaced, its record first.
    """
    final = shard_path(folder, record.shard, suffix)
    try:
        record = replace(record, files=_describe(folder, partial, at=final))
        if record.rows and not record.files:  # else a good shard would be replaced by none
            raise FileNotFoundError(errno.ENOENT, "removed by another process", str(partial))
        for tries_left in reversed(range(_MAX_TRIES)):
            if _is_there(folder, final, record.files):
                flush(final.parent)  # whoever moved it there may have been killed before this
                break
            remove_done(folder, record.shard)
            try:
                publish(partial, final) if partial.exists() else remove(final)
                break
            except OSError as error:
                if error.errno not in _IN_THE_WAY or not partial.exists() or not tries_left:
                    raise
    finally:
        remove(partial)
    write_done(folder, record)
    return record


def _describe(folder: Path, top: Path, *, at: Path) -> dict[str, dict[str, Any]]:
    """What a done-record says of the files of `top`, a file or folder, once it lies `at`."""
    described = {}
    for path in (top, *top.rglob("*")):
        if path.is_dir() or not os.path.lexists(path):
            continue
        size = path.stat().st_size
        name = (at / path.relative_to(top)).relative_to(folder).as_posix()
        described[name] = {"bytes": size, "sha256": sha256_file(path)}
    return described


def _is_there(folder: Path, final: Path, files: dict[str, dict[str, Any]]) -> bool:
    """Whether `final` holds these files and no other, byte for byte."""
    try:
        return final.exists() == bool(files) and _describe(folder, final, at=final) == files
    except OSError:  # moved away while it was looked at, or no regular file
        return False
