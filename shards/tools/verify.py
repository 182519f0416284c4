"""What lies beside the shards: cache.json, plan, index, quarantine, and what belongs to nobody.

For `verify_cache`; every function yields sentences, `plan_problems` and `index_problems` with the
shard that is to be made again.

Checks of what is in a shard: every frame, every value. For `verify_cache(deep=True)`.

verify_cache: goes through every byte of a cache and says all that is wrong with it.

Readers stop at the first thing that is wrong; this one goes on, for `deltatok-shards verify`. What
lies beside the shards is checked by `verify_beside`, what is in them by `contents`.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cache import BLACK, CHANNEL_SCALE, NOTICE, PATCHES, CacheInfo, checksum, read_cache_info
from ..deltas.reader import Block, read_blocks, read_timestamps, read_tokens, read_windows
from ..errors import CacheMismatch, DamagedShard, DeltatokError
from ..files import is_partial, sha256_file
from ..index import INDEX, read_index, read_indexed
from ..patches.int8 import UNSTORABLE, read_channel_scale
from ..patches.reader import TokenReader
from ..patches.table import check_attributes, logical_dtype, read_black, read_shard_table
from ..patches.writer import StoredStatistics
from ..patches.zarr_arrays import read_attributes
from ..plan import PLAN, num_shards, read_plan
from ..records import (
    QUARANTINE,
    SHARD_ADVICE,
    DoneRecord,
    check_threads,
    done_shards,
    leaves,
    quarantine_bytes,
    quarantined_of,
    read_done,
    record_problems,
    shard_path,
)
from ..schema import read_file, read_json


def check_patches(folder: Path, info: CacheInfo, record: DoneRecord) -> None:
    """Reads every frame of a patch-token shard; raises at the first fault."""
    group = shard_path(folder, record.shard, ".zarr")
    check_attributes(group, record, info)
    _check_described(group, info, record)
    table = read_shard_table(group, record, info.shape.num_frames)
    check_windows(table["timestamps_s"], table["frame_index"], table["crop"], where=str(group))
    tokens = TokenReader(group, info, rows=record.rows)
    files, stored = tokens.open(), tokens.new_frames(1)
    values = np.empty(stored.shape, dtype=np.float32)
    statistics = StoredStatistics(info.shape.hidden_size)
    for window in range(record.rows):
        for index in range(info.shape.num_frames):
            tokens.read_values(files, window, [index], out=values, stored=stored)
            usable = np.isfinite(values).all()
            if stored.dtype == np.int8:
                usable = usable and stored.min() != UNSTORABLE
            if not usable:
                raise DamagedShard(
                    f"{tokens.path}: window {window}, frame {index} has values that are not "
                    f"finite: {SHARD_ADVICE}"
                )
            statistics.add(values[0])
    statistics.check(record.statistics, where=str(shard_path(folder, record.shard, ".json")))


def check_deltas(folder: Path, info: CacheInfo, record: DoneRecord) -> None:
    """Reads every block of a delta-token shard; DamagedShard at the first fault."""
    path = shard_path(folder, record.shard, ".tar")
    shape = info.shape
    blocks = read_blocks(path, num_frames=shape.num_frames, hidden_size=shape.hidden_size)
    rows = sum(block.num_windows for block in blocks)
    if rows != record.rows:
        raise DamagedShard(
            f"{path}: {rows} windows, the done-record says {record.rows}: {SHARD_ADVICE}"
        )
    statistics = StoredStatistics(shape.hidden_size)
    for block in blocks:
        _check_block(path, block, info, record)
        statistics.add(read_tokens(path, block))
    statistics.check(record.statistics, where=str(shard_path(folder, record.shard, ".json")))


def check_black(folder: Path, info: CacheInfo) -> None:
    """Reads black.npy."""
    shape = info.shape
    black = read_black(folder / BLACK, info, (shape.num_tokens or 0, shape.hidden_size))
    _check_finite(black, f"{folder / BLACK}")


def check_scales(folder: Path, info: CacheInfo) -> None:
    """Reads channel_scale.npy, where the cache must have one."""
    if logical_dtype(info) == "int8":
        read_channel_scale(folder, info)


def check_windows(
    timestamps_s: NDArray[np.float32], frame_index: ArrayLike, crop: ArrayLike, *, where: str
) -> None:
    """Raises DamagedShard unless times (W, T) and frames (W, T) are 0 or more and never decrease
    within a window (a slow clip repeats frames), and crops (W, 4) are areas of a frame."""
    frames, crops = np.asarray(frame_index), np.asarray(crop, dtype=np.float64)
    _check_finite(timestamps_s, f"{where}: timestamps_s")
    _check_finite(crops, f"{where}: crop")
    for name, values in (("timestamps_s", timestamps_s), ("frame_index", frames)):
        for wrong, what in (
            ((values < 0).any(axis=1), "is negative"),
            ((np.diff(values, axis=1) < 0).any(axis=1), "decreases"),
        ):
            if wrong.any():
                window = int(np.flatnonzero(wrong)[0])
                raise DamagedShard(f"{where}: window {window}: {name} {what}: {SHARD_ADVICE}")
    wrong = (crops[:, :2] < 0).any(axis=1) | (crops[:, 2:] <= 0).any(axis=1)
    if wrong.any():
        window = int(np.flatnonzero(wrong)[0])
        raise DamagedShard(
            f"{where}: window {window}: crop {crops[window].tolist()}, wanted top and left of 0 or "
            f"more, height and width above 0: {SHARD_ADVICE}"
        )


def _check_described(group: Path, info: CacheInfo, record: DoneRecord) -> None:
    """What the shard says of itself and no reader needs."""
    attributes = read_attributes(group)
    wanted = {
        "format": PATCHES,
        "format_version": info.format_version,
        "licence": info.licence,
        "shard": record.shard,
        "grid": list(info.shape.grid or ()),
        "logical_dtype": logical_dtype(info),
    }
    for name, value in wanted.items():
        if attributes.get(name) != value:
            raise DamagedShard(
                f"{group}: its attribute {name} is {attributes.get(name)!r}, wanted {value!r}: "
                f"{SHARD_ADVICE}"
            )


def _check_block(path: Path, block: Block, info: CacheInfo, record: DoneRecord) -> None:
    shape = info.shape
    where = f"{path}: {block.tokens.name}"
    _check_finite(read_tokens(path, block), where)
    windows = read_windows(path, block, num_frames=shape.num_frames)
    timestamps_s = read_timestamps(path, block)
    where = f"{path}: {block.windows.name}"
    check_windows(
        timestamps_s,
        [window["frames"] for window in windows],
        [window["crop"] for window in windows],
        where=where,
    )
    if (timestamps_s[:, 0] != 0).any():
        raise DamagedShard(f"{path}: {block.timestamps.name}: a window does not begin at 0 s")
    keys = set(record.keys)
    for window in windows:
        if window["clip"] not in keys:
            raise DamagedShard(
                f"{where}: clip {window['clip']!r} is not in the done-record: {SHARD_ADVICE}"
            )


def _check_finite(values: NDArray[Any], where: str) -> None:
    if not np.isfinite(values).all():
        raise DamagedShard(f"{where}: has values that are not finite: {SHARD_ADVICE}")


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
    damaged: list[int]
    """Shards to be made again."""
    missing: list[int]
    """Shards of the plan that are not done."""
    leftovers: Leftovers
    """Files that belong to no shard."""
    is_deep: bool
    """Whether what is in the files was looked at, too."""


def verify_cache(
    folder: Path | str,
    *,
    deep: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> VerifyReport:
    """Checks presence, sizes, SHA-256, counts and leftovers; with `deep` also decodes every chunk
    and looks at checksums, dtypes, shapes, values, times, crops and statistics.

    progress: called with (shards done, shards in all, bytes done) after every shard. Raises
    UsageError, CacheMismatch or DamagedShard only where nothing can be checked: no such folder, no
    cache, no readable cache.json.
    """
    folder = Path(folder)
    info = read_cache_info(folder)
    problems: list[str] = []
    damaged: set[int] = set()
    records: list[DoneRecord] = []
    shards, num_bytes = done_shards(folder), 0
    with ThreadPoolExecutor(max_workers=check_threads()) as pool:
        found = pool.map(lambda shard: _check_shard(folder, info, shard, deep), shards)
        for number, (shard, result) in enumerate(zip(shards, found, strict=True), start=1):
            problems += result.problems
            damaged.update([shard] * result.is_damaged)
            if result.record is not None:
                records.append(result.record)
                num_bytes += _size(result.record)
            if progress is not None:
                progress(number, len(shards), num_bytes)
    problems += cache_problems(folder, info)
    for doubted, problem in plan_problems(folder, info, records):
        problems.append(problem)
        damaged.update([] if doubted is None else [doubted])
    for doubted, problem in index_problems(folder, info, records, set(damaged)):
        problems.append(problem)
        damaged.update([] if doubted is None else [doubted])
    problems += count_problems(folder, info, records)
    problems += quarantine_problems(folder, records)
    leftovers = find_leftovers(folder, records)
    problems += leftovers.problems(folder)
    return VerifyReport(
        problems=problems,
        shards=len(records),
        windows=sum(record.rows for record in records),
        bytes=num_bytes,
        damaged=sorted(damaged),
        missing=missing_shards(folder, records),
        leftovers=leftovers,
        is_deep=deep,
    )


@dataclass(frozen=True)
class _Checked:
    record: DoneRecord | None
    """Without what takes room and is not needed again; None if it cannot be read."""
    problems: list[str]
    is_damaged: bool
    """Whether making the shard again is what mends it."""


def _check_shard(folder: Path, info: CacheInfo, shard: int, deep: bool) -> _Checked:
    try:
        record = read_done(folder, shard)
    except DeltatokError as error:
        return _Checked(None, [str(error)], True)
    if record is None:  # taken back just now
        return _Checked(None, [], False)
    problems, is_damaged = _shard_problems(folder, info, record, deep)
    return _Checked(replace(record, statistics={}, decoders={}), problems, is_damaged)


def _shard_problems(
    folder: Path, info: CacheInfo, record: DoneRecord, deep: bool
) -> tuple[list[str], bool]:
    """What is wrong with a shard, and whether making it again is what mends it."""
    different = [str(error) for error in record_problems(folder, record, depth="sha256")]
    if different:
        return different, True  # what is in changed files is no second problem
    suffix = ".zarr" if info.format == PATCHES else ".tar"
    own = f"shards/{record.shard:06d}{suffix}"
    strangers = [name for name in record.files if not f"{name}/".startswith(f"{own}/")]
    if strangers or bool(record.files) != bool(record.rows):
        problem = (
            f"shard {record.shard:06d}: {record.rows} windows in {len(record.files)} files, "
            f"{len(strangers)} of them not its own: remove its done-record and make it again"
        )
        return [problem], True
    if record.rows and deep:
        check = check_patches if info.format == PATCHES else check_deltas
        try:
            check(folder, info, record)
        except DeltatokError as error:
            # Files as they were written that are not of this cache speak against cache.json.
            return [f"shard {record.shard:06d}: {error}"], not isinstance(error, CacheMismatch)
    return [], False


def _size(record: DoneRecord) -> int:
    return sum(int(entry["bytes"]) for entry in record.files.values())
