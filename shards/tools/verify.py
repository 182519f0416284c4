"""verify_cache: goes through every byte of a cache and names all that is wrong with it.

Readers stop at the first thing that is wrong; this goes on, for `deltatok-shards verify`:

    shards      files against their done-records; with `deep` every value, time and crop
    folder      cache.json, black.npy, scales, plan, index, quarantine, and what belongs to nobody

The largest value, and how many float16 could not hold, are taken again while a shard is read, and
held against its done-record.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..cache import (
    BLACK,
    CHANNEL_SCALE,
    NOTICE,
    PATCHES,
    PCA,
    CacheInfo,
    check_clips,
    checksum,
    pca_of,
    read_cache_info,
)
from ..deltas.reader import read_blocks, read_shard_table, read_tokens
from ..errors import CacheMismatch, DamagedShard, DeltatokError, damaged_shard
from ..files import is_partial, sha256_file
from ..index import INDEX, REPAIR, ShardColumns, read_index
from ..patches import reader as patches
from ..patches.archive import ShardFile
from ..patches.int8 import UNSTORABLE, read_channel_scale
from ..patches.layout import FLOAT16_MAX, SUFFIX
from ..patches.projection import read_projection
from ..patches.reader import TokenReader, logical_dtype, read_black, read_keys
from ..patches.zarr_arrays import read_attributes
from ..plan import (
    PLAN,
    PLAN_FOLDER,
    Plan,
    PlanPart,
    keys_sha256,
    keys_twice,
    shard_keys,
)
from ..records import (
    QUARANTINE,
    DoneRecord,
    StoredFile,
    check_file,
    check_threads,
    done_shards,
    is_done_untouched,
    leaves,
    quarantine_bytes,
    quarantined_of,
    read_done,
    shard_path,
)
from ..schema import read_file, read_json
from ..windows import WindowColumns


class _Range:
    """Of the values of one shard."""

    def __init__(self) -> None:
        self.abs_max = 0.0
        self.beyond_float16 = 0

    def add(self, values: NDArray[Any]) -> None:
        """Takes tokens (..., D), finite."""
        largest = max(float(values.max()), -float(values.min()))
        self.abs_max = max(self.abs_max, largest)
        if largest > FLOAT16_MAX:
            self.beyond_float16 += int(np.count_nonzero(np.abs(values) > FLOAT16_MAX))

    def check(self, record: DoneRecord, *, where: str) -> None:
        """Raises DamagedShard unless the done-record says the same."""
        for name in ("abs_max", "beyond_float16"):
            said, got = getattr(record, name), getattr(self, name)
            if said != got:
                raise DamagedShard(f"{where}: {name} is {said}, the shard's values give {got}")


KNOWN_NAMES = {
    "cache.json",
    PLAN,
    PLAN_FOLDER,
    BLACK,
    CHANNEL_SCALE,
    PCA,
    QUARANTINE,
    INDEX,
    NOTICE,
    "timings.jsonl",
    "shards",
}
AGAIN = "run the command that makes this cache again"
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
        found = {problem.shard for problem in self.problems if problem.kind == "shard"}
        return sorted(shard for shard in found if shard is not None)


def verify_cache(
    folder: Path | str,
    *,
    deep: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> VerifyReport:
    """Checks presence, sizes, SHA-256, counts and leftovers; with `deep` also decodes every chunk
    and looks at checksums, dtypes, shapes, values, times and crops.

    progress: called with (shards done, shards in all, bytes done) after every shard. Raises
    UsageError, CacheMismatch or DamagedShard only where nothing can be checked: no such folder, no
    cache, no readable cache.json.
    """
    folder = Path(folder)
    info = read_cache_info(folder)
    problems: list[Problem] = []
    records: list[DoneRecord] = []
    shards, num_bytes = done_shards(folder), 0
    planned = _PlannedKeys(folder)
    with ThreadPoolExecutor(max_workers=check_threads()) as pool:
        found = pool.map(
            lambda shard: _check_shard(folder, info, shard, planned, deep=deep), shards
        )
        for number, (record, wrong) in enumerate(found, start=1):
            problems += wrong
            if record is not None:
                records.append(record)
                num_bytes += 0 if record.file is None else record.file.bytes
            if progress is not None:
                progress(number, len(shards), num_bytes)
    beside = _Beside(folder, info, records, problems)
    beside.check_files()
    missing = beside.check_plan()
    beside.check_index()
    beside.check_quarantine()
    partials, orphans = beside.check_leftovers()
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
    """Whether cache.json is as it was written."""
    value = read_json(folder / "cache.json")
    return bool(value.get("checksum") == checksum(value))


# The shards.


class _PlannedKeys:
    """The keys of shards by the plan, a part of it in memory at a time."""

    def __init__(self, folder: Path) -> None:
        self._plan: Plan | None = None
        with suppress(DeltatokError):  # named by `check_plan`
            self._plan = Plan.open(folder)
        self._part = functools.lru_cache(maxsize=2)(self._read_part)

    def of(self, record: DoneRecord) -> list[str] | None:
        """None where plan and done-record do not agree, which `check_plan` names."""
        parts = [] if self._plan is None else self._plan.parts
        for part in parts:
            if part.first_shard <= record.shard < part.first_shard + part.shards:
                keys = shard_keys(self._part(part).get(record.shard, []), record.lost)
                return keys if keys_sha256(keys) == record.keys_sha256 else None
        return None

    def _read_part(self, part: PlanPart) -> dict[int, list[str]]:
        with suppress(DeltatokError):
            return dict(self._plan.keys_of(part)) if self._plan is not None else {}
        return {}


def _check_shard(
    folder: Path, info: CacheInfo, shard: int, planned: _PlannedKeys, *, deep: bool
) -> tuple[DoneRecord | None, list[Problem]]:
    """The done-record without what takes room and is not needed again, None if it cannot be read;
    and what is wrong with the shard."""
    try:
        record = read_done(folder, shard)
    except DeltatokError as error:
        return None, [Problem(kind="shard", shard=shard, text=str(error))]
    if record is None:  # taken back just now
        return None, []
    if not is_done_untouched(folder, shard):
        path = shard_path(folder, shard, ".json")
        text = f"{path}: was changed since it was written: remove it and make the shard again"
        return record, [Problem(kind="shard", shard=shard, text=text)]
    keys = planned.of(record) if deep else None
    problems = list(_shard_problems(folder, info, record, keys, deep=deep))
    return replace(record, other_decoders={}), problems


def _shard_problems(
    folder: Path, info: CacheInfo, record: DoneRecord, keys: list[str] | None, *, deep: bool
) -> Iterator[Problem]:
    def problem(text: object, kind: Kind = "shard") -> Problem:
        return Problem(kind=kind, shard=record.shard, text=str(text))

    if record.file is None:
        return
    path = data_path(folder, info, record.shard)
    try:
        check_file(path, record.shard, record.file, depth="sha256")
    except DamagedShard as error:  # what is in a changed file is no second problem
        yield problem(error)
        return
    if deep:
        where = f"shard {record.shard:06d}"
        try:
            verify_values(folder, info, record, keys)
        except CacheMismatch as error:
            # A file as it was written that is not of this cache speaks against cache.json.
            yield problem(f"{where}: {error}", kind="folder")
        except DeltatokError as error:
            yield problem(f"{where}: {error}")


def data_path(folder: Path, info: CacheInfo, shard: int) -> Path:
    """The file of a shard."""
    return shard_path(folder, shard, SUFFIX if info.format == PATCHES else ".tar")


def verify_values(
    folder: Path, info: CacheInfo, record: DoneRecord, keys: list[str] | None
) -> None:
    """Reads every value of a shard; raises DamagedShard or CacheMismatch at the first fault.
    keys: those of its clips, None where that is not known."""
    found = _Range()
    if info.format == PATCHES:
        _read_patches(folder, info, record, found)
    else:
        _read_deltas(folder, info, record, keys, found)
    found.check(record, where=str(shard_path(folder, record.shard, ".json")))


def _read_patches(folder: Path, info: CacheInfo, record: DoneRecord, found: _Range) -> None:
    file = patches.open_shard(folder, record.shard, info)
    keys = read_keys(file, info, sha256=record.keys_sha256)
    _check_description(file, info, record)
    table = patches.read_shard_table(file, keys, rows=record.rows, num_frames=info.shape.num_frames)
    _check_windows(table, where=str(file.path))
    tokens = TokenReader(file, info, rows=record.rows)
    opened, stored = tokens.open(), tokens.new_frames(1)
    values = np.empty(stored.shape, dtype=np.float32)
    for window in range(record.rows):
        for index in range(info.shape.num_frames):
            tokens.read_values(opened, window, [index], out=values, stored=stored)
            usable = np.isfinite(values).all()
            if stored.dtype == np.int8:
                usable = usable and stored.min() != UNSTORABLE
            if not usable:
                raise damaged_shard(
                    f"{tokens.where}: window {window}, frame {index} has values that are not finite"
                )
            found.add(values[0])


def _check_description(file: ShardFile, info: CacheInfo, record: DoneRecord) -> None:
    """What the shard says of itself and no reader needs."""
    attributes = read_attributes(file)
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
            raise damaged_shard(
                f"{file.path}: its attribute {name} is {attributes.get(name)!r}, wanted {value!r}"
            )


def _read_deltas(
    folder: Path, info: CacheInfo, record: DoneRecord, keys: list[str] | None, found: _Range
) -> None:
    path, shape = shard_path(folder, record.shard, ".tar"), info.shape
    blocks = read_blocks(path, num_frames=shape.num_frames, hidden_size=shape.hidden_size)
    rows = sum(block.num_windows for block in blocks)
    if rows != record.rows:
        raise damaged_shard(f"{path}: {rows} windows, the done-record says {record.rows}")
    table = read_shard_table(path, blocks, keys, num_frames=shape.num_frames)
    _check_windows(table, where=str(path))
    if (table.timestamps_s[:, 0] != 0).any():
        raise damaged_shard(f"{path}: timestamps.npy: a window does not begin at 0 s")
    for block in blocks:
        tokens = read_tokens(path, block)
        _check_finite(tokens, f"{path}: {block.tokens.name}")
        found.add(tokens)


def _check_windows(table: WindowColumns, *, where: str) -> None:
    """Raises DamagedShard unless times and frames are 0 or more and never decrease within a window
    (a slow clip repeats frames), and crops are areas of a frame."""
    times, frames, crop = table.timestamps_s, table.frame_index, table.crop
    _check_finite(times, f"{where}: timestamps_s")
    _check_finite(crop, f"{where}: crop")
    for wrong, what in (
        (times < 0, "timestamps_s is negative"),
        (np.diff(times) < 0, "timestamps_s decreases"),
        (frames < 0, "frame_index is negative"),
        (np.diff(frames) < 0, "frame_index decreases"),
        (crop[:, :2] < 0, "crop begins outside of the frame"),
        (crop[:, 2:] <= 0, "crop has no height or no width"),
    ):
        windows = np.flatnonzero(wrong.any(axis=1))
        if windows.size:
            raise damaged_shard(f"{where}: window {windows[0]}: {what}")


def _check_finite(values: NDArray[Any], where: str) -> None:
    if not np.isfinite(values).all():
        raise damaged_shard(f"{where}: has values that are not finite")


class _Beside:
    """What lies beside the shards of a cache; the methods add to `problems`."""

    def __init__(
        self, folder: Path, info: CacheInfo, records: list[DoneRecord], problems: list[Problem]
    ) -> None:
        """problems: those that were found in the shards."""
        self.folder, self.info, self.records, self.problems = folder, info, records, problems
        self.changed: set[str] = set()
        """Files beside the shards that are not those whose hashes cache.json has."""
        self.plan: Plan | None = None

    def add(self, text: object, *, kind: Kind = "folder", shard: int | None = None) -> None:
        """A problem that was found."""
        self.problems.append(Problem(kind=kind, text=str(text), shard=shard))

    @contextmanager
    def errors(self, *, kind: Kind = "folder", shard: int | None = None) -> Iterator[None]:
        """What is raised within is a problem."""
        try:
            yield
        except DeltatokError as error:
            self.add(error, kind=kind, shard=shard)

    def check_files(self) -> None:
        """cache.json, the files whose hashes it has, and the arrays of patch caches."""
        folder, info = self.folder, self.info
        if not is_untouched(folder):
            path = folder / "cache.json"
            self.add(f"{path}: was changed by hand or damaged: restore it from a copy")
        for name, entry in info.files.items():
            path = folder / PurePosixPath(name).name
            if name in (NOTICE, INDEX) and not path.is_file():
                self.add(f"{path}: missing, or no file: {AGAIN}")
            if not path.is_file():
                continue  # named by those that read it
            try:
                if leaves(path, folder):
                    self.add(f"{path}: is a link out of the cache: copy the file into it instead")
                elif sha256_file(path) != entry["sha256"]:
                    self.changed.add(name)
                    self.add(
                        f"{path}: was changed since the cache was finished: restore it from a copy"
                    )
            except OSError as error:
                self.add(f"{path}: cannot be read ({error.strerror}): restore it from a copy")
        if info.format != PATCHES:
            return
        shape = (info.shape.num_tokens or 0, info.shape.hidden_size)
        if BLACK not in self.changed:
            with self.errors():
                _check_finite(read_black(folder / BLACK, info, shape), f"{folder / BLACK}")
        if CHANNEL_SCALE not in self.changed and logical_dtype(info) == "int8":
            with self.errors():
                read_channel_scale(folder, info)
        if PCA not in self.changed and pca_of(info.identity) is not None:
            with self.errors():
                read_projection(folder, info)

    def check_plan(self) -> list[int]:
        """The plan against the shards; gives those that are not done."""
        try:
            plan = self.plan = Plan.open(self.folder)
        except DeltatokError as error:
            self.add(error)
            return []
        info, wanted = self.info, plan.num_shards
        records = {record.shard: record for record in self.records}
        missing: list[int] = []
        is_whole = True
        for part in plan.parts:
            if leaves(self.folder / part.file, self.folder):
                self.add(
                    f"{self.folder / part.file}: is a link out of the cache: copy the file into it "
                    "instead"
                )
            try:
                for shard, entries in plan.shards_of(part):
                    if shard not in records:
                        missing.append(shard)
                    elif PLAN not in self.changed:  # a changed plan says nothing against a shard
                        self._check_clips(records[shard], [entry.key for entry in entries])
            except DeltatokError as error:
                self.add(error)
                is_whole = False
        if is_whole and (twice := keys_twice(plan)):
            self.add(
                f"{self.folder / PLAN}: clip {twice[0]!r} is in two shards ({len(twice)} such "
                "clips): restore it from a copy"
            )
        if missing:
            state = "marked complete, but" if info.complete else "not finished:"
            self.add(
                f"{self.folder}: {state} {len(missing)} of {wanted} shards are not done, first "
                f"{missing[0]:06d}: {AGAIN}",
                kind="unfinished",
            )
        elif not info.complete:
            self.add(f"{self.folder}: not marked complete: {AGAIN}", kind="unfinished")
        if strangers := sorted(shard for shard in records if shard >= wanted):
            text = f"shard {strangers[0]:06d} is not in {PLAN}: remove its done-record"
            self.add(f"{self.folder}: {text}", shard=strangers[0])
        counts = {"shards": len(records), "windows": sum(record.rows for record in self.records)}
        for name, count in counts.items():
            if info.complete and not missing and info.counts.get(name, count) != count:
                said = info.counts[name]
                self.add(f"{self.folder}: {count} {name}, cache.json says {said}")
        return missing

    def _check_clips(self, record: DoneRecord, planned: Sequence[str]) -> None:
        """Each shard's clips must be those of the plan. Of an unfinished cache nobody can tell
        which of the two is wrong."""
        try:
            check_clips(self.folder, record, planned)
        except DamagedShard as error:
            kind: Kind = "shard" if PLAN in self.info.files else "folder"
            self.add(error, kind=kind, shard=record.shard)

    def check_index(self) -> None:
        """Done-records that were changed since the cache was finished, of shards that nothing else
        was found against."""
        entry, path = self.info.files.get(INDEX), self.folder / INDEX
        if not self.info.complete or entry is None or INDEX in self.changed:
            return
        damaged = {problem.shard for problem in self.problems if problem.kind == "shard"}
        with self.errors():
            index, records = read_index(self.folder, StoredFile(**entry)), self.records
            if records and records[-1].shard >= len(index):
                self.add(f"{path}: does not tell of shard {records[-1].shard:06d}: {REPAIR}")
            found = ShardColumns.of(record for record in records if record.shard < len(index))
            told = index.take(found.shard)
            changed = np.zeros(len(found), dtype=np.bool_)
            for name, column in vars(found).items():
                changed |= column != getattr(told, name)
            for shard in found.shard[changed].tolist():
                if shard not in damaged:
                    where = shard_path(self.folder, shard, ".json")
                    self.add(
                        f"{where}: is not the done-record that {INDEX} tells of: the shard was "
                        "changed since the cache was finished; run the command that made the "
                        "cache again",
                        kind="shard",
                        shard=shard,
                    )

    def check_quarantine(self) -> None:
        """quarantine.jsonl must be what the done-records give."""
        path = self.folder / QUARANTINE
        wanted = quarantine_bytes(quarantined_of(self.records))
        if not wanted and not path.exists():
            return
        with self.errors():
            if read_file(path, advice=AGAIN) != wanted:
                self.add(
                    f"{path}: does not list the quarantined clips of the done-records: "
                    "make it again"
                )

    def check_leftovers(self) -> tuple[list[str], dict[str, int]]:
        """What is in the folder and in no done-record, as `partials` and `orphans` of the report;
        links are named, not followed."""
        named = {
            f"shards/{data_path(self.folder, self.info, record.shard).name}"
            for record in self.records
            if record.file is not None
        }
        named |= {f"shards/{shard:06d}.json" for shard in done_shards(self.folder)}
        shards = self.folder / "shards"
        there = [*self.folder.iterdir(), *(shards.iterdir() if shards.is_dir() else ())]
        if self.plan is not None:
            there += self.plan.strangers()
        orphans: Counter[str] = Counter()
        partials = []
        for path in sorted(there):
            name = path.relative_to(self.folder).as_posix()
            if is_partial(path):
                partials.append(name)
            elif path.parent == shards:
                below = [file.relative_to(self.folder).as_posix() for file in _files_below(path)]
                orphans[name] += sum(file not in named for file in below)
            elif path.parent != self.folder or (
                name not in KNOWN_NAMES and not name.lower().startswith(_FOR_PEOPLE)
            ):
                orphans[name] += 1
        orphans = +orphans
        leftovers = dict.fromkeys(partials, "left by a killed run")
        leftovers |= {name: f"{count} files in no done-record" for name, count in orphans.items()}
        leftovers |= {name: f"no part of {PLAN}" for name in orphans if name.startswith("plan/")}
        for name, what in leftovers.items():
            match = re.match(r"shards/([0-9]{6,})\.", name)
            shard = int(match[1]) if match else None
            text = f"{self.folder / name}: {what}: remove it, or run again"
            self.add(text, kind="leftover", shard=shard)
        return partials, dict(orphans)


def _files_below(path: Path) -> Iterator[Path]:
    if path.is_symlink() or not path.is_dir():
        yield path
        return
    for child in sorted(path.iterdir()):
        yield from _files_below(child)
