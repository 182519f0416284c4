"""SIGTERM, SIGINT or a time limit: abandon the shard cleanly, then leave with exit code 75.

    with stop_on_signals(time_limit_s=1800) as stop:
        while ...:
            with stop.at_once():
                clip = next(decoded)
            stop.check()

The first signal only sets a flag, which the loop reads between batches; what may wait for minutes
without having anything to lose goes into `at_once`. A second signal does what a signal
did before (by default it kills at once, which loses nothing either: a shard without its
done-record is made again). The limit is a SIGALRM, so that it too cuts off what waits.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..shards.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether somebody asked this run to stop; safe to use from several threads."""

    def __init__(self, *, time_limit_s: float | None = None) -> None:
        """time_limit_s: seconds from now after which it counts as asked."""
        self._time_limit_s = time_limit_s
        self._start_s = time.monotonic()
        self._asked = threading.Event()
        self._reason = "asked to stop"
        self._raise_at_once = False

    def ask(self, reason: str) -> None:
        """From now on `asked` is true and `check` raises; so does this, within `at_once`."""
        self._reason = reason
        self._asked.set()
        if self._raise_at_once:
            self.check()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What is within may be cut off anywhere: a signal raises Stopped there."""
        self._raise_at_once = True
        try:
            self.check()
            yield
        finally:
            self._raise_at_once = False

    @property
    def asked(self) -> bool:
        limit_s = self._time_limit_s
        if limit_s is not None and time.monotonic() - self._start_s >= limit_s:
            if not self._asked.is_set():
                self._reason = f"time limit of {limit_s:.6g} s"
            self._asked.set()
        return self._asked.is_set()

    def check(self) -> None:
        """Raises Stopped if a stop was asked for."""
        if self.asked:
            raise Stopped(f"stopped ({self._reason}): finished shards stay, run again to go on")


@contextmanager
def stop_on_signals(*, time_limit_s: float | None = None) -> Iterator[StopRequest]:
    """A request that the first SIGTERM or SIGINT makes, or the end of the time limit, in seconds
    from now; the old handlers come back at the end.

    Outside of the main thread, where Python takes no signals, it is never made by a signal, and the
    time limit cuts nothing off.
    """
    request = StopRequest(time_limit_s=time_limit_s)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    alarm_before = signal.getsignal(signal.SIGALRM)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _frame: FrameType | None) -> None:
        restore()
        request.ask(f"signal {signal.Signals(number).name}")

    def handle_alarm(_number: int, _frame: FrameType | None) -> None:
        request.ask(f"time limit of {time_limit_s:.6g} s")

    for number in _SIGNALS:
        signal.signal(number, handle)
    if time_limit_s is not None:
        signal.signal(signal.SIGALRM, handle_alarm)
        signal.setitimer(signal.ITIMER_REAL, time_limit_s)
    try:
        yield request
    finally:
        if time_limit_s is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm_before)
        restore()
