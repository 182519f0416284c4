"""The shards that are still to make, taken one by one, shared with every other process on them.

A process takes the next shard that nobody has a lease on, and looks at its done-record before it
starts: another process may just have finished it. A shard leaves the list when it is done, by
whomever.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..shards.plan import PlanEntry
from ..shards.records import shard_path
from .leases import Lease, Leases

_Mark = tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class TakenShard:
    """A shard that this process is to make, as long as it has the lease."""

    shard: int
    entries: Sequence[PlanEntry]
    """Its clips, in plan order."""
    lease: Lease


class SharedWork:
    """What is left to make of the cache in `folder`."""

    def __init__(
        self, folder: Path, pending: Mapping[int, Sequence[PlanEntry]], leases: Leases
    ) -> None:
        """pending: shard -> its clips. One that is done already counts as left until somebody has
        written its done-record again."""
        self._folder = folder
        self._pending = dict(pending)
        self._marks = {shard: self._mark(shard) for shard in pending}
        self._leases = leases
        self._taken: dict[int, TakenShard] = {}
        self._elsewhere: list[int] = []

    @property
    def left(self) -> int:
        """Shards that are not done, as far as this process has looked."""
        return len(self._pending)

    @property
    def num_clips_left(self) -> int:
        """Clips of these shards."""
        return sum(map(len, self._pending.values()))

    def take(self) -> TakenShard | None:
        """The first shard that is free; None if there is none, now or any more (see `left`)."""
        while lease_name := self._take_name():
            shard, lease = lease_name
            if self._is_done(shard):  # it was, just before its lease was given up
                lease.release()
                self._done_elsewhere(shard)
                continue
            taken = TakenShard(shard=shard, entries=self._pending[shard], lease=lease)
            self._taken[shard] = taken
            return taken
        return None

    def give_back(self, taken: TakenShard, *, done: bool) -> None:
        """Ends this process's part; `done`: the done-record is written."""
        taken.lease.release()
        self._taken.pop(taken.shard)
        if done:
            self._pending.pop(taken.shard)

    def done_elsewhere(self) -> list[int]:
        """Shards that other processes were found to have finished since the last call."""
        shards, self._elsewhere = self._elsewhere, []
        return shards

    def _take_name(self) -> tuple[int, Lease] | None:
        last = -1

        def names() -> Iterator[str]:
            nonlocal last
            for shard in list(self._pending):
                if shard in self._taken:
                    continue
                if self._is_done(shard):
                    self._done_elsewhere(shard)
                    continue
                last = shard
                yield lease_of(shard)

        lease = self._leases.take_first(names())
        return None if lease is None else (last, lease)

    def _is_done(self, shard: int) -> bool:
        mark = self._mark(shard)
        return mark is not None and mark != self._marks[shard]

    def _done_elsewhere(self, shard: int) -> None:
        self._pending.pop(shard)
        self._elsewhere.append(shard)

    def _mark(self, shard: int) -> _Mark:
        """Tells one writing of the done-record from the next."""
        try:
            status = shard_path(self._folder, shard, ".json").stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns


def lease_of(shard: int) -> str:
    """The name of the lease on a shard."""
    return f"{shard:06d}"
