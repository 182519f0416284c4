"""What runs on a device: makes the shards it is given, one after the other, and says what is done.

    open: load the models, begin the cache    work: take shards, say what is done    close

A `Job` says what a shard is and how it is made; the loop runs in a thread of its own, so that
shards can be given while others are made. No Ray in here: driver.py makes actors of it.
"""

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...extract.shard_queue import ShardQueue
from ...shards.errors import DeltatokError, Stopped, UsageError
from ...shards.files import partial_mark
from ...shards.records import DoneRecord
from ...shards.running.interrupts import StopRequest

WORK_S = 1.0
"""How long a call waits for something to tell."""

SHARED_WITHIN_S = 30.0
"""For a file that one machine has made to be seen on another: network disks keep what they know of
a folder for so long (a guess)."""


class Job(Protocol):
    """How shards are made; pickled before `open`, used by one process after it."""

    def open(self, stop: StopRequest) -> int:
        """Loads what it needs and begins the cache unless it has begun; gives how many shards to
        hold at a time."""

    def make(self, queue: ShardQueue[Any], when_done: Callable[[DoneRecord], None]) -> None:
        """Makes the shards of `queue`; when_done: told of each, from any thread. Raises Stopped
        when `stop` asks."""

    def seconds(self) -> Mapping[str, float]:
        """By stage, since `open`."""

    def clip_keys(self, items: Sequence[Any]) -> list[str]:
        """The clips of a shard, by the items that are put into the queue."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a server answers first."""

    limit: int = 0
    """Shards to hold at a time."""
    mark: str = ""
    """In the names of all that it is writing: see `partial_mark`."""
    error: DeltatokError | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a server has to tell."""

    done: list[DoneRecord]
    """Since the last one."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage, since it was opened."""
    error: DeltatokError | None = None
    """What it ended with; it does nothing more. Any other exception is raised."""


class ShardServer:
    """Runs a job; its methods are called one at a time."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._stop = StopRequest()
        self._queue: ShardQueue[Any] = ShardQueue(is_open=True)
        self._thread = threading.Thread(target=self._run, name="make shards", daemon=True)
        self._news = threading.Condition()
        self._done: list[DoneRecord] = []
        self._ended_by: BaseException | None = None

    def open(self, folder: str, probe: Path) -> Opened:
        """Begins. folder: what relative paths start from, where there is such a one. probe: a file
        that the driver has made in the cache's folder."""
        with contextlib.suppress(OSError):
            os.chdir(folder)
        try:
            if not (probe.with_name("cache.json").exists() or sees(probe)):
                raise not_shared(probe.parent, [platform.node()])
            limit = self._job.open(self._stop)
        except DeltatokError as error:
            return Opened(error=error)
        self._thread.start()
        return Opened(limit=limit, mark=partial_mark())

    def work(self, shards: Sequence[tuple[int, Sequence[Any]]]) -> Report:
        """Takes more shards, number and items each; answers when there is something to tell, and
        after WORK_S anyway."""
        for shard, items in shards:
            self._queue.put(shard, items)
        with self._news:
            self._news.wait_for(lambda: self._done or self._ended_by, WORK_S)
            done, self._done = self._done, []
        error = self._ended_by
        if error is not None and not isinstance(error, DeltatokError):
            raise error
        seconds = {**self._job.seconds(), "wait for shards": self._queue.waited_s}
        return Report(done=done, seconds=seconds, error=error)

    def close(self) -> None:
        """Abandons the shard at hand and finishes those that are being written."""
        self._stop.ask("closed")
        self._queue.close()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._job.make(self._queue, self._note_done)
        except Stopped:
            pass
        except BaseException as error:
            with self._news:
                self._ended_by = error
                self._news.notify()

    def _note_done(self, record: DoneRecord) -> None:
        with self._news:
            self._done.append(record)
            self._news.notify()


def sees(probe: Path) -> bool:
    """Whether the file is there, at once or within SHARED_WITHIN_S."""
    end_s = time.monotonic() + SHARED_WITHIN_S
    while not probe.exists():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.5)
    return True


def not_shared(folder: Path, machines: Sequence[str]) -> UsageError:
    """The error for machines that do not see what the driver writes into `folder`."""
    return UsageError(
        f"out: {folder} is not the same folder everywhere: what this machine writes there is not "
        f"seen on {', '.join(machines)}: give a folder on a disk that all machines share, under "
        "the same path"
    )
