"""Done-records: what each finished shard holds, whether it is still there, and how it gets there.

    shards/NNNNNN.json   {"shard": 0, "rows": 64, "keys": [...], "files": {"shards/000000.zarr/
                         zarr.json": {"bytes": 1234, "sha256": "..."}, ...}, "statistics": {...},
                         "decoders": {...}, "quarantined": [...], "format_version": 1}
    quarantine.jsonl     the clips without windows, of all done-records

A done-record is written last: it promises that the shard beside it is whole. Without one a shard
does not exist: readers skip it, writers replace it. Nothing that differs from run to run (times,
worker counts) is in it: that goes to timings.jsonl.

Files are held against their record in three depths: `size` (there, a regular file inside the cache
folder, of this size), `sample` (also the right shard: small files whole, 16 pieces of large ones)
and `sha256` (every byte).

Processes make different shards of a folder, unless somebody starts the same command twice; then two
can finish the same one at once. Same clips, same bytes: `commit_shard` of the second finds the
shard there as it would have written it and leaves it alone. So nothing that a done-record promises
is ever taken away, and whoever comes last writes the same record.
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

from .errors import DamagedShard
from .files import flush, publish, remove, sha256_file, write_bytes, write_json
from .schema import ADVICE, STORED, load, read_json, shown

_RECORD_NAME = re.compile(r"([0-9]{6,9})\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_ROWS = 2**31 - 1
RECORD_VERSION = 1
QUARANTINE = "quarantine.jsonl"
MAX_THREADS = 8
"""That read files to hold them against their records (a guess)."""

Verify = Literal["size", "sha256"]
Depth = Literal["size", "sample", "sha256"]

SHARD_ADVICE = (
    "run `deltatok-shards verify` on the cache, then delete the shard's done-record "
    "(shards/NNNNNN.json) and make the shard again"
)

_MAX_TRIES = 10
_IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
"""What moving a folder onto its name ends with when another process did so meanwhile."""

NUM_PIECES = 16
PIECE_BYTES = 4096
SAMPLED_ABOVE_BYTES = NUM_PIECES * PIECE_BYTES
"""Smaller files are hashed whole. Not the head alone: many videos begin with black frames."""


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
    sample_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class DoneRecord:
    """What a finished shard holds."""

    shard: int
    keys: list[str]
    """The shard's clips that have windows; `clip` arrays index into this list."""
    rows: int
    """Windows."""
    files: dict[str, dict[str, Any]]
    """Path relative to the cache folder -> {"bytes": int, "sha256": 64 hex digits}, of files larger
    than 64 KiB also "sample_sha256", see `samples`."""
    statistics: dict[str, Any] = field(default_factory=dict)
    decoders: dict[str, str] = field(default_factory=dict)
    """Clip -> the decoder that read it."""
    quarantined: list[Quarantined] = field(default_factory=list)


def shard_path(folder: Path, shard: int, suffix: str) -> Path:
    """`folder`/shards/NNNNNN`suffix`."""
    return folder / "shards" / f"{shard:06d}{suffix}"


