"""Windows of pixels in, rows for a writer out, in batches of one fixed shape.

A product of matrices rounds differently in another batch shape. So every batch holds the same
number of windows, the last one of a shard is filled up with zeros, and no batch spans two shards:
a shard's bytes depend on its own clips only, whenever and after whichever kill it is made.
Called by making.py.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .backbone import Backbone
from .shard_writer import Converter

MAX_ON_THE_WAY = 2
"""Batches whose rows are being copied from the device while the next one is begun."""

Rows = Callable[[], NDArray[Any]]
"""Gives the rows of a shard, once, from any thread; waits for them."""


class WindowFeatures:
    """Collects the windows of one shard after the other. T frames, S pixels a side."""

    def __init__(
        self,
        backbone: Backbone,
        writer: Converter,
        *,
        num_frames: int,
        frame_size: int,
        batch_frames: int,
    ) -> None:
        """batch_frames: about how many frames go through the backbone at once; a batch holds
        whole windows, at least one."""
        self._backbone = backbone
        self._writer = writer
        self._num_frames = num_frames
        batch_windows = max(1, batch_frames // num_frames)
        shape = (batch_windows, num_frames, 3, frame_size, frame_size)
        self._batch = torch.zeros(shape, dtype=torch.uint8, device=backbone.device)
        self._filled = 0
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._parts: deque[Future[NDArray[Any]]] = deque()

    def add(self, pixels: Tensor) -> None:
        """Takes the next window of the shard, uint8 (T, 3, S, S) on the backbone's device."""
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
        self._parts.append(self._fetcher.submit(_OnTheWay(rows).fetch))
        if len(self._parts) > MAX_ON_THE_WAY:
            self._parts[-1 - MAX_ON_THE_WAY].result()


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


class _OnTheWay:
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
