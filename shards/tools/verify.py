"""verify_cache: goes through every byte of a cache and names all that is wrong with it.

Readers stop at the first thing that is wrong; this goes on, for `deltatok-shards verify`:

    shards      files against their done-records; with `deep` every value, time and crop
    folder      cache.json, black.npy, scales, plan, index, quarantine, and what belongs to nobody

Statistics of stored values are taken again while a shard is read, and held against its done-record:
sums in float64 over all tokens; the writer's are partly in float32, hence the tolerances.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cache import BLACK, CHANNEL_SCALE, NOTICE, PATCHES, CacheInfo, checksum, read_cache_info
from ..deltas.reader import Block, read_blocks, read_timestamps, read_tokens, read_windows
from ..errors import CacheMismatch, DamagedShard, DeltatokError
from ..files import is_partial, sha256_file
from ..index import INDEX, read_index, read_indexed
from ..patches.int8 import UNSTORABLE, read_channel_scale
from ..patches.layout import FLOAT16_MAX
from ..patches.reader import (
    TokenReader,
    check_attributes,
    logical_dtype,
    read_black,
    read_shard_table,
)
from ..patches.zarr_arrays import read_attributes
from ..plan import PLAN, PlanEntry, num_shards, read_plan
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
from ..schema import is_number, read_file, read_json

_OF_STD = 1e-3
"""Of a channel's standard deviation: what mean and deviation may differ by."""
_OF_MAX = 1e-6
"""And of the largest value, for channels that hardly vary."""


class StoredStatistics:
    """Of the values of one shard, D channels."""

    def __init__(self, num_channels: int) -> None:
        self._shift: NDArray[np.float64] | None = None
        self._sums = np.zeros(num_channels)
        self._squares = np.zeros(num_channels)
        self._count = 0
        self._abs_max = 0.0
        self._beyond_float16 = 0

    def add(self, values: NDArray[Any]) -> None:
        """Takes tokens (..., D), finite."""
        tokens = values.reshape(-1, values.shape[-1]).astype(np.float64)
        if self._shift is None:  # around the first mean: outlier channels keep their digits
            self._shift = tokens.mean(axis=0)
        magnitude = np.abs(tokens)
        self._abs_max = max(self._abs_max, float(magnitude.max()))
        self._beyond_float16 += int(np.count_nonzero(magnitude > FLOAT16_MAX))
        tokens -= self._shift
        self._sums += tokens.sum(axis=0)
        self._squares += np.einsum("nd,nd->d", tokens, tokens)
        self._count += len(tokens)

    def check(self, said: Mapping[str, Any], *, where: str) -> None:
        """Raises DamagedShard unless `said`, the `statistics` of the done-record, are these."""
        if self._shift is None:
            return
        mean = self._sums / self._count
        std = np.sqrt(np.maximum(self._squares / self._count - mean * mean, 0.0))
        mean += self._shift
        allowed = _OF_STD * std + _OF_MAX * self._abs_max
        for name, got in (("channel_mean", mean), ("channel_std", std)):
            values = said.get(name)
            if not isinstance(values, list) or len(values) != len(got):
                raise DamagedShard(f"{where}: statistics.{name} is no list of {len(got)} numbers")
            if not all(map(is_number, values)):
                raise DamagedShard(f"{where}: statistics.{name} has what is no number")
            far = np.flatnonzero(~(np.abs(np.array(values, dtype=np.float64) - got) <= allowed))
            if far.size:
                channel = int(far[0])
                raise DamagedShard(
                    f"{where}: statistics.{name} says {values[channel]} of channel {channel}, the "
                    f"shard's values give {got[channel]:.6g} ({far.size} channels differ)"
                )
        counted = {"abs_max": self._abs_max, "beyond_float16": self._beyond_float16}
        for name, value in counted.items():
            # Delta shards do not count values beyond float16: they are float16.
            if said.get(name, 0 if name == "beyond_float16" else None) != value:
                raise DamagedShard(
                    f"{where}: statistics.{name} is {said.get(name)!r}, the values give {value!r}"
                )


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

