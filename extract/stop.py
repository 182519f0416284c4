"""SIGTERM and SIGINT: finish or abandon the shard cleanly, then leave with exit code 75.

    with stop_on_signals() as stop:
        while ...:
            with stop.at_once():
                clip = next(decoded)
            stop.check()

The first signal only sets a flag, which the loop reads between batches; what may wait for minutes
without having anything to lose goes into `at_once`. A second signal does what a signal
did before (by default it kills at once, which loses nothing either: a shard without its
done-record is made again). Called by run.py.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..shards.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether somebody asked this run to stop; safe to use from several threads."""

    def __init__(self) -> None:
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
        return self._asked.is_set()

    def check(self) -> None:
        """Raises Stopped if a stop was asked for."""
        if self.asked:
            raise Stopped(f"stopped ({self._reason}): finished shards stay, run again to go on")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A request that the first SIGTERM or SIGINT makes; the old handlers come back at the end.

    Outside of the main thread, where Python takes no signals, it is never made by a signal.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _frame: FrameType | None) -> None:
        restore()
        request.ask(f"signal {signal.Signals(number).name}")

    for number in _SIGNALS:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()
