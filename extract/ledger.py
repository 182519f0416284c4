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
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from ..shards.cache import finish_cache, read_cache_info, reopen_cache
from ..shards.errors import DamagedShard, TooManyQuarantined
from ..shards.files import remove_partials
from ..shards.parts import Part
from ..shards.plan import Plan, PlanEntry, remove_strangers
from ..shards.records import (
    DoneRecord,
    Quarantined,
    done_shards,
    read_done,
    remove_done,
    write_quarantine,
)

EARLY_STOP_CLIPS = 100
"""With this many clips in quarantine, and more than allowed whatever follows, a run stops before
its end: something is wrong with all of them. With fewer it finishes, so that the good clips of a
small set are all there (a guess)."""

STALE_AFTER_S = 600.0
"""Partial files of finished shards that did not change for so long were left by a killed process of
another machine: writing a shard takes seconds (a guess)."""

_REWRITE_SHARE = 20
"""quarantine.jsonl is written whole, so at most 1/20 of the time goes to that."""

_LOGGER = logging.getLogger(__name__)


@dataclass
class Ledger:
    """The finished shards of the cache in `folder`, by whichever process."""

    folder: Path
    plan: Plan
    windows: dict[int, int] = field(default_factory=dict)
    """Finished shard -> its windows."""
    clips: dict[int, int] = field(default_factory=dict)
    """Finished shard -> its clips, those in quarantine too."""
    size_bytes: dict[int, int] = field(default_factory=dict)
    """Finished shard -> bytes of its files."""
    in_quarantine: dict[int, list[Quarantined]] = field(default_factory=dict)
    """Finished shard -> its clips without windows, where it has any."""
    _next_listing_s: float = 0.0

    @classmethod
    def read(cls, folder: Path, plan: Plan) -> "Ledger":
        """Counts the finished shards on disk.

        Raises DamagedShard for a done-record that does not belong to the plan.
        """
        ledger = cls(folder, plan)
        done = set(done_shards(folder))
        none: list[PlanEntry] = []
        strangers = ((shard, none) for shard in sorted(done) if shard >= plan.num_shards)
        for shard, entries in chain(plan.shards(done), strangers):
            record = read_done(folder, shard)
            if record is not None:
                _check_clips(folder, record, entries)
                ledger.add(record)
        return ledger

    def refresh(self) -> None:
        """Counts the shards that other processes finished since."""
        for shard in done_shards(self.folder):
            if shard < self.plan.num_shards and shard not in self.windows:
                record = read_done(self.folder, shard)
                if record is not None:
                    self.add(record)

    def add(self, record: DoneRecord) -> None:
        """Counts a shard; one that was counted before is replaced."""
        self._forget(record.shard)
        self.windows[record.shard] = record.rows
        self.clips[record.shard] = len(record.keys) + len(record.quarantined)
        self.size_bytes[record.shard] = sum(int(file["bytes"]) for file in record.files.values())
        if record.quarantined:
            self.in_quarantine[record.shard] = record.quarantined

    def take_back(self, shard: int) -> None:
        """The shard is not done, until it is made again."""
        remove_done(self.folder, shard)
        self._forget(shard)

    @property
    def missing(self) -> list[int]:
        """Shards of the plan that are not done, ascending."""
        return [shard for shard in range(self.plan.num_shards) if shard not in self.windows]

    @property
    def quarantined(self) -> list[Quarantined]:
        """The clips without windows."""
        return [clip for clips in self.in_quarantine.values() for clip in clips]

    def counts(self, *, num_frames: int) -> dict[str, int]:
        """The totals for cache.json; num_frames: of a window."""
        windows = sum(self.windows.values())
        return {
            "clips": self.plan.num_clips,
            "quarantined": len(self.quarantined),
            "windows": windows,
            "frames": windows * num_frames,
            "shards": len(self.windows),
        }

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
        num = len(self.quarantined)
        if num >= EARLY_STOP_CLIPS and num / self.plan.num_clips > max_quarantined:
            self.list_quarantined(now=True)
            self.check(max_quarantined, what="stopped early, finished shards stay")

    def check(self, max_quarantined: float, *, what: str = "finished") -> None:
        """Raises TooManyQuarantined if more than this share of the clips, 0..1, is missing."""
        num, num_clips = len(self.quarantined), self.plan.num_clips
        if num / num_clips > max_quarantined:
            raise TooManyQuarantined(
                f"{self.folder}: {what}: {num} of {num_clips} clips "
                f"({100 * num / num_clips:.3g} %) are in quarantine, allowed are "
                f"{100 * max_quarantined:.3g} %: see {self.folder / 'quarantine.jsonl'} for the "
                "reasons; --retry-quarantined tries them again, a higher --max-quarantined "
                "accepts them"
            )

    def _forget(self, shard: int) -> None:
        for known in (self.windows, self.clips, self.size_bytes, self.in_quarantine):
            known.pop(shard, None)


def reopen(folder: Path) -> None:
    """Takes `complete` back, before a shard of a finished cache is made again or one is added."""
    if read_cache_info(folder).complete:
        reopen_cache(folder)


def close_cache(folder: Path, *, num_frames: int, changed: bool, part: Part) -> Ledger:
    """Marks the cache complete if all its shards are done; gives what it holds.

    changed: whether this process made a shard. Otherwise nothing is written where all is done.
    Where others have shards to make yet, says so and leaves it to them.
    """
    ledger = Ledger.read(folder, Plan.open(folder))
    counts = ledger.counts(num_frames=num_frames)
    if ledger.missing:
        if changed:
            ledger.list_quarantined(now=True)
        _LOGGER.info(
            "%s: %d of %d shards are done, the others are left to %s: in this folder, or, from "
            "other machines, once their shards/ are copied into it and the command is run again; "
            "without launcher and --shard-of it makes all that is left",
            folder,
            len(ledger.windows),
            ledger.plan.num_shards,
            part.elsewhere(ledger.missing),
        )
        return ledger
    info = read_cache_info(folder)
    if changed or not info.complete or info.counts != counts:
        remove_partials(folder / "shards", stale_after_s=STALE_AFTER_S)
        remove_strangers(folder)
        ledger.list_quarantined(now=True)
        finish_cache(folder, counts)
    return ledger


def _check_clips(folder: Path, record: DoneRecord, planned: Sequence[PlanEntry]) -> None:
    done = {*record.keys, *(entry.clip for entry in record.quarantined)}
    if done != {entry.key for entry in planned}:
        raise DamagedShard(
            f"{folder}: shard {record.shard:06d} was made of other clips than the plan says: "
            "the plan or shards/ was changed: restore it, or extract into another folder"
        )
