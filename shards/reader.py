"""What both readers are: a sequence of windows, with the clips they come from.

    reader[3], reader[-1]           tokens of one window
    reader[10:20], reader[[4, 2]]   tokens of several, as `tokens` gives them
    reader.select(splits="train")   numbers of windows, for `tokens` and all other columns

`PatchShards` and `DeltaShards` add what they store. Nothing is read before it is asked for; a
reader is pickled as its arguments, so that every process opens the cache for itself.

Before the first number is read: is the cache whole, is it the right one? Zarr and memory maps
notice a missing or short file late or never, so every file is held against its done-record first.
Of a large cache only `index.jsonl` is read when it is opened, and each shard's record and files
when the shard is first read.
"""

import contextlib
import difflib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cache import PATCHES, CacheInfo, read_cache_info
from .errors import CacheMismatch, DamagedShard, UsageError, damaged_shard
from .plan import PLAN, Plan, PlanEntry
from .records import (
    INDEX,
    DoneRecord,
    IndexEntry,
    Verify,
    check_files,
    file_problems,
    iterate_done,
    read_index,
    read_indexed,
)
from .schema import canonical_json
from .windows import WindowColumns

EAGER_SHARDS = 500
"""All files of a cache of up to so many shards are looked at when it is opened, so that a run does
not die of one on its last day; it takes a second at most (a guess)."""


Scalar = TypeVar("Scalar", bound=np.generic)
"""What `tokens` gives: float32 for patch tokens, float16 for delta tokens."""

MAX_NAMES_SHOWN = 5
"""Known labels or splits that an error lists."""


