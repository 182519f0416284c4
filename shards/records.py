"""Done-records: what each finished shard holds, whether it is still there, and how it gets there.

    shards/NNNNNN.json   {"format_version": 1, "shard": 0, "clips": 64, "keys_sha256": "...",
                         "rows": 256, "file": {"bytes": 1234, "sha256": "..."}, "abs_max": 3.5,
                         "beyond_float16": 0, "decoder": "pyav", "other_decoders": {},
                         "quarantined": [], "checksum": "sha256:..."}
    quarantine.jsonl     the clips without windows, of all done-records

A done-record is written last: it promises that the one file beside it is whole. Without one a shard
does not exist: readers skip it, writers replace it. Nothing that differs from run to run (times,
worker counts) is in it: that goes to timings.jsonl. Which clips have windows is not in it either:
those of the shard's line in the plan less the quarantined, in that order.

Files are held against their record in two depths: `size` (there, a regular file inside the cache
folder, of this size) and `sha256` (every byte).

Processes make different shards of a folder, unless somebody starts the same command twice; then two
can finish the same one at once. Same clips, same bytes: `commit_shard` of the second finds the
shard there as it would have written it and leaves it alone. So nothing that a done-record promises
is ever taken away, and whoever comes last writes the same record.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .errors import CacheMismatch, DamagedShard, damaged_shard
from .files import flush, json_bytes, open_append, publish, remove, sha256_file, write_bytes
from .schema import ADVICE, STORED, canonical_json, load, parse_json, read_file, shown
from .stores.upload import shard_done, shard_taken_back

_RECORD_NAME = re.compile(r"([0-9]{6,9})\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_ROWS = 2**31 - 1
RECORD_VERSION = 1
QUARANTINE = "quarantine.jsonl"
MAX_QUARANTINE_BYTES = 2**32
"""Ten million clips (a guess)."""
MAX_THREADS = 8
"""That read files to hold them against their records (a guess)."""

Verify = Literal["size", "sha256"]


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
    clips: int
    """The shard's clips that have windows; see `plan.shard_keys`."""
    keys_sha256: str
    """Of their keys, see `plan.keys_sha256`."""
    rows: int
    """Windows."""
    file: StoredFile | None = None
    """The shard's data; None without windows."""
    abs_max: float = 0.0
    """The largest absolute value of the tokens."""
    beyond_float16: int = 0
    """How many values of the tokens float16 could not hold."""
    decoder: str | None = None
    """What decoded the clips, where that is known: most of them."""
    other_decoders: dict[str, str | None] = field(default_factory=dict)
    """Clip -> what decoded it, of those that `decoder` did not decode."""
    quarantined: list[Quarantined] = field(default_factory=list)

    @property
    def lost(self) -> set[str]:
        """The keys of its clips without windows."""
        return {entry.clip for entry in self.quarantined}

    def decoders(self, keys: Iterable[str]) -> dict[str, str]:
        """Clip -> the decoder that read it, of those of `keys` of which that is known."""
        named = {key: self.other_decoders.get(key, self.decoder) for key in keys}
        return {key: decoder for key, decoder in named.items() if decoder is not None}


@dataclass(frozen=True, kw_only=True)
class _Version:
    format_version: int


def shard_path(folder: Path, shard: int, suffix: str) -> Path:
    """`folder`/shards/NNNNNN`suffix`."""
    return folder.joinpath("shards", f"{shard:06d}{suffix}")


def write_done(folder: Path | str, record: DoneRecord) -> None:
    """Writes the done-record: the last step of writing a shard."""
    value = {"format_version": RECORD_VERSION, **asdict(record)}
    write_bytes(shard_path(Path(folder), record.shard, ".json"), done_bytes(value))
    shard_done(Path(folder), record.shard)


def done_bytes(value: Mapping[str, Any]) -> bytes:
    """The file of a done-record; its `checksum` is made anew."""
    value = {name: item for name, item in value.items() if name != "checksum"}
    digest = hashlib.sha256(canonical_json(value).encode()).hexdigest()
    return json_bytes({**value, "checksum": f"sha256:{digest}"})


def is_done_untouched(folder: Path, shard: int) -> bool:
    """Whether the done-record, which can be read, is byte for byte as it was written."""
    path = shard_path(folder, shard, ".json")
    data = read_file(path)
    return data == done_bytes(parse_json(data, where=str(path)))


def read_done(folder: Path | str, shard: int) -> DoneRecord | None:
    """The done-record of a shard, None if it is not done.

    Raises DamagedShard if it is malformed, CacheMismatch for a newer format_version.
    """
    path = shard_path(Path(folder), shard, ".json")
    try:
        data = read_file(path)
    except DamagedShard:
        if not path.is_file():
            return None
        raise
    return _parse_done(shard, data, where=str(path))


def _parse_done(shard: int, data: bytes, *, where: str) -> DoneRecord:
    value = parse_json(data, where=where)
    if not (type(value) is dict and value.get("format_version") == RECORD_VERSION):
        version = load(_Version, value, where=where, how=STORED).format_version
        if version > RECORD_VERSION:
            raise CacheMismatch(
                f"{where}: format_version {version}, this release reads up to {RECORD_VERSION}: "
                "update deltatok"
            )
        raise DamagedShard(f"{where}: format_version is {version}: {ADVICE}")
    record = load(DoneRecord, value, where=where, how=STORED)
    if record.shard != shard:
        raise DamagedShard(f"{where}: is the record of another shard: {ADVICE}")
    if record.rows > MAX_ROWS:
        raise DamagedShard(f"{where}: rows is {record.rows}, wanted at most {MAX_ROWS}: {ADVICE}")
    if (record.file is None) != (record.rows == 0):
        raise DamagedShard(
            f"{where}: rows is {record.rows} and file {shown(record.file)}, wanted a file where "
            f"there are windows, and only there: {ADVICE}"
        )
    hashes = {"keys_sha256": record.keys_sha256}
    if record.file is not None:
        hashes["file: sha256"] = record.file.sha256
    for name, text in hashes.items():
        if not _SHA256.fullmatch(text):
            raise DamagedShard(f"{where}: {name} is {shown(text)}, wanted 64 hex digits: {ADVICE}")
    return record


