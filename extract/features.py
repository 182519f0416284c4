"""Windows of pixels in, rows for a writer out, in batches of one fixed shape.

A product of matrices rounds differently in another batch shape. So every batch holds the same
number of windows, the last one of a shard is filled up with zeros, and no batch spans two shards:
a shard's bytes depend on its own clips only, whenever and after whichever kill it is made.
Called by making.py.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .backbone import Backbone
from .writer import Converter


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
        self._on_the_way: _OnTheWay | None = None
        self._arrived: list[NDArray[Any]] = []

    def add(self, pixels: Tensor) -> None:
        """Takes the next window of the shard, uint8 (T, 3, S, S) on the backbone's device."""
        self._batch[self._filled] = pixels
        self._filled += 1
        if self._filled == len(self._batch):
            self._run()

    def finish(self) -> NDArray[Any]:
        """The rows (W, ...) of all windows since the last call, in the order they were added."""
        nothing_yet = self._on_the_way is None and not self._arrived
        if self._filled or nothing_yet:  # without any windows: empty rows of the right shape
            self._run()
        self._collect()
        parts, self._arrived = self._arrived[::-1], []
        rows = np.empty((sum(map(len, parts)), *parts[-1].shape[1:]), dtype=parts[-1].dtype)
        start = 0
        while parts:  # each part is let go of once it is copied: a shard is a gigabyte
            part = parts.pop()
            rows[start : start + len(part)] = part
            start += len(part)
        return rows

    def discard(self) -> None:
        """Forgets the windows since the last `finish`."""
        self._filled, self._on_the_way, self._arrived = 0, None, []

    @torch.inference_mode()
    def _run(self) -> None:
        """Starts the batch; the rows of the one before are fetched meanwhile."""
        self._batch[self._filled :] = 0
        tokens = self._backbone.tokens(self._batch.flatten(0, 1))
        windows = tokens.reshape(len(self._batch), self._num_frames, *tokens.shape[1:])
        rows = self._writer.convert(windows)[: self._filled]
        self._filled = 0
        before, self._on_the_way = self._on_the_way, _OnTheWay(rows)
        if before is not None:
            self._arrived.append(before.fetch())

    def _collect(self) -> None:
        if self._on_the_way is not None:
            self._arrived.append(self._on_the_way.fetch())
            self._on_the_way = None


class _OnTheWay:
    """Rows being copied from the device: asked for at once, waited for later, so that the device
    has the next batch to work on meanwhile."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if rows.device.type == "cuda":
            stream = torch.cuda.current_stream(rows.device)
            self._copied = stream.record_event()

    def fetch(self) -> NDArray[Any]:
        if self._copied is not None:
            self._copied.synchronize()
        return np.array(self._rows.numpy())