class CacheReader(ABC, Generic[Scalar]):
    """An opened cache of W windows, numbered through all shards in shard order."""

    def __init__(
        self, folder: Path | str, *, format: str, verify: Verify, allow_incomplete: bool
    ) -> None:
        """Opens the cache and checks all its files by size, or by SHA-256.

        Raises CacheMismatch for another kind of cache and for one that is not finished (unless
        `allow_incomplete`: then its finished shards), DamagedShard for files missing or changed.
        """
        if verify not in ("size", "sha256"):
            raise UsageError(f"verify is {verify!r}, wanted 'size' or 'sha256'")
        self.folder: Path = Path(folder)
        """The folder of the cache."""
        self.info: CacheInfo = read_cache_info(folder, format=format)
        """The cache.json."""
        entries, self._is_eager = _shard_entries(
            self.folder, self.info, verify=verify, allow_incomplete=allow_incomplete
        )
        self._is_hashed = verify == "sha256"
        self._entries = [entry for entry in entries if entry.rows]
        self._records: dict[int, DoneRecord] = {}
        self.shard_starts: NDArray[np.int64] = np.cumsum(
            [0, *(entry.rows for entry in self._entries)], dtype=np.int64
        )
        """int64 (shards + 1,): the first window of every shard that has any, and the end."""

    @abstractmethod
    def tokens(self, windows: ArrayLike) -> NDArray[Scalar]:
        """The tokens of `windows` (B,), whole numbers from 0 to W - 1, in the order asked."""

    @abstractmethod
    def _shard_table(self, shard: int) -> WindowColumns:
        """All but the tokens of the windows of the shard of this number among those that have any,
        `clip` indexing into its own keys."""

    def _record(self, shard: int) -> DoneRecord:
        """The done-record of the shard of this number among those that have windows. The shard's
        files are held against it when it is first asked for: DamagedShard names the one that is
        not as promised."""
        if shard not in self._records:
            entry = self._entries[shard]
            record = entry if isinstance(entry, DoneRecord) else read_indexed(self.folder, entry)
            if not self._is_hashed:
                check_files(self.folder, record, depth="size")
            self._records[shard] = record
        return self._records[shard]

    def _locate(self, windows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Window numbers -> (shard, window within that shard), int64 each."""
        shards = np.searchsorted(self.shard_starts, windows, side="right").astype(np.int64) - 1
        return shards, windows - self.shard_starts[shards]

    @cached_property
    def _table(self) -> WindowColumns:
        parts = [WindowColumns.empty(self.info.shape.num_frames)]
        parts += [self._shard_table(shard) for shard in range(len(self._entries))]
        table = WindowColumns.concatenate(parts)
        return replace(table, clip=table.clip.astype(np.int64))

    def table(self) -> WindowColumns:
        """Everything but the tokens of all windows, read on first use."""
        return self._table

    @property
    def clip_index(self) -> NDArray[np.int64]:
        """int64 (W,): the clip of every window, index into `keys`; read on first use."""
        return self.table().clip

    def window(self, index: int) -> dict[str, Any]:
        """What is known of one window, as plain values: `clip` (key), `frames` (T indices in
        presentation order), `crop` ([top, left, height, width], source pixels), `flipped`."""
        return self.table().describe(int(checked_windows([index], self.num_windows)[0]))

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: Any) -> NDArray[Scalar]:
        """`tokens` of one window (T, ...) or, for a slice, a list or an array, of several
        (B, T, ...). As with arrays, negative numbers count from the end and a mask is bool (W,);
        IndexError for a window that is not there."""
        if isinstance(index, slice):
            return self.tokens(np.arange(*index.indices(self.num_windows)))
        numbers = np.asarray(index)
        if numbers.ndim == 0 and numbers.dtype.kind in "iu":
            tokens: NDArray[Scalar] = self.tokens(self._from_the_front(numbers[None]))[0]
            return tokens
        if numbers.dtype == np.bool_ and numbers.shape == (self.num_windows,):
            return self.tokens(np.flatnonzero(numbers))
        return self.tokens(self._from_the_front(numbers))

    @property
    def fingerprint(self) -> str:
        """What the cache is, see `CacheInfo.fingerprint`."""
        return self.info.fingerprint

    @property
    def num_windows(self) -> int:
        """W, the windows of all shards."""
        return int(self.shard_starts[-1])

    @cached_property
    def arrangement(self) -> str:
        """ "sha256:" + a hash of which clips lie in which shard: with the fingerprint, what decides
        the number of every window. An export of other shards, or an appended cache, has another."""
        shard_keys = [entry.keys for entry in self._entries]
        text = canonical_json(list(zip(shard_keys, self.shard_starts[1:].tolist(), strict=True)))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    @cached_property
    def keys(self) -> list[str]:
        """All clips that have windows; `clip_index` indexes into this list."""
        return [key for entry in self._entries for key in entry.keys]

    @property
    def labels(self) -> list[str | None]:
        """The class of every clip in `keys`, where a list or an archive named one."""
        return [entry.label for entry in self._planned]

    @property
    def splits(self) -> list[str | None]:
        """The split of every clip in `keys`, where a list or an archive named one."""
        return [entry.split for entry in self._planned]

    @property
    def crop(self) -> NDArray[np.float32]:
        """float32 (W, 4): top, left, height, width in source pixels of every window."""
        return self.table().crop

    @property
    def flipped(self) -> NDArray[np.bool_]:
        """bool (W,): whether the window was mirrored."""
        return self.table().flipped

    def timestamps_s(self, windows: ArrayLike) -> NDArray[np.float32]:
        """float32 (B, T): seconds, of patch tokens since the first shown frame of the window's
        clip, of delta tokens since the window's first frame."""
        return self.table().timestamps_s[checked_windows(windows, self.num_windows)]

    def frame_index(self, windows: ArrayLike) -> NDArray[np.int32]:
        """int32 (B, T): index of the frames in presentation order."""
        return self.table().frame_index[checked_windows(windows, self.num_windows)]

    def select(
        self,
        *,
        clips: str | Iterable[str] | None = None,
        labels: str | Iterable[str] | None = None,
        splits: str | Iterable[str] | None = None,
    ) -> NDArray[np.int64]:
        """The numbers of the windows, int64 (n,) ascending, whose clip has one of these keys,
        labels and splits; what is None does not matter.

        A clip of the plan that has no windows (quarantined) selects none. Raises UsageError for a
        clip that is not in the plan, and for a label or split that no clip has.
        """
        chosen = np.ones(len(self.keys), dtype=np.bool_)
        where = str(self.folder)
        if clips is not None:
            planned = {entry.key for entry in self._plan()}
            names = known_names(clips, planned, what="clip", where=where)
            chosen &= np.array([key in names for key in self.keys], dtype=np.bool_)
        for wanted, column, what in (
            (labels, self.labels if labels is not None else [], "label"),
            (splits, self.splits if splits is not None else [], "split"),
        ):
            if wanted is not None:
                names = known_names(wanted, set(filter(None, column)), what=what, where=where)
                chosen &= np.array([value in names for value in column], dtype=np.bool_)
        return np.flatnonzero(chosen[self.clip_index]).astype(np.int64)

    @cached_property
    def _planned(self) -> list[PlanEntry]:
        """What the plan says of the clips of `keys`; DamagedShard if it lacks one."""
        entries = {entry.key: entry for entry in self._plan()}
        missing = [key for key in self.keys if key not in entries]
        if missing:
            raise DamagedShard(
                f"{self.folder / PLAN}: has no clip {missing[0]!r}, of which there are windows: "
                "restore the file"
            )
        return [entries[key] for key in self.keys]

    def _plan(self) -> Plan:
        return Plan.open(self.folder, sha256=self.info.files.get(PLAN, {}).get("sha256"))

    def _from_the_front(self, numbers: NDArray[Any]) -> NDArray[Any]:
        if numbers.dtype.kind != "i":
            return numbers
        shifted = np.where(numbers < 0, numbers + self.num_windows, numbers)
        if (shifted < 0).any():
            raise IndexError(
                f"window {numbers.min()} asked for, the cache has {self.num_windows} windows"
            )
        return shifted


def known_names(
    wanted: str | Iterable[str], known: Collection[str], *, what: str, where: str
) -> set[str]:
    """`wanted` as a set; UsageError naming the first that is not among `known`, and its nearest."""
    names = {wanted} if isinstance(wanted, str) else set(wanted)
    unknown = sorted(names - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1) or sorted(known)
        hint = ", ".join(map(repr, near[:MAX_NAMES_SHOWN])) or "none"
        raise UsageError(
            f"{where}: has no {what} {unknown[0]!r} ({len(unknown)} of {len(names)} "
            f"asked for); known {what}s: {hint}{', ...' if len(near) > MAX_NAMES_SHOWN else ''}"
        )
    return names


def _shard_entries(
    folder: Path, info: CacheInfo, *, verify: Verify, allow_incomplete: bool
) -> tuple[Sequence[DoneRecord | IndexEntry], bool]:
    """The finished shards, in order, their files checked; and whether all that can be checked
    cheaply was: not so of a large finished cache, of which only the index is read."""
    known = info.files.get(INDEX)
    many = info.counts.get("shards", 0) > EAGER_SHARDS
    index = None
    if verify == "size" and info.complete and many and known is not None:
        index = read_index(folder, sha256=known["sha256"])
    records = [record for record, _ in iterate_done(folder)] if index is None else []
    entries: Sequence[DoneRecord | IndexEntry] = records if index is None else index
    if info.complete:
        _check_totals(folder, info, entries)
    elif not allow_incomplete:
        wanted = Plan.open(folder).num_shards if (folder / PLAN).is_file() else "?"
        raise CacheMismatch(
            f"{folder}: extraction has not finished, {len(entries)} of {wanted} shards: "
            "run deltatok-extract again"
        )
    if index is None:
        with contextlib.closing(file_problems(folder, records, verify=verify)) as problems:
            for problem in problems:
                raise problem
    else:
        _check_names(folder, info, index)
    return entries, index is None


def _check_totals(
    folder: Path, info: CacheInfo, entries: Sequence[DoneRecord | IndexEntry]
) -> None:
    wanted = info.counts.get("shards", len(entries))
    done = {entry.shard for entry in entries}
    # The first gap: not all numbers below `wanted`, which a made-up cache.json may make huge.
    missing = next(number for number in range(len(done) + 1) if number not in done)
    if missing < wanted:
        raise DamagedShard(
            f"{folder}: shard {missing:06d} has no done-record ({len(done)} of {wanted} "
            "shards have one), but the cache is marked complete: make the missing shards again, "
            "by the command that made the cache"
        )
    rows = sum(entry.rows for entry in entries)
    if len(entries) != wanted or rows != info.counts.get("windows", rows):
        raise DamagedShard(
            f"{folder}: {len(entries)} shards with {rows} windows, cache.json says {wanted} with "
            f"{info.counts.get('windows', rows)}: run the command that made the cache again"
        )


def _check_names(folder: Path, info: CacheInfo, entries: Sequence[IndexEntry]) -> None:
    """Raises DamagedShard for a shard whose record or data is not there, by one listing."""
    shards = folder / "shards"
    suffix = ".zarr.zip" if info.format == PATCHES else ".tar"
    names = {path.name for path in shards.iterdir()} if shards.is_dir() else set()
    for entry in entries:
        for ending in (".json", suffix) if entry.rows else (".json",):
            name = f"{entry.shard:06d}{ending}"
            if name not in names:
                raise damaged_shard(f"shard {entry.shard:06d}: {shards / name}: missing")


def checked_windows(windows: ArrayLike, num_windows: int) -> NDArray[np.int64]:
    """Window numbers as int64 (B,).

    Raises IndexError outside of 0..num_windows - 1, TypeError for anything but whole numbers.
    """
    numbers = np.asarray(windows)
    if numbers.size == 0:
        numbers = numbers.astype(np.int64)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise TypeError(
            f"windows is {numbers.dtype} {numbers.shape}, wanted integers of shape (B,)"
        )
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < num_windows):
        raise IndexError(
            f"windows {numbers.min()}..{numbers.max()} asked for, "
            f"the cache has 0..{num_windows - 1}"
        )
    return numbers.astype(np.int64)


def checked_out(
    out: NDArray[Any] | None, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """The array to fill: `out` if it fits exactly, a fresh one for None, else ValueError."""
    if out is None:
        return np.empty(shape, dtype=dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} {out.shape}, wanted C-contiguous {dtype} {shape}")
    return out
