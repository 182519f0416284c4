"""Decoded windows -> pixels, made ahead -> tokens, in batches of one shape -> rows for a writer.

A product of matrices rounds differently in another batch shape. So every batch holds the same
number of windows, the last one of a shard is filled up with zeros, and no batch spans two shards:
a shard's bytes depend on its own clips only, whenever and after whichever kill it is made.

On a GPU a thread crops into pinned memory and has the device resize and flip on a stream of its
own, a batch or so ahead, also across the ends of shards, while the main thread feeds the backbone.
On the CPU there is nothing to gain: the same cores would do both, so pixels are made when they are
asked for.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..shards.evaluation.geometry import FrameSize
from ..shards.records import Quarantined
from ..shards.sampling import WindowDraw
from .backbone import Backbone
from .config import ExtractConfig
from .decoding.clip import DecodedClip
from .pixels import window_pixels
from .shard_writer import Converter

MAX_BATCHES_IN_FLIGHT = 2
"""Batches whose rows are being copied from the device while the next one is begun."""

Rows = Callable[[], NDArray[Any]]
"""Gives the rows of a shard, once, from any thread; waits for them."""

Pixels = Callable[[], Tensor]
"""Gives a window's pixels, uint8 (T, 3, H, W) on the device; to be called once."""


class PixelPrefetcher:
    """Makes pixels on `device`; a context manager, which ends its thread."""

    def __init__(self, *, frame_size: FrameSize, device: torch.device, num_ahead: int) -> None:
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

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._room.release()  # the thread may be waiting for it
            self._thread.shutdown()

    def clips(
        self, decoded: Iterator[DecodedClip | Quarantined]
    ) -> Iterator[tuple[DecodedClip | Quarantined, deque[Pixels]]]:
        """The clips of `decoded`, in order, read ahead as far as pixels are to be made; with each
        the pixels of its windows instead of its frames."""
        ahead: deque[tuple[DecodedClip | Quarantined, deque[Pixels]]] = deque()
        num_after_first = 0
        for clip in decoded:
            pixels: deque[Pixels] = deque()
            if isinstance(clip, DecodedClip):
                pixels.extend(self._begin(clip, window) for window in clip.windows)
                clip = replace(clip, frames={})  # they go when their pixels are made
            num_after_first += len(pixels) if ahead else 0
            ahead.append((clip, pixels))
            while ahead and num_after_first >= self._num_ahead:
                yield ahead.popleft()
                num_after_first -= len(ahead[0][1]) if ahead else 0
        yield from ahead

    def _begin(self, clip: DecodedClip, window: WindowDraw) -> Pixels:
        if self._thread is None:
            return lambda: self._make(clip, window)
        future = self._thread.submit(self._make_ahead, clip, window)

        def take() -> Tensor:
            pixels, copied = future.result()
            self._room.release()
            if copied is not None:
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(copied)
                pixels.record_stream(stream)
            return pixels

        return take

    def _make_ahead(
        self, clip: DecodedClip, window: WindowDraw
    ) -> tuple[Tensor, torch.cuda.Event | None]:
        self._room.acquire()
        if self._stream is None:
            return self._make(clip, window), None
        with torch.cuda.stream(self._stream):
            return self._make(clip, window), self._stream.record_event()

    def _make(self, clip: DecodedClip, window: WindowDraw) -> Tensor:
        return window_pixels(
            clip.frames_of(window), window, frame_size=self._frame_size, device=self._device
        )


class WindowFeatures:
    """Collects the windows of one shard after the other. T frames of H x W pixels."""

    def __init__(self, backbone: Backbone, writer: Converter, config: ExtractConfig) -> None:
        """A batch holds whole windows, at least one; about `config.frames_per_batch` frames."""
        self._backbone = backbone
        self._writer = writer
        self._num_frames = config.num_frames
        batch_frames = config.frames_per_batch(backbone.device.type)
        batch_windows = max(1, batch_frames // self._num_frames)
        shape = (batch_windows, self._num_frames, 3, *config.frame_shape)
        self._batch = torch.zeros(shape, dtype=torch.uint8, device=backbone.device)
        self._filled = 0
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._parts: deque[Future[NDArray[Any]]] = deque()

    def add(self, pixels: Tensor) -> None:
        """Takes the next window of the shard, uint8 (T, 3, H, W) on the backbone's device."""
        self._batch[self._filled] = pixels
        self._filled += 1
        if self._filled == len(self._batch):
            self._run()

    def finish(self) -> NDArray[Any]:
        """The rows (W, ...) of all windows since the last call, in the order they were added."""
        return self.finish_later()()

    def finish_later(self) -> Rows:
        """As `finish`, without waiting for the device: the next shard can be begun meanwhile."""
        if self._filled or not self._parts:  # without any windows: empty rows of the right shape
            self._run()
        parts, self._parts = self._parts, deque()
        return lambda: _join(parts)

    @torch.inference_mode()
    def _run(self) -> None:
        """Starts the batch; the rows of those before are fetched meanwhile, only so many."""
        self._batch[self._filled :] = 0
        tokens = self._backbone.tokens(self._batch.flatten(0, 1))
        windows = tokens.reshape(len(self._batch), self._num_frames, *tokens.shape[1:])
        rows = self._writer.convert(windows)[: self._filled]
        self._filled = 0
        self._parts.append(self._fetcher.submit(_RowsInFlight(rows).fetch))
        if len(self._parts) > MAX_BATCHES_IN_FLIGHT:
            self._parts[-1 - MAX_BATCHES_IN_FLIGHT].result()


def _join(parts: deque[Future[NDArray[Any]]]) -> NDArray[Any]:
    first = parts[0].result()
    rows = np.empty((sum(len(part.result()) for part in parts), *first.shape[1:]), first.dtype)
    start = 0
    del first
    while parts:  # each part is let go of once it is copied: a shard is a gigabyte
        part = parts.popleft().result()
        rows[start : start + len(part)] = part
        start += len(part)
    return rows


class _RowsInFlight:
    """Rows being copied from the device: asked for at once, waited for later, so that the device
    has the next batch to work on meanwhile."""

    def __init__(self, rows: Tensor) -> None:
        # From a GPU this goes to pinned memory, which torch keeps for the next copy of that size.
        self._rows = rows.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if rows.device.type == "cuda":
            stream = torch.cuda.current_stream(rows.device)
            self._copied = stream.record_event()

    def fetch(self) -> NDArray[Any]:
        if self._copied is not None:
            self._copied.synchronize()
        return np.array(self._rows.numpy())
