"""Which shards of a cache are done, whose the others are, and closing the cache when all are done.

    plan.json --part of this process--> the shards it makes --> shards/NNNNNN.json, one a shard
    all shards there --> quarantine.jsonl, index.jsonl, cache.json `complete`

Everything is counted from the done-records alone, so that a resumed run knows what an uninterrupted
one does, and nothing is locked. Each process has a fixed part of the plan, a shard that two make
all the same has the same bytes, and whoever finds all shards done closes the cache: any process may
repeat that, also two at once, and the files are the same.
"""

import logging
import time
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from ..shards.cache import check_clips, finish_cache, read_cache_info, reopen_cache
from ..shards.errors import TooManyQuarantined
from ..shards.files import remove_partials
from ..shards.index import INDEX, read_index
from ..shards.plan import Plan, remove_strangers
from ..shards.records import (
    QUARANTINE,
    DoneRecord,
    Quarantined,
    StoredFile,
    done_shards,
    read_done,
    remove_done,
    write_quarantine,
)
from ..shards.running.parts import Part
from ..shards.stores.upload import take_records

EARLY_STOP_CLIPS = 100
"""With this many clips in quarantine, and more than allowed whatever follows, a run stops before
its end: something is wrong with all of them. With fewer it finishes, so that the good clips of a
small set are all there (a guess)."""

STALE_AFTER_S = 600.0
"""Partial files of finished shards that did not change for so long were left by a killed process of
another machine: writing a shard takes seconds (a guess)."""

_REWRITE_SHARE = 20
"""quarantine.jsonl is written whole, so at most 1/20 of the time goes to that."""

_NOT_DONE = -1

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a cache holds."""

    counts: dict[str, int]
    """As `CacheInfo.counts`, of the finished shards."""
    size_bytes: int
    """Of the shards' files."""
    is_complete: bool
    """Whether all its shards are done."""


class Ledger:
    """The finished shards of the cache in `folder`, by whichever process; 24 bytes a shard."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        num_shards = plan.num_shards
        self.windows = np.full(num_shards, _NOT_DONE, dtype=np.int64)
        """int64 (shards,): of every shard that is done, else -1."""
        self.clips = np.zeros(num_shards, dtype=np.int64)
        """int64 (shards,): of every shard that is done, those in quarantine too, else 0."""
        self.size_bytes = np.zeros(num_shards, dtype=np.int64)
        """int64 (shards,): of every finished shard's file."""
        self.in_quarantine: dict[int, list[Quarantined]] = {}
        """Finished shard -> its clips without windows, where it has any."""
        self._next_listing_s = 0.0

    @classmethod
    def read(cls, folder: Path, plan: Plan) -> "Ledger":
        """Counts the finished shards on disk.

        Raises DamagedShard for a done-record that does not belong to the plan.
        """
        ledger = cls(folder, plan)
        done = done_shards(folder)
        none: list[str] = []
        strangers = ((shard, none) for shard in done if shard >= plan.num_shards)
        for shard, keys in chain(plan.keys_of_shards(set(done)), strangers):
            record = read_done(folder, shard)
            if record is not None:
                check_clips(folder, record, keys)
                ledger.add(record)
        return ledger

    def refresh(self) -> None:
        """Counts the shards that other processes finished since."""
        for shard in done_shards(self.folder):
            if shard < self.plan.num_shards and not self.is_done(shard):
                record = read_done(self.folder, shard)
                if record is not None:
                    self.add(record)

    def add(self, record: DoneRecord) -> None:
        """Counts a shard; one that was counted before is replaced."""
        self._forget(record.shard)
        self.windows[record.shard] = record.rows
        self.clips[record.shard] = record.clips + len(record.quarantined)
        self.size_bytes[record.shard] = 0 if record.file is None else record.file.bytes
        if record.quarantined:
            self.in_quarantine[record.shard] = record.quarantined

    def take_back(self, shard: int) -> None:
        """The shard is not done, until it is made again."""
        remove_done(self.folder, shard)
        self._forget(shard)

    def is_done(self, shard: int) -> bool:
        """Whether the shard, which is in the plan, is finished."""
        return bool(self.windows[shard] != _NOT_DONE)

    @property
    def num_done(self) -> int:
        """Finished shards."""
        return int(np.count_nonzero(self.windows != _NOT_DONE))

    @property
    def missing(self) -> list[int]:
        """Shards of the plan that are not done, ascending."""
        return np.flatnonzero(self.windows == _NOT_DONE).tolist()

    @property
    def quarantined(self) -> list[Quarantined]:
        """The clips without windows."""
        return [clip for clips in self.in_quarantine.values() for clip in clips]

    def totals(self, *, num_frames: int) -> Totals:
        """Of the finished shards; num_frames: of a window."""
        windows = int(self.windows[self.windows != _NOT_DONE].sum())
        counts = {
            "clips": self.plan.num_clips,
            "quarantined": len(self.quarantined),
            "windows": windows,
            "frames": windows * num_frames,
            "shards": self.num_done,
        }
        size_bytes = int(self.size_bytes.sum())
        return Totals(counts=counts, size_bytes=size_bytes, is_complete=not self.missing)

    def list_quarantined(self, *, now: bool) -> None:
        """Writes quarantine.jsonl anew; without `now` not if that was done a moment ago.

        Every done-record is read once at most, however often this is called.
        """
        start_s = time.monotonic()
        if now or start_s >= self._next_listing_s:
            self.refresh()
            write_quarantine(self.folder, self.quarantined)
            end_s = time.monotonic()
            self._next_listing_s = end_s + _REWRITE_SHARE * (end_s - start_s)

    def check_certain(self, max_quarantined: float) -> None:
        """Raises TooManyQuarantined if the run is bound to end so and is large."""
        num, num_clips = len(self.quarantined), self.plan.num_clips
        if num >= EARLY_STOP_CLIPS and num / num_clips > max_quarantined:
            self.list_quarantined(now=True)
            what = "stopped early, finished shards stay"
            check_quarantined(self.folder, num, num_clips, most=max_quarantined, what=what)

    def _forget(self, shard: int) -> None:
        self.windows[shard] = _NOT_DONE
        self.clips[shard] = self.size_bytes[shard] = 0
        self.in_quarantine.pop(shard, None)


