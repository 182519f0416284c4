"""SIGTERM, SIGINT or a time limit: end cleanly, with what is done in place and exit code 75.

    with StopRequest(time_limit_s=1800) as stop:
        while ...:
            with stop.at_once():
                clip = next(decoded)
            stop.check()

A signal only sets a flag, which a loop reads where it can end without losing work; what may wait
for minutes and has nothing to lose goes into `at_once`. A second SIGINT does what it did before
(KeyboardInterrupt). A second SIGTERM is not heeded: launchers and schedulers each send one. The
time limit is a SIGALRM, so that it too cuts off what waits.
"""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from ..errors import Stopped


class StopRequest:
    """Whether somebody asked this process to stop; safe to use from several threads.

    While entered, signals and the time limit ask; the old handlers come back at the end. Outside of
    the main thread, where Python takes no signals, no signal asks, and the time limit cuts nothing
    off.
    """

    def __init__(
        self,
        *,
        time_limit_s: float | None = None,
        signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
    ) -> None:
        """time_limit_s: seconds from now after which it counts as asked."""
        self._time_limit_s = time_limit_s
        self._start_s = time.monotonic()
        self._signals = signals
        self._before: dict[signal.Signals, Any] = {}
        self._asked = threading.Event()
        self._reason = "asked to stop"
        self._raises = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            limited = () if self._time_limit_s is None else (signal.SIGALRM,)
            for number in (*self._signals, *limited):
                self._before[number] = signal.getsignal(number)
                signal.signal(number, self._handle)
            if self._time_limit_s is not None:
                signal.setitimer(signal.ITIMER_REAL, self._time_limit_s)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @property
    def asked(self) -> bool:
        """Whether a signal came or the time is up."""
        limit_s = self._time_limit_s
        if limit_s is not None and time.monotonic() - self._start_s >= limit_s:
            self._set(self._limit_reason)
        return self._asked.is_set()

    def ask(self, reason: str) -> None:
        """From now on `asked` is true and `check` raises; so does the first call within
        `at_once`."""
        is_first = self._set(reason)
        if is_first and self._raises:
            self.check()

    def check(self) -> None:
        """Raises Stopped if a stop was asked for."""
        if self.asked:
            raise Stopped(f"stopped ({self._reason}): what is finished stays, run again to go on")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What is within may be cut off anywhere: a signal raises Stopped there."""
        self._raises = True
        try:
            self.check()
            yield
        finally:
            self._raises = False

    @property
    def _limit_reason(self) -> str:
        return f"time limit of {self._time_limit_s:.6g} s"

    def _set(self, reason: str) -> bool:
        if self._asked.is_set():
            return False
        self._reason = reason
        self._asked.set()
        return True

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])
        limit = number == signal.SIGALRM
        self.ask(self._limit_reason if limit else f"signal {signal.Signals(number).name}")
