"""Windows of decoded clips on their way to the backbone: pixels are made ahead of it.

On a GPU a thread crops into pinned memory and has the device resize and flip on a stream of its
own, a batch or so ahead, also across the ends of shards, while the main thread feeds the backbone.
On the CPU there is nothing to gain: the same cores would do both, so pixels are made when they are
asked for. Called by shard_rows.py.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ..shards.records import Quarantined
from .pixels import window_pixels
from .pool import DecodedClip, DecodedWindow
from .sampling import WindowDraw

Pixels = Callable[[], Tensor]
"""Gives a window's pixels, uint8 (T, 3, S, S) on the device; to be called once."""


@dataclass(frozen=True)
class StagedClip:
    """A clip whose pixels are being made."""

    key: str
    decoder: str
    draws: list[WindowDraw]
    pixels: deque[Pixels]
    """One for every draw, to be taken in order."""


class PixelStage:
    """Makes pixels on `device`; a context manager, which ends its thread."""

    def __init__(self, *, frame_size: int, device: torch.device, num_ahead: int) -> None:
        """num_ahead: windows to make before they are asked for; 0: none, and no thread."""
        self._frame_size = frame_size
        self._device = device
        self._num_ahead = num_ahead
        self._room = threading.Semaphore(num_ahead)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pixels") if num_ahead else None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._room.release()  # the thread may be waiting for it
            self._thread.shutdown()

    def clips(
        self, decoded: Iterator[DecodedClip | Quarantined]
    ) -> Iterator[StagedClip | Quarantined]:
        """The clips of `decoded`, in order, read ahead as far as pixels are to be made."""
        ahead: deque[StagedClip | Quarantined] = deque()
        num_after_first = 0
        for clip in decoded:
            staged = clip if isinstance(clip, Quarantined) else self._stage(clip)
            num_after_first += _num_windows(staged) if ahead else 0
            ahead.append(staged)
            while ahead and num_after_first >= self._num_ahead:
                yield ahead.popleft()
                num_after_first -= _num_windows(ahead[0]) if ahead else 0
        yield from ahead

    def _stage(self, clip: DecodedClip) -> StagedClip:
        draws = [window.draw for window in clip.windows]
        pixels = deque(self._begin(window) for window in clip.windows)
        return StagedClip(clip.key, clip.decoder, draws, pixels)

    def _begin(self, window: DecodedWindow) -> Pixels:
        if self._thread is None:
            return lambda: self._make(window)
        future = self._thread.submit(self._make_ahead, window)

        def take() -> Tensor:
            pixels, copied = future.result()
            self._room.release()
            if copied is not None:
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(copied)
                pixels.record_stream(stream)
            return pixels

        return take

    def _make_ahead(self, window: DecodedWindow) -> tuple[Tensor, torch.cuda.Event | None]:
        self._room.acquire()
        if self._stream is None:
            return self._make(window), None
        with torch.cuda.stream(self._stream):
            return self._make(window), self._stream.record_event()

    def _make(self, window: DecodedWindow) -> Tensor:
        return window_pixels(
            window.frames, window.draw, frame_size=self._frame_size, device=self._device
        )


def _num_windows(clip: StagedClip | Quarantined) -> int:
    return 0 if isinstance(clip, Quarantined) else len(clip.pixels)
