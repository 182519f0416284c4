"""Stopping when asked: SIGTERM (a scheduler's preemption) or Ctrl-C ends a run after the step at
hand, with a checkpoint. Used by loop.py and tokenize.py.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """While entered, `requested` tells whether one of the signals came; the old handlers are put
    back after, and for a second Ctrl-C, which does not wait.

    Only the main thread can take signals: in another one `requested` stays false.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}
        self._is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._is_main:
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])
