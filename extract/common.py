"""What only one process at a time may do to a cache that many write: plan, take back, finish.

All of it happens under the lease `cache`. Every process does it when it has nothing left to do, and
finds it done by another one, or does it: so it does not matter which is the last, or dies.
"""

import logging
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..shards.cache import finish_cache, read_cache_info, reopen_cache
from ..shards.errors import CacheMismatch
from ..shards.files import is_partial, remove, remove_partials
from ..shards.plan import (
    PLAN,
    PlanEntry,
    clips_by_shard,
    extend_plan,
    make_plan,
    mend_plan,
    needs_mending,
    read_plan,
    write_plan,
)
from .leases import Leases
from .sources.clip import Clip
from .stop import StopRequest
from .tally import Tally

CACHE_LEASE = "cache"
MAX_POLL_S = 1.0
"""Seconds between two looks at what other processes do (a guess)."""

_LOGGER = logging.getLogger(__name__)

Plan = dict[int, list[PlanEntry]]
"""Shard -> its clips."""


class CommonFolder:
    """The cache in `folder`, as far as its processes have it in common."""

    def __init__(self, folder: Path, leases: Leases, stop: StopRequest, *, poll_s: float) -> None:
        """poll_s: seconds between two looks at what others do."""
        self._folder = folder
        self._leases = leases
        self._stop = stop
        self._poll_s = poll_s

    def wait(self) -> None:
        """A moment, for others to get on; Stopped if a stop is asked for."""
        with self._stop.at_once():
            time.sleep(self._poll_s)

    def plan(
        self,
        clips: Sequence[Clip],
        *,
        clips_per_shard: int,
        seed: int,
        append: bool,
        retry: bool = False,
    ) -> Plan:
        """The plan for `clips`. One that is there is followed, or with `append` made longer; with
        `retry` clips that were not there, and now are, are filled in.

        Raises CacheMismatch if it is for other clips, without `append`.
        """
        if append and (self._folder / PLAN).exists():
            known = {entry.key for entry in read_plan(self._folder)}
            if not known.issuperset(clip.key for clip in clips):
                return self._append(clips, clips_per_shard=clips_per_shard, seed=seed)
            # Only compares sizes: nothing is new.
            plan = extend_plan(self._folder, clips, clips_per_shard=clips_per_shard, seed=seed)
            return clips_by_shard(plan)
        made = make_plan(clips, clips_per_shard=clips_per_shard, seed=seed)
        if retry and needs_mending(self._folder, made):
            with self._alone():
                reopen_cache(self._folder)  # first: a finished cache.json tells the plan's hash
                mend_plan(self._folder, made)
        return clips_by_shard(write_plan(self._folder, made))

    def reopen(self) -> None:
        """Takes `complete` back, before a shard of a finished cache is made again."""
        with self._alone():
            if read_cache_info(self._folder).complete:
                reopen_cache(self._folder)

    def list_quarantined(self, tally: Tally) -> None:
        """Rebuilds quarantine.jsonl now and then; not while another process does."""
        lease = self._leases.take(CACHE_LEASE)
        if lease is not None:
            try:
                tally.list_quarantined(now=False)
            finally:
                lease.release()

    def finish(self, *, num_frames: int, changed: bool) -> Tally:
        """Marks the cache complete and tidies up; gives what it holds.

        changed: whether this process wrote a shard. Otherwise nothing is written where all is done.
        Waits for those that still write to the folder, although nothing is left to do.
        """
        tally = self._tally()
        if not changed and not self._leases.names() and self._is_finished(tally, num_frames):
            return tally
        self._wait_for_others()
        with self._alone():
            tally = self._tally()
            planned = clips_by_shard(read_plan(self._folder))
            if tally.shards.keys() != planned.keys():
                _LOGGER.info(
                    "%s: %d of %d shards are made; the runs that make the others (--shard-of, "
                    "--append) finish the cache: in this folder, or, from other machines, once "
                    "their shards/ are copied into it and the command is run again",
                    self._folder,
                    len(tally.shards),
                    len(planned),
                )
            elif changed or not self._is_finished(tally, num_frames):
                self._remove_partials()
                tally.list_quarantined(now=True)
                finish_cache(self._folder, tally.counts(num_frames=num_frames))
        return tally

    def _is_finished(self, tally: Tally, num_frames: int) -> bool:
        info = read_cache_info(self._folder)
        return info.complete and info.counts == tally.counts(num_frames=num_frames)

    def _append(self, clips: Sequence[Clip], *, clips_per_shard: int, seed: int) -> Plan:
        with self._alone():
            # First: a finished cache.json tells the hash of its plan.
            reopen_cache(self._folder)
            plan = extend_plan(self._folder, clips, clips_per_shard=clips_per_shard, seed=seed)
            return clips_by_shard(plan)

    def _tally(self) -> Tally:
        return Tally.read(self._folder, clips_by_shard(read_plan(self._folder)))

    def _wait_for_others(self) -> None:
        while names := [name for name in self._leases.names() if name != CACHE_LEASE]:
            alive = False
            for name in names:
                lease = self._leases.take(name)
                if lease is None:
                    alive = True
                else:  # of a process that died between its done-record and the end of its lease
                    lease.release()
            if alive:
                self.wait()

    def _remove_partials(self) -> None:
        """Nobody writes a shard now, or has lost its lease and writes what is there already."""
        remove_partials(self._folder)
        for path in (self._folder / "shards").iterdir():
            if is_partial(path):
                try:
                    remove(path)
                except OSError as error:
                    _LOGGER.warning("%s: cannot be removed (%s)", path, error.strerror)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        while (lease := self._leases.take(CACHE_LEASE)) is None:
            self.wait()
        try:
            yield
        finally:
            lease.release()


def check_sources(folder: Path, pending: Plan, known: Container[str]) -> None:
    """Raises CacheMismatch unless all clips that are still to be read are among those given."""
    missing = [entry for part in pending.values() for entry in part if entry.key not in known]
    if missing:
        raise CacheMismatch(
            f"{folder}: clip {missing[0].key!r} is in a shard that is not done, but not among the "
            f"videos given ({len(missing)} such clips; it came from {missing[0].source}): give the "
            "old videos as well"
        )
