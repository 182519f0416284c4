"""Stopping when asked: SIGTERM (a scheduler's preemption) ends a run after the step at hand, with a
checkpoint. Used by loop.py and tokenize.py."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class StopSignal:
    """While entered, `requested` tells whether SIGTERM came; the old handler is put back after.

    Only the main thread can take signals: in another one `requested` stays false.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None
        self._is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._is_main:
            self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_main:
            signal.signal(signal.SIGTERM, self._before)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