def remove_done(folder: Path | str, shard: int) -> None:
    """Takes the promise back: from now on the shard is not done, also after a power loss."""
    path = shard_path(Path(folder), shard, ".json")
    shard_taken_back(Path(folder), shard)
    path.unlink(missing_ok=True)
    flush(path.parent)  # if it was gone: whoever removed it may have been killed before this


def done_shards(folder: Path | str) -> list[int]:
    """The numbers of the finished shards, ascending."""
    shards = Path(folder) / "shards"
    if not shards.is_dir():
        return []
    with os.scandir(shards) as entries:  # a name at a time
        matches = (_RECORD_NAME.fullmatch(entry.name) for entry in entries)
        return sorted(int(match[1]) for match in matches if match)


def iterate_done(folder: Path | str) -> Iterator[DoneRecord]:
    """The records of all finished shards, in shard order."""
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
    if entries is None:
        entries = quarantined_of(iterate_done(folder))
    entries = list(entries)
    write_bytes(Path(folder) / QUARANTINE, quarantine_bytes(entries))
    return entries


def read_quarantine(folder: Path | str) -> list[Quarantined]:
    """The entries of quarantine.jsonl; DamagedShard if it is missing or malformed."""
    path = Path(folder) / QUARANTINE
    advice = "`deltatok-shards verify --repair` makes it again from the done-records"
    data = read_file(path, max_bytes=MAX_QUARANTINE_BYTES, advice=advice)
    return [
        load(Quarantined, parse_json(line, where=where), where=where, how=STORED)
        for number, line in enumerate(data.splitlines(), start=1)
        if (where := f"{path}: line {number}")
    ]


def quarantined_of(records: Iterable[DoneRecord]) -> list[Quarantined]:
    """The clips without windows of these records."""
    return [entry for record in records for entry in record.quarantined]


def quarantine_bytes(entries: Iterable[Quarantined]) -> bytes:
    """quarantine.jsonl with these entries: one a line, sorted by clip."""
    entries = sorted(entries, key=lambda entry: (entry.clip, entry.stage))
    return "".join(f"{json.dumps(vars(entry), sort_keys=True)}\n" for entry in entries).encode()


def append_timing(folder: Path | str, timing: Mapping[str, Any]) -> None:
    """Adds one line to timings.jsonl (kept apart: it differs from run to run)."""
    with open_append(Path(folder) / "timings.jsonl") as file:
        file.write(f"{json.dumps(dict(timing), sort_keys=True)}\n".encode())


def check_file(path: Path, shard: int, file: StoredFile, *, depth: Verify) -> None:
    """Raises DamagedShard unless `path`, the data of a shard, is `file`."""
    try:
        problem = _problem(path, file, depth=depth)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem is not None:
        raise damaged_shard(f"shard {shard:06d}: {path}: {problem}")


def check_threads() -> int:
    """Threads to read files with."""
    return min(MAX_THREADS, os.cpu_count() or 1)


def leaves(path: Path, folder: Path) -> bool:
    """Whether links lead from `path` out of `folder`."""
    return not os.path.realpath(path).startswith(f"{os.path.realpath(folder).rstrip('/')}/")


def _problem(path: Path, file: StoredFile, *, depth: Verify) -> str | None:
    if leaves(path, path.parent.parent):
        target = os.path.realpath(path)
        return f"is a link to {target}, outside of the cache (copy the file into the cache)"
    size = path.stat().st_size
    if not path.is_file():
        return "is no file"
    if size != file.bytes:
        return f"{size} bytes, the done-record says {file.bytes}"
    if depth == "size" or sha256_file(path) == file.sha256:
        return None
    return (
        "its SHA-256 is not that of the done-record, the file was changed or damaged, or is "
        "another shard's"
    )


def commit_shard(folder: Path, record: DoneRecord, *, partial: Path, suffix: str) -> DoneRecord:
    """Moves the file `partial` onto shards/NNNNNN`suffix` and writes the done-record; gives the
    record.

    record: all but its `file`, which is described here. partial: not there if the shard has no
    windows. Gone afterwards, whatever happens. A shard that is already there with other bytes (a
    leftover, or clips that were tried again) is replaced, its record first.
    """
    final = shard_path(folder, record.shard, suffix)
    try:
        if record.rows:
            record = replace(record, file=_describe(partial))
        if _is_there(final, record.file):
            flush(final.parent)  # whoever moved it there may have been killed before this
        else:
            remove_done(folder, record.shard)
            if record.file is None or final.is_dir():
                remove(final)
            if record.file is not None:
                publish(partial, final)
    finally:
        remove(partial)
    write_done(folder, record)
    return record


def _describe(path: Path) -> StoredFile:
    return StoredFile(bytes=path.stat().st_size, sha256=sha256_file(path))


def _is_there(final: Path, file: StoredFile | None) -> bool:
    """Whether `final` is this file, byte for byte, or for None not there."""
    if file is None:
        return not os.path.lexists(final)
    try:
        return not final.is_symlink() and _describe(final) == file
    except OSError:  # not there, removed while it was looked at, or no regular file
        return False
