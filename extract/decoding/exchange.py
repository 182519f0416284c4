"""Where the user's thread and the pool's thread meet: clips go in by number, results come out.

Everything here may be called from either thread; nothing in it touches a process or a pipe of one.
"""

import os
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ...shards.records import Quarantined
from .wire import DecodedFrames

Result = DecodedFrames | Quarantined


@dataclass
class Job:
    """One clip on its way."""

    number: int
    request: dict[str, Any]
    failures: list[str] = field(default_factory=list)
    """How its tries ended, where the process did not survive them."""


class Exchange:
    """Jobs waiting to be begun and results waiting to be taken.

    `wake_fd` becomes readable whenever the user's thread has changed something.
    """

    def __init__(self, *, max_waiting_bytes: int) -> None:
        self._max_waiting_bytes = max_waiting_bytes
        self._changed = threading.Condition()
        self._pending: deque[Job] = deque()
        self._results: dict[int, Result] = {}
        self._next_number = 0
        self._wanted = 0
        self._cancelling = False
        self._stopping = False
        self._closed: BaseException | None = None
        self.wake_fd, self._wake_write = os.pipe()
        os.set_blocking(self.wake_fd, False)
        os.set_blocking(self._wake_write, False)

    # For the user's thread.

    def submit(self, request: dict[str, Any]) -> int:
        """Queues a clip; gives the number to `take` its result by."""
        with self._changed:
            number = self._next_number
            self._next_number += 1
            self._pending.append(Job(number, request))
            self._wake()
            return number

    def take(self, number: int) -> Result:
        """The result of that clip, as soon as it is there; raises what ended the pool's thread."""
        with self._changed:
            self._wanted = number
            self._wake()
            while number not in self._results:
                if self._closed is not None:
                    raise self._closed
                self._changed.wait()
            return self._results.pop(number)

    def cancel(self) -> None:
        """Has everything forgotten; returns when the pool's thread has done so."""
        with self._changed:
            self._cancelling = True
            self._wake()
            while self._cancelling and self._closed is None:
                self._changed.wait()

    def stop(self) -> None:
        """Asks the pool's thread to end."""
        with self._changed:
            self._stopping = True
            self._wake()

    # For the pool's thread.

    def stopping(self) -> bool:
        """Whether to end."""
        with self._changed:
            self._clear_wake()
            return self._stopping

    def cancelling(self) -> bool:
        """Whether to drop all work and say `cancelled`."""
        with self._changed:
            return self._cancelling

    def cancelled(self) -> None:
        """Forgets all jobs and results, and lets the user's thread go on."""
        with self._changed:
            self._pending.clear()
            self._results.clear()
            self._cancelling = False
            self._changed.notify_all()

    def num_pending(self) -> int:
        """Clips not begun."""
        with self._changed:
            return len(self._pending)

    def next_job(self) -> Job | None:
        """The next clip to begin, unless too many bytes of earlier finished ones wait already."""
        with self._changed:
            waiting = [r for r in self._results.values() if isinstance(r, DecodedFrames)]
            full = sum(r.frames.nbytes for r in waiting) >= self._max_waiting_bytes
            if not self._pending or (full and self._pending[0].number > self._wanted):
                return None
            return self._pending.popleft()

    def put_back(self, job: Job) -> None:
        """Queues a clip for another try, at its place in the order."""
        with self._changed:
            self._pending.append(job)
            self._pending = deque(sorted(self._pending, key=lambda pending: pending.number))

    def deliver(self, job: Job, result: Result) -> None:
        """Makes a result ready to be taken."""
        with self._changed:
            self._results[job.number] = result
            self._changed.notify_all()

    def close(self, error: BaseException) -> None:
        """The pool's thread has ended: whoever waits, or will wait, gets `error`."""
        with self._changed:
            self._closed = error
            os.close(self.wake_fd)
            os.close(self._wake_write)
            self._changed.notify_all()

    def _wake(self) -> None:
        if self._closed is not None:
            return
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:  # it has been told often enough
            return

    def _clear_wake(self) -> None:
        try:
            while os.read(self.wake_fd, 4096):
                pass
        except BlockingIOError:
            return
