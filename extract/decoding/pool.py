"""Clips in, windows of pixels out, in order; decoded ahead by processes that may hang or crash.

decord can spin for ever holding the GIL, crash, or leak, so no clip is decoded in this process.
One bad clip costs one clip: its decoder is killed after a wall-clock deadline and replaced, the
clip is tried once more (with PyAV), and then quarantined with what happened.

`DecodePool` is what `run.py` sees; the thread that moves the bytes is in `pump.py`.
"""

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ...shards.records import Quarantined
from ..config import DecoderChoice
from ..datasets.windows import Policy
from ..sampling import WindowDraw
from ..sources.clip import Clip, source_to_json
from .exchange import Exchange, Result
from .pump import Pump, PumpLimits

CHILD_COMMAND = (sys.executable, "-P", "-m", "deltatok.extract.decoding.child")
"""-P: the current folder is no place to import from."""


@dataclass(frozen=True)
class DecodedWindow:
    """One window before its crop and flip are made."""

    clip_frames: NDArray[np.uint8]
    """uint8 (F, H, W, 3) RGB, read-only: every frame that some window of the clip uses."""
    rows: list[int]
    """The rows of `clip_frames` that make the window, T of them."""
    draw: WindowDraw

    @property
    def frames(self) -> NDArray[np.uint8]:
        """uint8 (T, H, W, 3) RGB: the full frames as they are shown, not to be written to. A copy
        unless the rows follow one another."""
        first = self.rows[0]
        if self.rows == list(range(first, first + len(self.rows))):
            return self.clip_frames[first : first + len(self.rows)]
        return self.clip_frames[self.rows]


@dataclass(frozen=True)
class DecodedClip:
    """All windows of one clip."""

    key: str
    decoder: str
    """"decord", "torchcodec", "pyav" or "frames"."""
    windows: list[DecodedWindow]


class DecodePool:
    """Decoding processes, kept from one `decode` to the next; a context manager.

    Args:
        num_workers: decoding processes, started when there is work for them.
        timeout_s: wall-clock seconds a clip may take in one try.
        max_clips_per_child: a process is replaced after this many clips (decord leaks).
        max_child_rss: bytes; a process that keeps more than this is replaced, one that takes this
            and `max_clip_bytes` together while it decodes is killed (Linux).
        max_clip_bytes: bytes of RGB a clip's windows may have; more goes to quarantine.
        max_waiting_bytes: bytes of decoded clips to keep ahead; no more clips are begun above it.
        look_ahead: clips decoded ahead of the one asked for; by default two for every process.
        decode_threads: threads in a process.
        decoder: who tries a video first.
        child_command: what to start; the pipes' numbers and this process's id are appended.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        num_workers: int,
        timeout_s: float,
        max_clips_per_child: int = 200,
        max_child_rss: int = 2 * 2**30,
        max_clip_bytes: int = 4 * 2**30,
        max_waiting_bytes: int = 2 * 2**30,
        look_ahead: int | None = None,
        decode_threads: int = 1,
        decoder: DecoderChoice = "auto",
        child_command: Sequence[str] = CHILD_COMMAND,
    ) -> None:
        self._request = {
            "policy": policy.to_json(),
            "threads": decode_threads,
            "decoder": decoder,
            "max_bytes": max_clip_bytes,
        }
        self._limits = PumpLimits(
            num_workers=num_workers,
            timeout_s=timeout_s,
            max_clips_per_child=max_clips_per_child,
            max_child_rss=max_child_rss,
            max_clip_bytes=max_clip_bytes,
            max_waiting_bytes=max_waiting_bytes,
        )
        self._look_ahead = look_ahead or 2 * num_workers
        self._command = tuple(child_command)
        self._pump: Pump | None = None
        self._decoding = False

    def __enter__(self) -> Self:
        self._pump = Pump(self._command, self._limits)
        self._pump.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills all processes; a second call does nothing."""
        pump, self._pump = self._pump, None
        if pump is not None:
            pump.exchange.stop()
            pump.join()

    def decode(self, clips: Iterable[Clip]) -> Iterator[DecodedClip | Quarantined]:
        """One result for every clip, in the order of `clips`, which is read only as far as needed.

        Closing the iterator early, or any exception in the loop around it, kills all processes.

        Raises:
            DeltatokError: no decoding process can be started.
        """
        if self._pump is None or self._decoding:
            raise RuntimeError("decode() runs inside `with DecodePool(...)`, one call at a time")
        exchange, source = self._pump.exchange, iter(clips)
        self._decoding, finished = True, False
        try:
            ahead = deque(self._submit(exchange, source, self._look_ahead))
            while ahead:
                number, key = ahead.popleft()
                delivery = exchange.take(number)
                ahead += self._submit(exchange, source, 1)
                yield _result(key, delivery)
            finished = True
        finally:
            self._decoding = False
            if not finished:
                exchange.cancel()

    def _submit(
        self, exchange: Exchange, source: Iterator[Clip], count: int
    ) -> list[tuple[int, str]]:
        """Queues up to `count` more clips; gives their numbers and keys."""
        submitted = []
        for clip in islice(source, count):
            request = {
                "key": clip.key,
                "path": str(clip.path),
                "source": source_to_json(clip.source),
                "size_bytes": clip.size_bytes,
            }
            submitted.append((exchange.submit(self._request | request), clip.key))
        return submitted


def default_num_workers() -> int:
    """One for every CPU core this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _result(key: str, delivery: Result) -> DecodedClip | Quarantined:
    if isinstance(delivery, Quarantined):
        return delivery
    windows = [DecodedWindow(delivery.frames, rows, draw) for draw, rows in delivery.windows]
    return DecodedClip(key=key, decoder=delivery.decoder, windows=windows)
