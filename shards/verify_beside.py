"""What lies beside the shards: cache.json, plan, index, quarantine, and what belongs to nobody.

For `verify_cache`; every function yields sentences, `plan_problems` and `index_problems` with the
shard that is to be made again.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .cache import BLACK, CHANNEL_SCALE, PATCHES, CacheInfo
from .contents import check_black, check_scales
from .errors import DeltatokError
from .file_checks import leaves
from .files import is_partial, sha256_file
from .identity import checksum
from .index import INDEX, read_index, read_indexed
from .notice import NOTICE
from .plan import PLAN, num_shards, read_plan
from .records import QUARANTINE, DoneRecord, done_shards, quarantine_bytes, quarantined_of
from .strict_json import read_file, read_json

KNOWN_NAMES = {
    "cache.json",
    PLAN,
    BLACK,
    CHANNEL_SCALE,
    QUARANTINE,
    INDEX,
    NOTICE,
    "timings.jsonl",
    "shards",
}
_FOR_PEOPLE = ("licen", "readme")
"""How names begin that may be in any folder."""


@dataclass(frozen=True, kw_only=True)
class Leftovers:
    """What is in a cache folder and in no done-record; paths relative to the folder."""

    partials: list[str]
    """What killed writers left: in the folder and in shards/."""
    orphans: dict[str, int]
    """What nobody knows: name in the folder, or in shards/ -> number of files."""

    def problems(self, folder: Path) -> Iterator[str]:
        """A sentence for each."""
        for name in self.partials:
            yield f"{folder / name}: left by a killed run: remove it, or run again"
        for name, count in self.orphans.items():
            yield f"{folder / name}: {count} files in no done-record: remove it, or run again"


def find_leftovers(folder: Path, records: Sequence[DoneRecord]) -> Leftovers:
    """Looks through the folder; links are named, not followed."""
    named = {name for record in records for name in record.files}
    named |= {f"shards/{shard:06d}.json" for shard in done_shards(folder)}
    orphans: Counter[str] = Counter()
    partials = []
    for path in sorted(folder.iterdir()):
        if is_partial(path):
            partials.append(path.name)
        elif path.name not in KNOWN_NAMES and not path.name.lower().startswith(_FOR_PEOPLE):
            orphans[path.name] += 1
    shards = folder / "shards"
    for path in sorted(shards.iterdir()) if shards.is_dir() else []:
        name = f"shards/{path.name}"
        if is_partial(path):
            partials.append(name)
            continue
        for file in _files_below(path):
            if file.relative_to(folder).as_posix() not in named:
                orphans[name] += 1
    return Leftovers(partials=partials, orphans=dict(orphans))


def cache_problems(folder: Path, info: CacheInfo) -> Iterator[str]:
    """Of cache.json and the files whose hashes it tells."""
    if not is_untouched(folder):
        yield f"{folder / 'cache.json'}: was changed by hand or damaged: restore it from a copy"
    root = os.path.realpath(folder)
    different: set[str] = set()
    for name, entry in info.files.items():
        path = folder / PurePosixPath(name).name
        if name in (NOTICE, INDEX) and not path.exists():
            yield f"{path}: missing: run the command that makes this cache again"
        if not path.is_file():
            continue  # named by those that read it
        try:
            if leaves(path, root):
                yield f"{path}: is a link out of the cache: copy the file into it instead"
                continue
            same = path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]
        except OSError as error:
            yield f"{path}: cannot be read ({error.strerror}): restore it from a copy"
            continue
        if not same:
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


def is_untouched(folder: Path) -> bool:
    """Whether cache.json is as it was written; caches of before cannot tell."""
    value = read_json(folder / "cache.json")
    return "checksum" not in value or bool(value["checksum"] == checksum(value))


def missing_shards(folder: Path, records: Sequence[DoneRecord]) -> list[int]:
    """The shards of the plan that are not done; none where there is no plan to tell."""
    try:
        wanted = num_shards(read_plan(folder))
    except DeltatokError:
        return []
    return sorted(set(range(wanted)) - {record.shard for record in records})


def count_problems(folder: Path, info: CacheInfo, records: Sequence[DoneRecord]) -> Iterator[str]:
    """Of the shards there are against those there should be."""
    try:
        wanted = num_shards(read_plan(folder))
    except DeltatokError as error:
        yield str(error)
        return
    done = {record.shard for record in records}
    if missing := missing_shards(folder, records):
        state = "marked complete, but" if info.complete else "not finished:"
        yield (
            f"{folder}: {state} {len(missing)} of {wanted} shards are not done, first "
            f"{missing[0]:06d}: run the command that makes this cache again"
        )
    elif not info.complete:
        yield f"{folder}: not marked complete: run the command that makes this cache again"
    if strangers := sorted(shard for shard in done if shard >= wanted):
        yield f"{folder}: shard {strangers[0]:06d} is not in {PLAN}: remove its done-record"
    if missing:
        return
    counts = {"shards": len(records), "windows": sum(record.rows for record in records)}
    for name, count in counts.items():
        if info.complete and info.counts.get(name, count) != count:
            yield f"{folder}: {count} {name}, cache.json says {info.counts[name]}"


def plan_problems(
    folder: Path, info: CacheInfo, records: Sequence[DoneRecord]
) -> Iterator[tuple[int | None, str]]:
    """Shards whose clips are not those of the plan; None while nobody can tell which is wrong."""
    try:
        plan = read_plan(folder)
    except DeltatokError:
        return  # named by count_problems
    planned: dict[int, set[str]] = {}
    for entry in plan:
        planned.setdefault(entry.shard, set()).add(entry.key)
    known = info.files.get(PLAN)
    if known is not None and sha256_file(folder / PLAN) != known["sha256"]:
        return  # a changed plan says nothing against a shard
    for record in records:
        accounted = {entry.clip for entry in record.quarantined}.union(record.keys)
        differing = accounted ^ planned.get(record.shard, set())
        if record.shard in planned and differing:
            yield (
                None if known is None else record.shard,
                f"shard {record.shard:06d}: clip {min(differing)!r} and {len(differing) - 1} more "
                f"are in {PLAN} or in its done-record, not in both: remove its done-record and "
                "make it again",
            )


def index_problems(
    folder: Path, info: CacheInfo, records: Sequence[DoneRecord], known: set[int]
) -> Iterator[tuple[int | None, str]]:
    """Done-records that were changed since the cache was finished, but not those of `known`; None
    where it is the index that is wrong."""
    entry, path = info.files.get(INDEX), folder / INDEX
    if not info.complete or entry is None or not path.is_file():
        return
    if sha256_file(path) != entry["sha256"]:
        return  # named by cache_problems
    try:
        index = read_index(folder, sha256=entry["sha256"]) or []
    except DeltatokError as error:
        yield None, str(error)
        return
    done = {record.shard for record in records}
    if missing := sorted(done - {line.shard for line in index}):
        yield None, f"{path}: does not tell of shard {missing[0]:06d}: delete it, and repair"
    for line in index:
        if line.shard in done - known:
            try:
                read_indexed(folder, line)
            except DeltatokError as error:
                yield line.shard, str(error)


def quarantine_problems(folder: Path, records: Sequence[DoneRecord]) -> Iterator[str]:
    """quarantine.jsonl must be what the done-records give."""
    path = folder / QUARANTINE
    wanted = quarantine_bytes(quarantined_of(records))
    if not wanted and not path.exists():
        return
    try:
        got = read_file(path, advice="run the command that makes this cache again")
    except DeltatokError as error:
        yield str(error)
        return
    if got != wanted:
        yield f"{path}: does not list the quarantined clips of the done-records: make it again"


def _files_below(path: Path) -> Iterator[Path]:
    if path.is_symlink() or not path.is_dir():
        yield path
        return
    for child in sorted(path.iterdir()):
        yield from _files_below(child)
