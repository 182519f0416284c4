"""Memory that batches are read into again and again, and windows out of blocks that are read whole.

`BufferRing` hands out a fixed number of buffers in turn, since fresh pages cost more than filling
them. `StreamRows` is what `residency: stream` reads with, in the order of order.StreamOrder: nearly
every window of a block that is read is used before the block is given up.
"""

import math
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...shards.deltas.reader import DeltaShards
from ...shards.patches.reader import PatchShards
from .order import Indices

Take = Callable[[tuple[int, ...], np.dtype[Any]], Tensor]
"""Shape and dtype -> a tensor in main memory, its contents anything."""

DEPTH = 2
"""Batches that are read ahead: one hides a steady reader, a second its stutters (a guess)."""
NUM_BUFFERS = DEPTH + 1
"""Batches in use at once: one is computed on, the others wait."""


def fresh(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
    """A `Take` of memory that nobody else has."""
    return torch.from_numpy(np.empty(shape, dtype=dtype))


class BufferRing:
    """`count` buffers in main memory, handed out in turn: what was taken stays as it is until
    `count` further ones are taken. Any number of threads may take.

    A buffer grows to the largest batch that was read into it, and is never given back.
    """

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._buffers = [np.empty(0, dtype=np.uint8) for _ in range(count)]
        self._next = 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        """The next one, as a tensor of that shape."""
        size_bytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            place = self._next
            self._next = (place + 1) % len(self._buffers)
            if self._buffers[place].nbytes < size_bytes:
                self._buffers[place] = np.empty(size_bytes, dtype=np.uint8)
            buffer = self._buffers[place]
        return torch.from_numpy(buffer[:size_bytes].view(dtype).reshape(shape))


def gather(source: Tensor, rows: Tensor, take: Take) -> Tensor:
    """`source[rows]`, both in main memory; rows int64 (B,)."""
    dtype = np.dtype(str(source.dtype).removeprefix("torch."))
    out = take((len(rows), *source.shape[1:]), dtype)
    return torch.index_select(source, 0, rows, out=out)


GROUP_BYTES = 2**30
"""Of the blocks that are mixed with one another; twice as much is held (a guess)."""

PATCH_BLOCK_BYTES = 16 * 2**20
"""Of a block of a patch cache, about: as much at once as a disk needs to be fast (a guess)."""


class DeltaBlocks:
    """The blocks of the tars: tokens float16 (n, T, D) and timestamps float32 (n, T)."""

    def __init__(self, shards: DeltaShards) -> None:
        self._shards = shards
        self.starts: Indices = shards.block_starts
        """int64 (blocks + 1,): number of the first window of every block, and the end."""
        num_frames, size = shards.shape
        self.row_bytes = num_frames * (2 * size + 4)
        """Of one window."""

    def buffers(self, num_windows: int) -> list[Tensor]:
        """Room for so many windows: a tensor (num_windows, ...) for each array of a window."""
        num_frames, size = self._shards.shape
        return [
            torch.empty((num_windows, num_frames, size), dtype=torch.float16),
            torch.empty((num_windows, num_frames), dtype=torch.float32),
        ]

    def read(self, block: int, out: Sequence[Tensor]) -> None:
        """Fills `out`, such tensors (n, ...), with the n windows of the block."""
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


Blocks = DeltaBlocks | PatchBlocks
"""A cache as blocks of windows. K arrays describe a window."""


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
        self._lock = threading.RLock()
        self._held: dict[int, int] = {}
        """Block -> slot, the one used longest ago first."""

    def __call__(self, windows: Indices, take: Take = fresh) -> tuple[Tensor, ...]:
        """K tensors (B, ...)."""
        with self._lock:
            return self._gather(windows, take)

    def _gather(self, windows: Indices, take: Take) -> tuple[Tensor, ...]:
        blocks = np.searchsorted(self._blocks.starts, windows, side="right") - 1
        needed = np.unique(blocks)
        if len(needed) > self._num_slots:
            half = len(windows) // 2
            parts = zip(
                self._gather(windows[:half], fresh),
                self._gather(windows[half:], fresh),
                strict=True,
            )
            return tuple(torch.cat(part) for part in parts)
        self._hold(needed)
        rows = self._slot_of[blocks] * self._slot_windows + windows - self._blocks.starts[blocks]
        chosen = torch.from_numpy(rows)
        return tuple(gather(buffer, chosen, take) for buffer in self._buffers)

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
