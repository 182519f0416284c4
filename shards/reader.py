"""What both readers are: a sequence of windows, with the clips they come from.

    reader[3], reader[-1]           tokens of one window
    reader[10:20], reader[[4, 2]]   tokens of several, as `tokens` gives them
    reader.select(splits="train")   numbers of windows, for `tokens` and all other columns

`PatchShards` and `DeltaShards` add what they store. Opening a finished cache reads cache.json and
index.jsonl: no folder is listed, no shard opened; the plan is read when keys, labels or splits are
asked for. A reader that is pickled takes the index along: nothing is read again.

Before the first number of a shard is read: is it whole, is it the right one? Zarr and memory maps
notice a missing or short file late or never, so the shard's file is held against the index first.
"""

import difflib
import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cache import CacheInfo, read_cache_info
from .errors import CacheMismatch, DamagedShard, UsageError
from .index import INDEX, ShardColumns, read_index
from .plan import PLAN, Plan, PlanEntry, keys_sha256
from .records import (
    DoneRecord,
    StoredFile,
    Verify,
    check_file,
    check_threads,
    done_shards,
    iterate_done,
    read_quarantine,
    shard_path,
)
from .stores.mirror import RemoteFile, expect, is_mirror, local_folder, present
from .windows import COLUMNS, WindowColumns

EAGER_SHARDS = 500
"""The files of a cache of up to so many shards are looked at when it is opened, so that a run does
not die of a missing one on its last day; it takes a second at most (a guess)."""


Scalar = TypeVar("Scalar", bound=np.generic)
"""What `tokens` gives: float32 for patch tokens, float16 for delta tokens."""

Opened = TypeVar("Opened")
OPEN_TRIES = 5
"""Of a file that others keep taking the room of (a guess)."""

MAX_NAMES_SHOWN = 5
"""Known labels or splits that an error lists."""


