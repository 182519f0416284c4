"""Windows out of blocks that are read whole, one after the other, into reused buffers.

What `residency: stream` reads with, in the order of stream_order.py: nearly every window of a block
that is read is used before the block is given up. Used by data.py.

Batches in memory that is used again, since fresh pages cost more than filling them.

A buffer is free again when nobody holds its tensor, or a view of it, any more: nothing has to be
given back, and no batch changes under anybody's hands. Used by sources.py and stream.py.
"""

import sys
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...shards.deltas.reader import DeltaShards
from ...shards.patches.reader import PatchShards
from .order import Indices

MAX_BUFFERS = 16
"""Kept; beyond that the one used longest ago is let go of (a guess)."""

_UNUSED = 3
"""References to a buffer that only the pool has: its list, a local name, getrefcount's argument."""


class BufferPool:
    """Hands out tensors of the shapes asked for. Any number of threads may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: list[NDArray[Any]] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        """A tensor of that shape in main memory, its contents anything."""
        with self._lock:
            for place in range(len(self._buffers)):
                buffer = self._buffers[place]
                fits = buffer.shape == shape and buffer.dtype == dtype
                if fits and sys.getrefcount(buffer) == _UNUSED:
                    self._buffers.append(self._buffers.pop(place))
                    return torch.from_numpy(buffer)
            buffer = np.empty(shape, dtype=dtype)
            self._buffers.append(buffer)
            del self._buffers[:-MAX_BUFFERS]
            return torch.from_numpy(buffer)

    def gather(self, source: Tensor, rows: Tensor) -> Tensor:
        """`source[rows]`, both in main memory; rows int64 (B,)."""
        dtype = np.dtype(str(source.dtype).removeprefix("torch."))
        out = self.take((len(rows), *source.shape[1:]), dtype)
        return torch.index_select(source, 0, rows, out=out)


GROUP_BYTES = 2**30
"""Of the blocks that are mixed with one another; twice as much is held (a guess)."""

PATCH_BLOCK_BYTES = 16 * 2**20
"""Of a block of a patch cache, about: as much at once as a disk needs to be fast (a guess)."""


class Blocks(Protocol):
    """A cache as blocks of windows. K arrays describe a window."""

    starts: Indices
    """int64 (blocks + 1,): number of the first window of every block, and the end."""
    row_bytes: int
    """Of one window."""

    def buffers(self, num_windows: int) -> list[Tensor]:
        """Room for so many windows: K tensors (num_windows, ...)."""

    def read(self, block: int, out: Sequence[Tensor]) -> None:
        """Fills `out`, K tensors (n, ...), with the n windows of the block."""


class DeltaBlocks:
    """The blocks of the tars: tokens float16 (n, T, D) and timestamps float32 (n, T)."""

    def __init__(self, shards: DeltaShards) -> None:
        self._shards = shards
        self.starts = shards.block_starts
        num_frames, size = shards.shape
        self.row_bytes = num_frames * (2 * size + 4)

    def buffers(self, num_windows: int) -> list[Tensor]:
        num_frames, size = self._shards.shape
        return [
            torch.empty((num_windows, num_frames, size), dtype=torch.float16),
            torch.empty((num_windows, num_frames), dtype=torch.float32),
        ]

    def read(self, block: int, out: Sequence[Tensor]) -> None:
        self._shards.read_block(block, out=out[0].numpy())
        windows = np.arange(self.starts[block], self.starts[block + 1])
        out[1].numpy()[...] = self._shards.timestamps_s(windows)


class PatchBlocks:
    """Runs of windows of a shard: tokens (n, T, N, D), float16 as stored, float32 of the others."""

    def __init__(self, shards: PatchShards) -> None:
        self._shards = shards
        self._raw = shards.dtype == "float16"
        self.row_bytes = int(np.prod(shards.shape)) * (2 if self._raw else 4)
        size = max(1, PATCH_BLOCK_BYTES // self.row_bytes)
        edges = shards.shard_starts
        runs = [np.arange(start, stop, size) for start, stop in pairwise(edges)]
        self.starts = np.concatenate([*runs, edges[-1:]]).astype(np.int64)

    def buffers(self, num_windows: int) -> list[Tensor]:
        dtype = torch.float16 if self._raw else torch.float32
        return [torch.empty((num_windows, *self._shards.shape), dtype=dtype)]

    def read(self, block: int, out: Sequence[Tensor]) -> None:
        windows = np.arange(self.starts[block], self.starts[block + 1])
        read = self._shards.stored_tokens if self._raw else self._shards.tokens
        read(windows, out=out[0].numpy())


class StreamRows:
    """Gathers windows; reads the blocks they lie in where they are not held yet.

    Right for any windows, fast in the order of StreamOrder. Threads wait for one another.
    """

    def __init__(self, blocks: Blocks, *, group_windows: int) -> None:
        """group_windows: as StreamOrder's; two groups are held, for a batch that needs both."""
        self._blocks = blocks
        sizes = np.diff(blocks.starts)
        self._slot_windows = int(sizes.max(initial=1))
        group_blocks = -(-group_windows // max(1, int(sizes.mean()) if len(sizes) else 1))
        self._num_slots = min(len(sizes), 2 * group_blocks + 2)
        self._buffers = blocks.buffers(self._num_slots * self._slot_windows)
        self._slot_of = np.full(len(sizes), -1, dtype=np.int64)
        self._pool = BufferPool()
        self._lock = threading.RLock()
        self._held: dict[int, int] = {}
        """Block -> slot, the one used longest ago first."""

    def __call__(self, windows: Indices) -> tuple[Tensor, ...]:
        """K tensors (B, ...), which nothing writes to while they are held."""
        with self._lock:
            return self._gather(windows)

    def _gather(self, windows: Indices) -> tuple[Tensor, ...]:
        blocks = np.searchsorted(self._blocks.starts, windows, side="right") - 1
        needed = np.unique(blocks)
        if len(needed) > self._num_slots:
            half = len(windows) // 2
            parts = zip(self._gather(windows[:half]), self._gather(windows[half:]), strict=True)
            return tuple(torch.cat(part) for part in parts)
        self._hold(needed)
        rows = self._slot_of[blocks] * self._slot_windows + windows - self._blocks.starts[blocks]
        chosen = torch.from_numpy(rows)
        return tuple(self._pool.gather(buffer, chosen) for buffer in self._buffers)

    def _hold(self, needed: Indices) -> None:
        for block in needed.tolist():
            if block in self._held:
                self._held[block] = self._held.pop(block)
        for block in needed.tolist():
            if block in self._held:
                continue
            slot = len(self._held)
            if slot == self._num_slots:
                oldest = next(iter(self._held))
                slot = self._held.pop(oldest)
                self._slot_of[oldest] = -1
            self._read(block, slot)
            self._held[block] = slot
            self._slot_of[block] = slot

    def _read(self, block: int, slot: int) -> None:
        size = int(self._blocks.starts[block + 1] - self._blocks.starts[block])
        first = slot * self._slot_windows
        self._blocks.read(block, [buffer[first : first + size] for buffer in self._buffers])


def windows_of_group(blocks: Blocks) -> int:
    """Windows of a group: as many as GROUP_BYTES hold, at least one."""
    return max(1, GROUP_BYTES // blocks.row_bytes)
