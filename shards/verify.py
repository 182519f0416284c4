"""verify_cache: goes through every byte of a cache and says all that is wrong with it.

Readers stop at the first thing that is wrong; this one goes on, for `deltatok-shards verify`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from .cache import BLACK, CHANNEL_SCALE, PATCHES, CacheInfo, read_cache_info
from .contents import check_black, check_deltas, check_patches, check_scales
from .errors import DeltatokError
from .files import is_partial, sha256_file
from .opening import file_problems
from .plan import PLAN, num_shards, read_plan
from .records import DoneRecord, done_shards, read_done


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify_cache` found."""

    problems: list[str]
    """One sentence each; empty: the cache is whole."""
    shards: int
    """Shards with a readable done-record."""
    windows: int
    bytes: int
    """Bytes of the shards' files, by their done-records."""


def verify_cache(folder: Path | str) -> VerifyReport:
    """Checks presence, sizes, SHA-256, checksums, shapes, counts, values and leftovers.

    Raises UsageError, CacheMismatch or DamagedShard only where nothing can be checked: no such
    folder, no cache, no readable cache.json.
    """
    folder = Path(folder)
    info = read_cache_info(folder)
    problems: list[str] = []
    records: list[DoneRecord] = []
    for shard in done_shards(folder):
        try:
            record = read_done(folder, shard)
        except DeltatokError as error:
            problems.append(str(error))
            continue
        if record is not None:
            records.append(record)
            problems.extend(_shard_problems(folder, info, record))
    problems.extend(_cache_problems(folder, info))
    problems.extend(_count_problems(folder, info, records))
    problems.extend(_quarantine_problems(folder, records))
    problems.extend(_leftovers(folder, records))
    return VerifyReport(
        problems=problems,
        shards=len(records),
        windows=sum(record.rows for record in records),
        bytes=sum(int(entry["bytes"]) for record in records for entry in record.files.values()),
    )


def _shard_problems(folder: Path, info: CacheInfo, record: DoneRecord) -> Iterator[str]:
    different = [str(error) for error in file_problems(folder, [record], verify="sha256")]
    yield from different
    if different:
        return  # what is in changed files is no second problem
    suffix = ".zarr" if info.format == PATCHES else ".tar"
    own = f"shards/{record.shard:06d}{suffix}"
    strangers = [name for name in record.files if not f"{name}/".startswith(f"{own}/")]
    if strangers or bool(record.files) != bool(record.rows):
        yield (
            f"shard {record.shard:06d}: {record.rows} windows in {len(record.files)} files, "
            f"{len(strangers)} of them not its own: remove its done-record and make it again"
        )
    elif record.rows:
        check = check_patches if info.format == PATCHES else check_deltas
        try:
            check(folder, info, record)
        except DeltatokError as error:
            yield f"shard {record.shard:06d}: {error}"


def _cache_problems(folder: Path, info: CacheInfo) -> Iterator[str]:
    """Of the files beside the shards."""
    different: set[str] = set()
    for name, entry in info.files.items():
        path = folder / PurePosixPath(name).name
        if not path.is_file():
            continue  # named by those that read it
        if path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
            different.add(name)
            yield f"{path}: was changed since the cache was finished: restore it from a copy"
    if info.format != PATCHES:
        return
    for name, check in ((BLACK, check_black), (CHANNEL_SCALE, check_scales)):
        if name not in different:
            try:
                check(folder, info)
            except DeltatokError as error:
                yield str(error)


def _count_problems(folder: Path, info: CacheInfo, records: Sequence[DoneRecord]) -> Iterator[str]:
    try:
        plan = read_plan(folder)
    except DeltatokError as error:
        yield str(error)
        return
    done = {record.shard for record in records}
    wanted = set(range(num_shards(plan)))
    if missing := sorted(wanted - done):
        state = "marked complete, but" if info.complete else "not finished:"
        yield (
            f"{folder}: {state} {len(missing)} of {len(wanted)} shards are not done, first "
            f"{missing[0]:06d}: run the command that makes this cache again"
        )
    elif not info.complete:
        yield f"{folder}: not marked complete: run the command that makes this cache again"
    if strangers := sorted(done - wanted):
        yield f"{folder}: shard {strangers[0]:06d} is not in {PLAN}: remove its done-record"
    planned: dict[int, set[str]] = {}
    for entry in plan:
        planned.setdefault(entry.shard, set()).add(entry.key)
    for record in records:
        quarantined = {entry.clip for entry in record.quarantined}
        accounted = quarantined.union(record.keys)
        differing = accounted ^ planned.get(record.shard, set())
        if record.shard in wanted and differing:
            yield (
                f"shard {record.shard:06d}: clip {min(differing)!r} and {len(differing) - 1} more "
                f"are in {PLAN} or in its done-record, not in both: remove its done-record and "
                "make it again"
            )
    if missing:
        return
    counts = {"shards": len(records), "windows": sum(record.rows for record in records)}
    for name, count in counts.items():
        if info.complete and info.counts.get(name, count) != count:
            yield f"{folder}: {count} {name}, cache.json says {info.counts[name]}"


def _quarantine_problems(folder: Path, records: Sequence[DoneRecord]) -> Iterator[str]:
    path = folder / "quarantine.jsonl"
    entries = Counter(
        json.dumps(asdict(entry), sort_keys=True)
        for record in records
        for entry in record.quarantined
    )
    if not entries and not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        yield f"{path}: cannot be read ({error}): run the command that makes this cache again"
        return
    if Counter(lines) != entries:
        yield f"{path}: does not list the quarantined clips of the done-records: make it again"


def _leftovers(folder: Path, records: Sequence[DoneRecord]) -> Iterator[str]:
    """Files that no done-record names, and what killed writers left."""
    named = {name for record in records for name in record.files}
    named |= {f"shards/{record.shard:06d}.json" for record in records}
    unreadable = {f"shards/{shard:06d}.json" for shard in done_shards(folder)}
    strangers: Counter[str] = Counter()
    for path in sorted((folder / "shards").rglob("*")) if (folder / "shards").is_dir() else []:
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in named | unreadable:
            strangers["/".join(PurePosixPath(name).parts[:2])] += 1
    for name in sorted(strangers):
        what = "left by a killed run" if is_partial(Path(name)) else "in no done-record"
        yield f"{folder / name}: {strangers[name]} files {what}: remove it, or run again"
    for path in sorted(folder.iterdir()):
        if is_partial(path):
            yield f"{path}: left by a killed run: remove it"