def check_quarantined(
    folder: Path, num: int, num_clips: int, *, most: float, what: str = "finished"
) -> None:
    """Raises TooManyQuarantined if more than the share `most` of the clips, 0..1, is missing."""
    if num / num_clips > most:
        raise TooManyQuarantined(
            f"{folder}: {what}: {num} of {num_clips} clips ({100 * num / num_clips:.3g} %) are in "
            f"quarantine, allowed are {100 * most:.3g} %: see {folder / QUARANTINE} for the "
            "reasons; --retry-quarantined tries them again, a higher --max-quarantined accepts them"
        )


def reopen(folder: Path) -> None:
    """Takes `complete` back, before a shard of a finished cache is made again or one is added."""
    if read_cache_info(folder).complete:
        reopen_cache(folder)


def close_cache(folder: Path, *, changed: bool, part: Part) -> Totals:
    """Marks the cache complete if all its shards are done; gives what it holds.

    changed: whether this process made a shard. Otherwise nothing is written where all is done.
    Where others have shards to make yet, says so and leaves it to them.
    """
    take_records(folder)
    info, plan = read_cache_info(folder), Plan.open(folder)
    missing = sorted(set(range(plan.num_shards)).difference(done_shards(folder)))
    if missing:
        ledger = Ledger.read(folder, plan)
        if changed:
            ledger.list_quarantined(now=True)
        _LOGGER.info(
            "%s: %d of %d shards are done, the others are left to %s: in this folder, or, from "
            "other machines, once their shards/ are copied into it and the command is run again; "
            "without launcher and --shard-of it makes all that is left",
            folder,
            plan.num_shards - len(missing),
            plan.num_shards,
            part.elsewhere(missing),
        )
        return replace(ledger.totals(num_frames=info.shape.num_frames), is_complete=False)
    if changed or not info.complete:
        remove_partials(folder / "shards", stale_after_s=STALE_AFTER_S)
        remove_strangers(folder)
        info = finish_cache(folder)
    index = read_index(folder, StoredFile(**info.files[INDEX]))
    return Totals(counts=info.counts, size_bytes=int(index.bytes.sum()), is_complete=True)