def describe_files(folder: Path, paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The `files` of a done-record for these files below `folder`."""
    return {path.relative_to(folder).as_posix(): _describe(path) for path in sorted(paths)}


def write_done(folder: Path | str, record: DoneRecord) -> None:
    """Writes the done-record: the last step of writing a shard."""
    write_json(
        shard_path(Path(folder), record.shard, ".json"),
        {"format_version": RECORD_VERSION, **asdict(record)},
    )


def read_done(folder: Path | str, shard: int) -> DoneRecord | None:
    """The done-record of a shard, None if it is not done; DamagedShard if it is malformed."""
    path = shard_path(Path(folder), shard, ".json")
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except DamagedShard:
        if not path.exists():  # taken back by another process just now
            return None
        raise
    return parse_done(value, shard, where=str(path))


def parse_done(value: object, shard: int, *, where: str) -> DoneRecord:
    """The done-record of shard `shard` in parsed JSON; DamagedShard if it is malformed."""
    record = load(DoneRecord, value, where=where, how=STORED)
    if record.shard != shard:
        raise DamagedShard(f"{where}: is the record of another shard: {ADVICE}")
    if len(set(record.keys)) != len(record.keys):
        raise DamagedShard(f"{where}: names a clip twice in keys: {ADVICE}")
    if record.rows > MAX_ROWS:
        raise DamagedShard(f"{where}: rows is {record.rows}, wanted at most {MAX_ROWS}: {ADVICE}")
    for name, entry in record.files.items():
        _check_name(name, where=where)
        file = load(StoredFile, entry, where=f"{where}: files[{name!r}]", how=STORED)
        if not _SHA256.fullmatch(file.sha256):
            raise DamagedShard(
                f"{where}: sha256 of {name!r} is {shown(file.sha256)}, wanted 64 hex digits: "
                f"{ADVICE}"
            )
    return record


def remove_done(folder: Path | str, shard: int) -> None:
    """Takes the promise back: from now on the shard is not done."""
    path = shard_path(Path(folder), shard, ".json")
    if path.exists():
        path.unlink()
        flush(path.parent)


def done_shards(folder: Path | str) -> list[int]:
    """The numbers of the finished shards, ascending."""
    shards = Path(folder) / "shards"
    names = [path.name for path in shards.iterdir()] if shards.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _RECORD_NAME.fullmatch(name)))


def read_all_done(folder: Path | str) -> list[DoneRecord]:
    """The records of all finished shards, in shard order."""
    return list(_iterate_done(folder))


def read_all_clips(folder: Path | str) -> list[DoneRecord]:
    """The same without statistics and decoders, which take most of the room: 60 KB a shard of 768
    channels."""
    return [replace(record, statistics={}, decoders={}) for record in _iterate_done(folder)]


def _iterate_done(folder: Path | str) -> Iterator[DoneRecord]:
    for shard in done_shards(folder):
        record = read_done(folder, shard)
        if record is not None:
            yield record


def write_quarantine(
    folder: Path | str, entries: Iterable[Quarantined] | None = None
) -> list[Quarantined]:
    """Writes quarantine.jsonl; gives its entries.

    entries: those of the done-records, from a caller that knows them; None: they are all read,
    which with many shards takes long.
    """
    entries = quarantined_of(read_all_clips(folder)) if entries is None else list(entries)
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
    with (Path(folder) / "timings.jsonl").open("a") as file:
        file.write(f"{json.dumps(dict(timing), sort_keys=True)}\n")


def _describe(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    entry: dict[str, Any] = {"bytes": size, "sha256": sha256_file(path)}
    if size > SAMPLED_ABOVE_BYTES:
        entry["sample_sha256"] = sample_sha256(path, size=size)
    return entry


def _check_name(name: str, *, where: str) -> None:
    parts = PurePosixPath(name).parts
    inside = len(parts) > 1 and parts[0] == "shards" and ".." not in parts
    if not inside or "\\" in name or "\0" in name or name != "/".join(parts):
        raise DamagedShard(
            f"{where}: names the file {shown(name)}, wanted a path below shards/: {ADVICE}"
        )


def file_problems(
    folder: Path, records: Sequence[DoneRecord], *, verify: Verify
) -> Generator[DamagedShard, None, None]:
    """Every file that is missing or differs from its done-record, in shard order."""
    root = os.path.realpath(folder)
    checks = [
        (record.shard, folder / name, entry)
        for record in records
        for name, entry in record.files.items()
    ]

    def check(item: tuple[int, Path, dict[str, Any]]) -> DamagedShard | None:
        return _file_problem(*item, root=root, depth=verify)

    # Hashing leaves the interpreter lock, waiting for a network file system does too.
    with ThreadPoolExecutor(max_workers=check_threads()) as pool:
        yield from (problem for problem in pool.map(check, checks) if problem is not None)


def check_files(folder: Path, record: DoneRecord, *, depth: Depth) -> None:
    """Raises DamagedShard for the first file of a shard that is not the promised one."""
    for problem in record_problems(folder, record, depth=depth):
        raise problem


def record_problems(
    folder: Path, record: DoneRecord, *, depth: Depth
) -> Generator[DamagedShard, None, None]:
    """Every file of a shard that is not the promised one."""
    root = os.path.realpath(folder)
    for name, entry in record.files.items():
        problem = _file_problem(record.shard, folder / name, entry, root=root, depth=depth)
        if problem is not None:
            yield problem


def check_threads() -> int:
    """Threads to read files with."""
    return min(MAX_THREADS, os.cpu_count() or 1)


def leaves(path: Path, root: str) -> bool:
    """Whether links lead from `path` out of the folder `root` (real path)."""
    return not os.path.realpath(path).startswith(f"{root.rstrip('/')}/")


def _file_problem(
    shard: int, path: Path, entry: dict[str, Any], *, root: str, depth: Depth
) -> DamagedShard | None:
    where = f"shard {shard:06d}: {path}"
    try:
        if leaves(path, root):
            return DamagedShard(
                f"{where}: is a link to {os.path.realpath(path)}, outside of the cache: "
                "copy the file into the cache instead"
            )
        size = path.stat().st_size
        if not path.is_file():
            return DamagedShard(f"{where}: is no file: {SHARD_ADVICE}")
        if size != entry["bytes"]:
            return DamagedShard(
                f"{where}: {size} bytes, the done-record says {entry['bytes']}: {SHARD_ADVICE}"
            )
        if _hash(path, entry, depth=depth) not in (None, entry["sha256"]):
            return DamagedShard(
                f"{where}: its SHA-256 is not that of the done-record, "
                f"the file was changed or damaged, or is another shard's: {SHARD_ADVICE}"
            )
    except OSError as error:
        return DamagedShard(f"{where}: cannot be read ({error.strerror}): {SHARD_ADVICE}")
    return None


def _hash(path: Path, entry: dict[str, Any], *, depth: Depth) -> str | None:
    """What must be the SHA-256 of the done-record; None if nothing is to be said against it."""
    if depth == "size":
        return None
    if depth == "sha256" or entry["bytes"] <= SAMPLED_ABOVE_BYTES:
        return sha256_file(path)
    wanted = entry.get("sample_sha256")  # caches of before have none
    if wanted is None or sample_sha256(path, size=entry["bytes"]) == wanted:
        return None
    return "another sample"


def commit_shard(folder: Path, record: DoneRecord, *, partial: Path, suffix: str) -> DoneRecord:
    """Moves `partial` onto shards/NNNNNN`suffix` and writes the done-record; gives the record.

    record: all but its `files`, which are described here. partial: a file or folder; not there if
    the shard has no windows. Gone afterwards, whatever happens. A shard that is already there with
    other bytes (a leftover, or clips that were tried again) is replaced, its record first.
    """
    final = shard_path(folder, record.shard, suffix)
    try:
        record = replace(record, files=_files(folder, partial, final))
        if record.rows and not record.files:  # else a good shard would be replaced by none
            raise FileNotFoundError(errno.ENOENT, "removed by another process", str(partial))
        for tries_left in reversed(range(_MAX_TRIES)):
            if _is_there(final, record.files, folder):
                break
            remove_done(folder, record.shard)
            try:
                _move(partial, final)
                break
            except OSError as error:
                if error.errno not in _IN_THE_WAY or not partial.exists() or not tries_left:
                    raise
    finally:
        remove(partial)
    write_done(folder, record)
    return record


def _move(partial: Path, final: Path) -> None:
    if partial.exists():
        publish(partial, final)
    else:
        remove(final)


def _files(folder: Path, partial: Path, final: Path) -> dict[str, dict[str, Any]]:
    """What the done-record is to say of the files of `partial` once they are at `final`."""
    before = partial.relative_to(folder).as_posix()
    after = final.relative_to(folder).as_posix()
    described = describe_files(folder, _all_files(partial))
    return {after + name.removeprefix(before): entry for name, entry in described.items()}


def _is_there(final: Path, files: dict[str, dict[str, Any]], folder: Path) -> bool:
    """Whether `final` holds these files and no other, byte for byte."""
    try:
        found = {path.relative_to(folder).as_posix(): path for path in _all_files(final)}
        return (
            final.exists() == bool(files)
            and found.keys() == files.keys()
            and all(
                path.stat().st_size == files[name]["bytes"]
                and sha256_file(path) == files[name]["sha256"]
                for name, path in found.items()
            )
        )
    except FileNotFoundError:  # moved away while it was looked at
        return False


def _all_files(path: Path) -> list[Path]:
    if path.is_dir():
        return [child for child in path.rglob("*") if not child.is_dir()]
    return [path] if path.exists() else []


def sample_sha256(path: Path, *, size: int) -> str:
    """The SHA-256, 64 hex digits, of 16 pieces of 4,096 bytes; piece i starts at byte
    i * (size - 4096) // 15. `size`: of the file, more than 64 KiB. OSError as reading does.

    Checksums inside a shard say that nothing was changed, not that it is the right shard: two whole
    ones of equal size can be swapped. Hashing a gigabyte to notice that takes a second, this takes
    16 small reads."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        for piece in range(NUM_PIECES):
            start = piece * (size - PIECE_BYTES) // (NUM_PIECES - 1)
            digest.update(os.pread(descriptor, PIECE_BYTES, start))
    finally:
        os.close(descriptor)
    return digest.hexdigest()
