"""A sign of life: a line on stderr whenever a command has said nothing for a few seconds."""

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

EVERY_S = 2.0


class SignOfLife:
    """Within it, where nothing is written to stdout or stderr for EVERY_S, a line on stderr says
    which package is being loaded, or else what is being done, and for how long.

    Modules that are loaded hold the interpreter for moments, so a line may come a little late.
    Within another one it does nothing.
    """

    _active = False

    def __init__(self, doing: str) -> None:
        self.doing = doing
        """What a line says; may be changed."""
        self._main = threading.get_ident()
        self._streams = (sys.stdout, sys.stderr)
        self._said_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sign of life", daemon=True)

    def __enter__(self) -> Self:
        self._is_inner = SignOfLife._active
        if not self._is_inner:
            SignOfLife._active = True
            for stream in self._streams:
                stream.write = self._noted(stream)  # type: ignore[method-assign]
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._is_inner:
            self._ended.set()
            self._thread.join()
            for stream in self._streams:
                del stream.write
            SignOfLife._active = False

    def _noted(self, stream: Any) -> Any:
        write = stream.write

        def noted(text: str) -> Any:
            self._said_s = time.monotonic()
            return write(text)

        return noted

    def _watch(self) -> None:
        silent_since_s = said_s = self._said_s
        while not self._ended.wait(EVERY_S / 8):
            if self._said_s != said_s:  # somebody else said something
                silent_since_s = said_s = self._said_s
            now_s = time.monotonic()
            if now_s - said_s < EVERY_S:
                continue
            package = self._loading()
            doing = f"loading {package}" if package else self.doing
            text = f"... {doing} ({now_s - silent_since_s:.0f} s)"
            if "tqdm" in sys.modules:  # puts the line above its bars
                sys.modules["tqdm"].tqdm.write(text, file=self._streams[1])
            else:
                print(text, file=self._streams[1], flush=True)
            said_s = self._said_s

    def _loading(self) -> str | None:
        """The package, not of ours, whose import the main thread is at."""
        frame, package = sys._current_frames().get(self._main), None
        while frame is not None:
            if frame.f_code.co_name == "_find_and_load":
                name = str(frame.f_locals.get("name", "")).partition(".")[0]
                package = name if name and name != __name__.partition(".")[0] else package
            frame = frame.f_back
        return package