class CacheReader(ABC, Generic[Scalar]):
    """An opened cache of W windows, numbered through all shards in shard order."""

    def __init__(
        self, folder: Path | str, *, format: str, verify: Verify, allow_incomplete: bool
    ) -> None:
        """Opens the cache; the file of a shard is checked, by size or by SHA-256, when a process
        uses it first.

        Raises CacheMismatch for another kind of cache and for one that is not finished (unless
        `allow_incomplete`: then its finished shards, by their done-records), DamagedShard for an
        index that is missing or changed and, of up to 500 shards, for files missing or cut.
        """
        if verify not in ("size", "sha256"):
            raise UsageError(f"verify is {verify!r}, wanted 'size' or 'sha256'")
        self.folder: Path = local_folder(folder)
        """The folder of the cache; of one at an address that of its mirror."""
        self.info: CacheInfo = read_cache_info(self.folder, format=format)
        """The cache.json."""
        self._verify = verify
        self._lost: set[str] | None = None
        if self.info.complete:
            columns = _read_finished(self.folder, self.info)
        else:
            columns, self._lost = _read_unfinished(self.folder, allow_incomplete=allow_incomplete)
        self._shards = columns.take(columns.rows > 0)
        """Those that have windows."""
        self.shard_starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(self._shards.rows)])
        """int64 (shards + 1,): the first window of every shard that has any, and the end."""
        self._is_checked = np.zeros(len(self._shards), dtype=np.bool_)
        self._begin()
        if len(self._shards) <= EAGER_SHARDS and not is_mirror(self.folder):
            with ThreadPoolExecutor(max_workers=check_threads()) as pool:
                places = range(len(self._shards))
                list(pool.map(lambda shard: self._check_file(shard, "size"), places))

    def _begin(self) -> None:
        """Makes what belongs to this process: locks, open files."""
        self._locks: dict[tuple[int, int], threading.Lock] = {}

    _OF_PROCESS: tuple[str, ...] = ("_locks",)

    def __getstate__(self) -> dict[str, Any]:
        """What was read when the cache was opened, and which shards were checked since."""
        return {
            name: value
            for name, value in vars(self).items()
            if name not in self._OF_PROCESS
            and not isinstance(getattr(type(self), name, None), cached_property)
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @property
    @abstractmethod
    def _suffix(self) -> str:
        """Of the files of the shards."""

    @abstractmethod
    def tokens(self, windows: ArrayLike) -> NDArray[Scalar]:
        """The tokens of `windows` (B,), whole numbers from 0 to W - 1, in the order asked."""

    @abstractmethod
    def _shard_table(self, shard: int) -> WindowColumns:
        """All but the tokens of the windows of the shard of this number among those that have any,
        `clip` indexing into its own keys."""

    def _path(self, shard: int) -> Path:
        """The file of the shard of this number among those that have windows; of a cache at an
        address it is there afterwards."""
        return present(self.folder, self._file(shard))

    def _opened(self, shard: int, open_path: Callable[[Path], Opened]) -> Opened:
        """`open_path` of the shard's file; again where, in a mirror, it had to make room for
        others in between."""
        for _ in range(OPEN_TRIES - 1):
            path = self._path(shard)
            try:
                return open_path(path)
            except DamagedShard:
                if path.exists() or not is_mirror(self.folder):
                    raise
        return open_path(self._path(shard))

    def _file(self, shard: int) -> RemoteFile:
        name = shard_path(Path(), int(self._shards.shard[shard]), self._suffix).as_posix()
        file = self._shards.file(shard)
        return RemoteFile(name, file.bytes, file.sha256)

    def expect(self, windows: NDArray[np.int64]) -> None:
        """Says which windows (n,) will be read next, in this order: their shards, of a cache at an
        address, are fetched meanwhile."""
        if is_mirror(self.folder):
            shards, _ = self._locate(windows)
            _, first = np.unique(shards, return_index=True)
            expect(self.folder, [self._file(shard) for shard in shards[np.sort(first)].tolist()])

    def _check(self, shard: int) -> None:
        """Holds the file of a shard against the index when the process uses it first: DamagedShard
        if it is not the promised one."""
        if self._is_checked[shard]:
            return
        # By process, since one that was forked may find another's lock held for ever.
        place = (os.getpid(), shard)
        with self._locks.setdefault(place, threading.Lock()):
            if not self._is_checked[shard]:
                self._check_file(shard, self._verify)
                self._is_checked[shard] = True
        self._locks.pop(place, None)

    def _check_all(self, shards: NDArray[np.int64]) -> None:
        """The same of several shards."""
        left = shards[~self._is_checked[shards]].tolist()
        if len(left) < 2:
            for shard in left:
                self._check(shard)
            return
        # Hashing leaves the interpreter lock, waiting for a network file system does too.
        with ThreadPoolExecutor(max_workers=check_threads()) as pool:
            list(pool.map(self._check, left))

    def _check_file(self, shard: int, depth: Verify) -> None:
        file, number = self._shards.file(shard), int(self._shards.shard[shard])
        check_file(self._path(shard), number, file, depth=depth)

    def _locate(self, windows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Window numbers -> (shard, window within that shard), int64 each."""
        shards = np.searchsorted(self.shard_starts, windows, side="right").astype(np.int64) - 1
        return shards, windows - self.shard_starts[shards]

    @cached_property
    def _table(self) -> WindowColumns:
        like = WindowColumns.empty(self.info.shape.num_frames)
        columns: dict[str, Any] = {
            name: np.empty((self.num_windows, *column.shape[1:]), dtype=column.dtype)
            for name in COLUMNS
            for column in (getattr(like, name),)
        }
        columns["clip"] = columns["clip"].astype(np.int64)
        keys: list[str] = []
        for shard, (start, end) in enumerate(pairwise(self.shard_starts.tolist())):
            part = self._shard_table(shard)
            for name in COLUMNS:
                columns[name][start:end] = getattr(part, name)
            columns["clip"][start:end] += len(keys)
            keys += part.keys
        return WindowColumns(**columns, keys=keys)

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
        digest = hashlib.sha256(self._shards.keys_sha256.tobytes())
        digest.update(self._shards.rows.astype("<i8").tobytes())
        return f"sha256:{digest.hexdigest()}"

    @property
    def keys(self) -> list[str]:
        """All clips that have windows; `clip_index` indexes into this list. The plan is read for it
        on first use."""
        return self._clips[0]

    @property
    def labels(self) -> list[str | None]:
        """The class of every clip in `keys`, where a list or an archive named one."""
        return self._clips[1]

    @property
    def splits(self) -> list[str | None]:
        """The split of every clip in `keys`, where a list or an archive named one."""
        return self._clips[2]

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
    def _clips(self) -> tuple[list[str], list[str | None], list[str | None]]:
        """Key, label and split of every clip that has windows, as the plan says."""
        keys: list[str] = []
        labels: list[str | None] = []
        splits: list[str | None] = []
        for entries in self._planned():
            keys += [entry.key for entry in entries]
            labels += [entry.label for entry in entries]
            splits += [entry.split for entry in entries]
        return keys, labels, splits

    def _planned(self) -> Iterator[list[PlanEntry]]:
        """The clips that have windows, of each shard; DamagedShard unless they are those that the
        index tells of."""
        shards, place = self._shards, 0
        for shard, entries in self._plan().shards():
            if place == len(shards) or shard != shards.shard[place]:
                continue
            if len(entries) != shards.clips[place]:
                if self._lost is None:
                    self._lost = {entry.clip for entry in read_quarantine(self.folder)}
                entries = [entry for entry in entries if entry.key not in self._lost]
            if keys_sha256([entry.key for entry in entries]) != self._keys_sha256(place):
                break
            yield entries
            place += 1
        if place < len(shards):
            raise DamagedShard(
                f"{self.folder / PLAN}: its clips of shard {shards.shard[place]:06d}, less those "
                "in quarantine.jsonl, are not those of the shard: restore both files"
            )

    def _keys_sha256(self, shard: int) -> str:
        return bytes(self._shards.keys_sha256[shard]).hex()

    def _shard_keys(self, shard: int) -> list[str]:
        """The keys of the shard of this number among those that have windows."""
        end = int(self._first_clips[shard + 1])
        return self.keys[end - int(self._shards.clips[shard]) : end]

    @cached_property
    def _first_clips(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self._shards.clips)])

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


def _read_finished(folder: Path, info: CacheInfo) -> ShardColumns:
    known = info.files.get(INDEX)
    if known is None:
        raise DamagedShard(
            f"{folder / 'cache.json'}: is marked complete and tells of no {INDEX}: run the command "
            "that made the cache again"
        )
    columns = read_index(folder, StoredFile(bytes=known["bytes"], sha256=known["sha256"]))
    got, wanted = (
        (len(columns), int(columns.rows.sum())),
        tuple(info.counts.get(name) for name in ("shards", "windows")),
    )
    if got != wanted:
        raise DamagedShard(
            f"{folder}: {INDEX} has {got[0]} shards with {got[1]} windows, cache.json says "
            f"{wanted[0]} with {wanted[1]}: run the command that made the cache again"
        )
    return columns


def _read_unfinished(folder: Path, *, allow_incomplete: bool) -> tuple[ShardColumns, set[str]]:
    """The finished shards of an unfinished cache, and the clips that are quarantined there."""
    if not allow_incomplete:
        wanted = Plan.open(folder).num_shards if (folder / PLAN).is_file() else "?"
        raise CacheMismatch(
            f"{folder}: extraction has not finished, {len(done_shards(folder))} of {wanted} "
            "shards: run deltatok-extract again"
        )
    lost: set[str] = set()

    def noted() -> Iterator[DoneRecord]:
        for record in iterate_done(folder):
            lost.update(record.lost)
            yield record

    return ShardColumns.of(noted()), lost


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
