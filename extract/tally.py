"""How far a cache is: what its finished shards hold, and whether too many clips are missing.

Counted from the done-records alone, so that a resumed run knows what an uninterrupted one does.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..shards.errors import DamagedShard, TooManyQuarantined
from ..shards.plan import PlanEntry
from ..shards.records import DoneRecord, Quarantined, done_shards, read_done, write_quarantine

EARLY_STOP_CLIPS = 100
"""With this many clips in quarantine, and more than allowed whatever follows, a run stops before
its end: something is wrong with all of them. With fewer it finishes, so that the good clips of a
small set are all there (a guess)."""

_REWRITE_SHARE = 20
"""quarantine.jsonl is written whole, so at most 1/20 of the time goes to that."""


@dataclass(frozen=True)
class ShardTally:
    """One finished shard in numbers."""

    windows: int
    size_bytes: int
    in_quarantine: tuple[Quarantined, ...]

    @property
    def quarantined(self) -> int:
        return len(self.in_quarantine)


@dataclass
class Tally:
    """The finished shards of the cache in `folder`."""

    folder: Path
    num_clips: int
    """Clips in the plan."""
    shards: dict[int, ShardTally] = field(default_factory=dict)
    _next_rewrite_s: float = 0.0

    @classmethod
    def read(cls, folder: Path, plan: Mapping[int, Sequence[PlanEntry]]) -> "Tally":
        """Of what is there; `plan` is shard -> its clips.

        Raises DamagedShard for a done-record that does not belong to the plan.
        """
        tally = cls(folder, num_clips=sum(map(len, plan.values())))
        for shard in done_shards(folder):
            record = read_done(folder, shard)
            if record is not None:
                _check_clips(folder, record, plan.get(shard, []))
                tally.add(record)
        return tally

    def add(self, record: DoneRecord) -> None:
        """Counts a shard; one that was counted before is replaced."""
        self.shards[record.shard] = ShardTally(
            windows=record.rows,
            size_bytes=sum(int(entry["bytes"]) for entry in record.files.values()),
            in_quarantine=tuple(record.quarantined),
        )

    @property
    def windows(self) -> int:
        return sum(shard.windows for shard in self.shards.values())

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards.values())

    @property
    def quarantined(self) -> int:
        return sum(shard.quarantined for shard in self.shards.values())

    def counts(self, *, num_frames: int) -> dict[str, int]:
        """The totals for cache.json; num_frames: of a window."""
        return {
            "clips": self.num_clips,
            "quarantined": self.quarantined,
            "windows": self.windows,
            "frames": self.windows * num_frames,
            "shards": len(self.shards),
        }

    def list_quarantined(self, *, now: bool) -> None:
        """Writes quarantine.jsonl anew; without `now` not if that was done a moment ago.

        From the shards counted here, so that no done-record is read again: with `now`, at the end
        of a run, the tally has just been read from all of them.
        """
        start_s = time.monotonic()
        if now or start_s >= self._next_rewrite_s:
            entries = [e for shard in self.shards.values() for e in shard.in_quarantine]
            write_quarantine(self.folder, entries)
            end_s = time.monotonic()
            self._next_rewrite_s = end_s + _REWRITE_SHARE * (end_s - start_s)

    def check_certain(self, max_quarantined: float) -> None:
        """Raises TooManyQuarantined if the run is bound to end so and is large."""
        if self.quarantined >= EARLY_STOP_CLIPS:
            self.check(max_quarantined, what="stopped early, finished shards stay")

    def check(self, max_quarantined: float, *, what: str = "finished") -> None:
        """Raises TooManyQuarantined if more than this share of the clips, 0..1, is missing."""
        share = self.quarantined / self.num_clips
        if share > max_quarantined:
            raise TooManyQuarantined(
                f"{self.folder}: {what}: {self.quarantined} of {self.num_clips} clips "
                f"({100 * share:.3g} %) are in quarantine, allowed are "
                f"{100 * max_quarantined:.3g} %: see {self.folder / 'quarantine.jsonl'} for the "
                "reasons; --retry-quarantined tries them again, a higher --max-quarantined "
                "accepts them"
            )


def _check_clips(folder: Path, record: DoneRecord, planned: Sequence[PlanEntry]) -> None:
    done = {*record.keys, *(entry.clip for entry in record.quarantined)}
    if done != {entry.key for entry in planned}:
        raise DamagedShard(
            f"{folder}: shard {record.shard:06d} was made of other clips than plan.jsonl says: "
            "plan.jsonl or shards/ was changed: restore it, or extract into another folder"
        )
