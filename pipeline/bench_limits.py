"""What no reader of a cache can beat: its files mapped raw, and read from end to end.

Used by bench.py and its benchmark.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..shards.patches import PatchShards

READ_BYTES = 8 * 2**20
"""Of one read of a file from end to end."""

Contestant = Callable[[int], int]
"""A step -> the windows (or pairs) that were read."""


class RawPatches:
    """The frames of a patch cache straight from the mapped files: no checks, what a reader of this
    format could reach. Only for caches whose frames are not compressed."""

    def __init__(self, shards: PatchShards) -> None:
        num_frames, num_tokens, size = shards.shape
        bytes_each = 1 if shards.dtype == "int8" else 2
        self.frame_bytes = num_tokens * size * bytes_each
        self._num_frames = num_frames
        self._starts = shards.shard_starts
        self.files = sorted(shards.folder.glob("shards/*.zarr/tokens/c/0/0/0/0"))
        counts = np.diff(self._starts) * num_frames
        sizes = [path.stat().st_size for path in self.files]
        # Frames of equal size with a checksum of 4 bytes each, then the index: 16 each, and 4.
        self.usable = sizes == [int(n) * (self.frame_bytes + 20) + 4 for n in counts]
        self._maps: dict[int, NDArray[np.uint8]] = {}

    def release(self) -> None:
        """Lets go of the mapped files."""
        self._maps.clear()

    def frame(self, window: int, frame: int) -> NDArray[np.uint8]:
        """uint8 (frame_bytes,), a view of the file."""
        shard = int(np.searchsorted(self._starts, window, side="right")) - 1
        number = (int(window) - int(self._starts[shard])) * self._num_frames + int(frame)
        start = number * (self.frame_bytes + 4)
        mapped = self._maps.get(shard)
        if mapped is None:
            mapped = self._maps[shard] = np.memmap(self.files[shard], dtype=np.uint8, mode="r")
        return mapped[start : start + self.frame_bytes]


def drop_files(folder: Path, suffix: str) -> None:
    """Has the system forget the contents of the shards' files, as far as it does (POSIX)."""
    for path in _data_files(folder, suffix):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_disk(folder: Path, suffix: str, *, window_bytes: float) -> Contestant:
    """Reads the files from end to end; gives as many windows as their bytes would be."""
    chunks = _chunks(list(_data_files(folder, suffix)))
    buffer = np.empty(READ_BYTES, dtype=np.uint8)
    carried = 0.0

    def read(step: int) -> int:
        nonlocal carried
        path, offset = next(chunks)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            count = os.preadv(descriptor, [buffer.data], offset)
        finally:
            os.close(descriptor)
        carried += count / window_bytes
        whole, carried = int(carried), carried % 1
        return whole

    return read


def _chunks(paths: Sequence[Path]) -> Iterator[tuple[Path, int]]:
    while True:
        for path in paths:
            for offset in range(0, path.stat().st_size, READ_BYTES):
                yield path, offset


def _data_files(folder: Path, suffix: str) -> Iterator[Path]:
    if suffix:
        yield from sorted(folder.glob(f"shards/*{suffix}"))
    else:
        yield from sorted(folder.glob("shards/*.zarr/tokens/c/0/0/0/0"))
