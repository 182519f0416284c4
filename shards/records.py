"""shards/NNNNNN.json, written last: it is the promise that the shard beside it is whole.

    {"shard": 0, "rows": 64, "keys": [...], "files": {"shards/000000.zarr/zarr.json":
     {"bytes": 1234, "sha256": "..."}, ...}, "statistics": {...}, "decoders": {...},
     "quarantined": [...], "format_version": 1}

Without its done-record a shard does not exist: readers skip it, writers replace it. Nothing that
differs from run to run (times, worker counts) is in here: those go to timings.jsonl.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from .checked import ADVICE, Fields, shown
from .errors import DamagedShard
from .files import flush, sha256_file, write_bytes, write_json
from .samples import SAMPLED_ABOVE_BYTES, sample_sha256
from .strict_json import read_json

_RECORD_NAME = re.compile(r"([0-9]{6,9})\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_ROWS = 2**31 - 1
RECORD_VERSION = 1
QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """One clip that gave no windows."""

    clip: str
    stage: str
    """Where it failed: "open", "decode", ..."""
    reason: str
    attempts: int


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
    fields = Fields(value, where=where)
    if fields.integer("shard") != shard:
        raise DamagedShard(f"{where}: is the record of another shard: {ADVICE}")
    keys = fields.texts("keys")
    if len(set(keys)) != len(keys):
        raise DamagedShard(f"{where}: names a clip twice in keys: {ADVICE}")
    return DoneRecord(
        shard=shard,
        keys=keys,
        rows=fields.integer("rows", high=MAX_ROWS),
        files=_parse_files(fields.mapping("files"), where=where),
        statistics=fields.mapping("statistics"),
        decoders=fields.text_mapping("decoders"),
        quarantined=[
            _parse_quarantined(item, where=f"{where}: quarantined")
            for item in fields.sequence("quarantined")
        ],
    )


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
    """Writes quarantine.jsonl, sorted by clip; gives its entries.

    entries: those of the done-records, from a caller that knows them; None: they are all read,
    which with many shards takes long.
    """
    if entries is None:
        entries = quarantined_of(read_all_clips(folder))
    entries = sorted(entries, key=lambda entry: (entry.clip, entry.stage))
    write_bytes(Path(folder) / QUARANTINE, quarantine_bytes(entries))
    return entries


def quarantined_of(records: Iterable[DoneRecord]) -> list[Quarantined]:
    """The entries of quarantine.jsonl, in its order."""
    entries = [entry for record in records for entry in record.quarantined]
    return sorted(entries, key=lambda entry: (entry.clip, entry.stage))


def quarantine_bytes(entries: Iterable[Quarantined]) -> bytes:
    """quarantine.jsonl with these entries."""
    return "".join(f"{json.dumps(asdict(entry), sort_keys=True)}\n" for entry in entries).encode()


def append_timing(folder: Path | str, timing: Mapping[str, Any]) -> None:
    """Adds one line to timings.jsonl (kept apart: it differs from run to run)."""
    with (Path(folder) / "timings.jsonl").open("a") as file:
        file.write(f"{json.dumps(dict(timing), sort_keys=True)}\n")


def _parse_files(value: dict[str, Any], *, where: str) -> dict[str, dict[str, Any]]:
    files = {}
    for name, entry in value.items():
        _check_name(name, where=where)
        fields = Fields(entry, where=f"{where}: files[{name!r}]")
        sha256 = fields.text("sha256")
        if not _SHA256.fullmatch(sha256):
            raise DamagedShard(
                f"{where}: sha256 of {name!r} is {shown(sha256)}, wanted 64 hex digits: {ADVICE}"
            )
        files[name] = {"bytes": fields.integer("bytes"), "sha256": sha256}
        sample_sha256 = fields.optional_text("sample_sha256")
        if sample_sha256 is not None:
            files[name]["sample_sha256"] = sample_sha256
    return files


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


def _parse_quarantined(value: object, *, where: str) -> Quarantined:
    fields = Fields(value, where=where)
    return Quarantined(
        clip=fields.text("clip"),
        stage=fields.text("stage"),
        reason=fields.text("reason"),
        attempts=fields.integer("attempts"),
    )