Kind = Literal["shard", "unfinished", "leftover", "folder"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is wrong with a cache."""

    kind: Kind
    """shard: `shard` is to be made again. unfinished: shards are missing, or the last step that
    closes the cache: run the command that makes it. leftover: a file that no done-record names.
    folder: anything else, which making shards again does not mend."""
    text: str
    """A sentence that names the file and says what to do."""
    shard: int | None = None
    """The shard it is about, or among whose files it lies."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify_cache` found."""

    problems: list[Problem]
    """Empty: the cache is whole."""
    shards: int
    """Shards with a readable done-record."""
    windows: int
    bytes: int
    """Bytes of the shards' files, by their done-records."""
    missing: list[int]
    """Shards of the plan that are not done."""
    partials: list[str]
    """What killed writers left, in the folder and in shards/; paths relative to the folder."""
    orphans: dict[str, int]
    """What nobody knows: name in the folder, or in shards/ -> number of files."""
    is_deep: bool
    """Whether what is in the files was looked at, too."""

    @property
    def damaged(self) -> list[int]:
        """Shards to be made again, ascending."""
        return sorted(
            {
                problem.shard
                for problem in self.problems
                if problem.kind == "shard" and problem.shard is not None
            }
        )


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
    problems: list[Problem] = []
    records: list[DoneRecord] = []
    shards, num_bytes = done_shards(folder), 0
    with ThreadPoolExecutor(max_workers=check_threads()) as pool:
        found = pool.map(lambda shard: _check_shard(folder, info, shard, deep), shards)
        for number, (record, wrong) in enumerate(found, start=1):
            problems += wrong
            if record is not None:
                records.append(record)
                num_bytes += sum(int(entry["bytes"]) for entry in record.files.values())
            if progress is not None:
                progress(number, len(shards), num_bytes)
    problems += _file_problems(folder, info)
    try:
        plan = read_plan(folder)
    except DeltatokError as error:
        missing = []
        problems.append(Problem(kind="folder", text=str(error)))
    else:
        missing = sorted(set(range(num_shards(plan))) - {record.shard for record in records})
        problems += _plan_problems(folder, info, plan, records)
        problems += _count_problems(folder, info, num_shards(plan), missing, records)
    damaged = {problem.shard for problem in problems if problem.kind == "shard"}
    problems += _index_problems(
        folder, info, [record for record in records if record.shard not in damaged], records
    )
    problems += _quarantine_problems(folder, records)
    partials, orphans = _find_leftovers(folder, records)
    for name in partials:
        text = f"{folder / name}: left by a killed run: remove it, or run again"
        problems.append(Problem(kind="leftover", text=text, shard=_shard_of(name)))
    for name, count in orphans.items():
        text = f"{folder / name}: {count} files in no done-record: remove it, or run again"
        problems.append(Problem(kind="leftover", text=text, shard=_shard_of(name)))
    return VerifyReport(
        problems=problems,
        shards=len(records),
        windows=sum(record.rows for record in records),
        bytes=num_bytes,
        missing=missing,
        partials=partials,
        orphans=orphans,
        is_deep=deep,
    )


def is_untouched(folder: Path) -> bool:
    """Whether cache.json is as it was written; caches of before cannot tell."""
    value = read_json(folder / "cache.json")
    return "checksum" not in value or bool(value["checksum"] == checksum(value))


# The shards.


def _check_shard(
    folder: Path, info: CacheInfo, shard: int, deep: bool
) -> tuple[DoneRecord | None, list[Problem]]:
    """The done-record without what takes room and is not needed again, None if it cannot be read;
    and what is wrong with the shard."""
    try:
        record = read_done(folder, shard)
    except DeltatokError as error:
        return None, [Problem(kind="shard", shard=shard, text=str(error))]
    if record is None:  # taken back just now
        return None, []
    problems = list(_shard_problems(folder, info, record, deep))
    return replace(record, statistics={}, decoders={}), problems


def _shard_problems(
    folder: Path, info: CacheInfo, record: DoneRecord, deep: bool
) -> Iterator[Problem]:
    shard = record.shard
    different = list(record_problems(folder, record, depth="sha256"))
    if different:  # what is in changed files is no second problem
        for error in different:
            yield Problem(kind="shard", shard=shard, text=str(error))
        return
    own = f"shards/{shard:06d}{'.zarr' if info.format == PATCHES else '.tar'}/"
    strangers = [name for name in record.files if not f"{name}/".startswith(own)]
    if strangers or bool(record.files) != bool(record.rows):
        text = (
            f"shard {shard:06d}: {record.rows} windows in {len(record.files)} files, "
            f"{len(strangers)} of them not its own: remove its done-record and make it again"
        )
        yield Problem(kind="shard", shard=shard, text=text)
    elif record.rows and deep:
        try:
            verify_values(folder, info, record)
        except CacheMismatch as error:
            # Files as they were written that are not of this cache speak against cache.json.
            yield Problem(kind="folder", shard=shard, text=f"shard {shard:06d}: {error}")
        except DeltatokError as error:
            yield Problem(kind="shard", shard=shard, text=f"shard {shard:06d}: {error}")


def verify_values(folder: Path, info: CacheInfo, record: DoneRecord) -> None:
    """Reads every value of a shard; raises DamagedShard or CacheMismatch at the first fault."""
    statistics = StoredStatistics(info.shape.hidden_size)
    if info.format == PATCHES:
        _read_patches(folder, info, record, statistics)
    else:
        _read_deltas(folder, info, record, statistics)
    statistics.check(record.statistics, where=str(shard_path(folder, record.shard, ".json")))


def _read_patches(
    folder: Path, info: CacheInfo, record: DoneRecord, statistics: StoredStatistics
) -> None:
    group = shard_path(folder, record.shard, ".zarr")
    check_attributes(group, record, info)
    _check_description(group, info, record)
    table = read_shard_table(group, record, info.shape.num_frames)
    _check_windows(table.timestamps_s, table.frame_index, table.crop, where=str(group))
    tokens = TokenReader(group, info, rows=record.rows)
    files, stored = tokens.open(), tokens.new_frames(1)
    values = np.empty(stored.shape, dtype=np.float32)
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


def _check_description(group: Path, info: CacheInfo, record: DoneRecord) -> None:
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


def _read_deltas(
    folder: Path, info: CacheInfo, record: DoneRecord, statistics: StoredStatistics
) -> None:
    path, shape = shard_path(folder, record.shard, ".tar"), info.shape
    blocks = read_blocks(path, num_frames=shape.num_frames, hidden_size=shape.hidden_size)
    rows = sum(block.num_windows for block in blocks)
    if rows != record.rows:
        raise DamagedShard(
            f"{path}: {rows} windows, the done-record says {record.rows}: {SHARD_ADVICE}"
        )
    for block in blocks:
        tokens = read_tokens(path, block)
        _check_finite(tokens, f"{path}: {block.tokens.name}")
        _check_block_windows(path, block, info, set(record.keys))
        statistics.add(tokens)


def _check_block_windows(path: Path, block: Block, info: CacheInfo, keys: set[str]) -> None:
    windows = read_windows(path, block, num_frames=info.shape.num_frames)
    timestamps_s = read_timestamps(path, block)
    where = f"{path}: {block.windows.name}"
    frames, crops = ([window[name] for window in windows] for name in ("frames", "crop"))
    _check_windows(timestamps_s, frames, crops, where=where)
    if (timestamps_s[:, 0] != 0).any():
        raise DamagedShard(f"{path}: {block.timestamps.name}: a window does not begin at 0 s")
    for window in windows:
        if window["clip"] not in keys:
            raise DamagedShard(
                f"{where}: clip {window['clip']!r} is not in the done-record: {SHARD_ADVICE}"
            )


def _check_windows(
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


def _check_finite(values: NDArray[Any], where: str) -> None:
    if not np.isfinite(values).all():
        raise DamagedShard(f"{where}: has values that are not finite: {SHARD_ADVICE}")


# What lies beside them.


def _file_problems(folder: Path, info: CacheInfo) -> Iterator[Problem]:
    """Of cache.json, the files whose hashes it has, and the arrays of patch caches."""

    def problem(path: Path, text: str) -> Problem:
        return Problem(kind="folder", text=f"{path}: {text}")

    if not is_untouched(folder):
        yield problem(
            folder / "cache.json", "was changed by hand or damaged: restore it from a copy"
        )
    root = os.path.realpath(folder)
    different: set[str] = set()
    for name, entry in info.files.items():
        path = folder / PurePosixPath(name).name
        if name in (NOTICE, INDEX) and not path.exists():
            yield problem(path, "missing: run the command that makes this cache again")
        if not path.is_file():
            continue  # named by those that read it
        try:
            if leaves(path, root):
                yield problem(path, "is a link out of the cache: copy the file into it instead")
                continue
            same = path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]
        except OSError as error:
            yield problem(path, f"cannot be read ({error.strerror}): restore it from a copy")
            continue
        if not same:
            different.add(name)
            yield problem(path, "was changed since the cache was finished: restore it from a copy")
    arrays = ((BLACK, _check_black), (CHANNEL_SCALE, _check_channel_scale))
    for name, check in arrays if info.format == PATCHES else ():
        if name not in different:
            try:
                check(folder, info)
            except DeltatokError as error:
                yield Problem(kind="folder", text=str(error))


def _check_black(folder: Path, info: CacheInfo) -> None:
    shape = (info.shape.num_tokens or 0, info.shape.hidden_size)
    _check_finite(read_black(folder / BLACK, info, shape), f"{folder / BLACK}")


def _check_channel_scale(folder: Path, info: CacheInfo) -> None:
    if logical_dtype(info) == "int8":
        read_channel_scale(folder, info)


def _plan_problems(
    folder: Path, info: CacheInfo, plan: Sequence[PlanEntry], records: Sequence[DoneRecord]
) -> Iterator[Problem]:
    """Shards whose clips are not those of the plan. Of an unfinished cache nobody can tell which
    of the two is wrong."""
    known = info.files.get(PLAN)
    if known is not None and sha256_file(folder / PLAN) != known["sha256"]:
        return  # a changed plan says nothing against a shard
    planned: dict[int, set[str]] = {}
    for entry in plan:
        planned.setdefault(entry.shard, set()).add(entry.key)
    for record in records:
        accounted = {entry.clip for entry in record.quarantined}.union(record.keys)
        differing = accounted ^ planned.get(record.shard, set())
        if record.shard in planned and differing:
            yield Problem(
                kind="folder" if known is None else "shard",
                shard=record.shard,
                text=f"shard {record.shard:06d}: clip {min(differing)!r} and {len(differing) - 1} "
                f"more are in {PLAN} or in its done-record, not in both: remove its done-record "
                "and make it again",
            )


def _count_problems(
    folder: Path,
    info: CacheInfo,
    wanted: int,
    missing: Sequence[int],
    records: Sequence[DoneRecord],
) -> Iterator[Problem]:
    """Of the shards there are against the `wanted` there should be."""
    again = "run the command that makes this cache again"
    if missing:
        state = "marked complete, but" if info.complete else "not finished:"
        yield Problem(
            kind="unfinished",
            text=f"{folder}: {state} {len(missing)} of {wanted} shards are not done, first "
            f"{missing[0]:06d}: {again}",
        )
    elif not info.complete:
        yield Problem(kind="unfinished", text=f"{folder}: not marked complete: {again}")
    if strangers := sorted(record.shard for record in records if record.shard >= wanted):
        text = f"{folder}: shard {strangers[0]:06d} is not in {PLAN}: remove its done-record"
        yield Problem(kind="folder", shard=strangers[0], text=text)
    counts = {"shards": len(records), "windows": sum(record.rows for record in records)}
    for name, count in counts.items():
        if info.complete and not missing and info.counts.get(name, count) != count:
            text = f"{folder}: {count} {name}, cache.json says {info.counts[name]}"
            yield Problem(kind="folder", text=text)


def _index_problems(
    folder: Path, info: CacheInfo, whole: Sequence[DoneRecord], records: Sequence[DoneRecord]
) -> Iterator[Problem]:
    """Done-records that were changed since the cache was finished, among `whole`: those of shards
    that nothing else was found against."""
    entry, path = info.files.get(INDEX), folder / INDEX
    if not info.complete or entry is None or not path.is_file():
        return
    if sha256_file(path) != entry["sha256"]:
        return  # named by _file_problems
    try:
        index = read_index(folder, sha256=entry["sha256"]) or []
    except DeltatokError as error:
        yield Problem(kind="folder", text=str(error))
        return
    if missing := sorted({record.shard for record in records} - {line.shard for line in index}):
        text = f"{path}: does not tell of shard {missing[0]:06d}: delete it, and repair"
        yield Problem(kind="folder", text=text)
    shards = {record.shard for record in whole}
    for line in index:
        if line.shard in shards:
            try:
                read_indexed(folder, line)
            except DeltatokError as error:
                yield Problem(kind="shard", shard=line.shard, text=str(error))


def _quarantine_problems(folder: Path, records: Sequence[DoneRecord]) -> Iterator[Problem]:
    """quarantine.jsonl must be what the done-records give."""
    path = folder / QUARANTINE
    wanted = quarantine_bytes(quarantined_of(records))
    if not wanted and not path.exists():
        return
    try:
        got = read_file(path, advice="run the command that makes this cache again")
    except DeltatokError as error:
        yield Problem(kind="folder", text=str(error))
        return
    if got != wanted:
        text = f"{path}: does not list the quarantined clips of the done-records: make it again"
        yield Problem(kind="folder", text=text)


def _find_leftovers(
    folder: Path, records: Sequence[DoneRecord]
) -> tuple[list[str], dict[str, int]]:
    """What is in the folder and in no done-record, as `partials` and `orphans` of the report; links
    are named, not followed."""
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
    return partials, dict(orphans)


def _files_below(path: Path) -> Iterator[Path]:
    if path.is_symlink() or not path.is_dir():
        yield path
        return
    for child in sorted(path.iterdir()):
        yield from _files_below(child)


def _shard_of(name: str) -> int | None:
    """The shard that a path like shards/NNNNNN.zarr is of."""
    stem = name.removeprefix("shards/").partition(".")[0]
    return int(stem) if name.startswith("shards/") and re.fullmatch("[0-9]{6,}", stem) else None
