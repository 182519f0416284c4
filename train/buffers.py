"""Batches in memory that is used again, since fresh pages cost more than filling them.

A buffer is free again when nobody holds its tensor, or a view of it, any more: nothing has to be
given back, and no batch changes under anybody's hands. Used by sources.py and stream.py.
"""

import sys
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
