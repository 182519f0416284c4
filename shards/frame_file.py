"""Reads a patch-token shard frame by frame: positions from its index, bytes by
preadv straight into the caller's array. Used by `token_reader`.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DamagedShard
from .patch_layout import only_chunk
from .zarr_map import ADVICE, CRC_BYTES, ReadOnlyFile, check_crc, check_metadata
from .zstd import decompress

MAX_STRETCH = 256
"""Frames in one read: two buffers each, of which a system takes 1,024 at once."""

_INDEX_ENTRY_BYTES = 16


class FrameFile:
    """An array of one shard that is read frame by frame: dtype (W, T, ...)."""

    def __init__(
        self,
        group: Path,
        name: str,
        *,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        check_once: bool = False,
    ) -> None:
        """check_once: hold each frame against its checksum when it is read first, not every time;
        compressed ones always."""
        inner = (1, 1, *shape[2:])
        self.compression = check_metadata(group / name, shape=shape, dtype=dtype, inner=inner)
        self.path = group.joinpath(name, *only_chunk(len(shape)))
        self._frame_bytes = math.prod(shape[2:]) * dtype.itemsize
        self._offsets, self._sizes = self._read_index((shape[0], shape[1]))
        self._checked: NDArray[np.bool_] | None = None
        if check_once:  # threads may set it at once: at worst a frame is checked twice
            self._checked = np.zeros(shape[:2], dtype=np.bool_)
        self._unread = np.empty((shape[1], CRC_BYTES), dtype=np.uint8)
        chunk_bytes = self._frame_bytes + CRC_BYTES
        steps = np.diff(self._offsets, axis=1)
        self._in_order = bool((steps == chunk_bytes).all())
        """Whether the frames of every window lie one after the other."""

    def open(self) -> ReadOnlyFile:
        """The data file, to be passed to `read_frames`."""
        return ReadOnlyFile(self.path)

    def read_frames(
        self, file: ReadOnlyFile, window: int, frames: Sequence[int], *, out: NDArray[np.uint8]
    ) -> None:
        """Fills `out`, uint8 (len(frames), frame_bytes), C-contiguous.

        Frames that follow one another are one read. Raises DamagedShard on a wrong checksum: of
        every frame, or with `check_once` of each when it is read first.
        """
        if self.compression != "none":
            for row, frame in enumerate(frames):
                self._read_compressed(file, window, frame, out=out[row])
            return
        at = 0
        for first, count in _stretches(frames):
            self._read_stretch(file, window, first, out=out[at : at + count])
            at += count

    def _read_stretch(
        self, file: ReadOnlyFile, window: int, first: int, *, out: NDArray[np.uint8]
    ) -> None:
        """The frames from `first` on; the chunks of a window lie one after the other."""
        count = len(out)
        if count > 1 and not self._in_order:  # another writer's order
            for row in range(count):
                self._read_stretch(file, window, first + row, out=out[row : row + 1])
            return
        checked = self._checked
        if checked is not None and checked[window, first : first + count].all():
            crcs = self._unread[:count]  # whatever is written there, nobody reads it
        else:
            crcs, checked = np.empty((count, CRC_BYTES), dtype=np.uint8), None
        buffers = [buffer for pair in zip(out, crcs, strict=True) for buffer in pair]
        file.read_into(buffers, int(self._offsets[window, first]))
        if checked is not None:
            return
        for row in range(count):
            where = f"{self.path}: window {window}, frame {first + row}"
            check_crc(out[row], crcs[row], where=where)
        if self._checked is not None:
            self._checked[window, first : first + count] = True

    def _read_compressed(
        self, file: ReadOnlyFile, window: int, frame: int, *, out: NDArray[np.uint8]
    ) -> None:
        crc = np.empty(CRC_BYTES, dtype=np.uint8)
        stored = np.empty(int(self._sizes[window, frame]) - CRC_BYTES, dtype=np.uint8)
        file.read_into([stored, crc], int(self._offsets[window, frame]))
        where = f"{self.path}: window {window}, frame {frame}"
        check_crc(stored, crc, where=where)
        decompress(stored, out=out, where=where)

    def _read_index(self, shape: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each chunk starts and how long it is, int64 (W, T) each."""
        num_entries = shape[0] * shape[1]
        file = self.open()
        end_of_data = file.size() - num_entries * _INDEX_ENTRY_BYTES - CRC_BYTES
        chunk_bytes = self._frame_bytes + CRC_BYTES
        plain = self.compression == "none"
        if end_of_data < 0 or (plain and end_of_data != num_entries * chunk_bytes):
            wanted = num_entries * (chunk_bytes + _INDEX_ENTRY_BYTES) + CRC_BYTES
            raise DamagedShard(f"{self.path}: {file.size()} bytes, wanted {wanted}: {ADVICE}")
        # Only now: a made-up shape could ask for terabytes.
        index = np.empty(num_entries * _INDEX_ENTRY_BYTES, dtype=np.uint8)
        crc = np.empty(CRC_BYTES, dtype=np.uint8)
        file.read_into([index, crc], end_of_data)
        check_crc(index, crc, where=f"{self.path}: index")
        entries = index.view("<u8").reshape(num_entries, 2)
        if not _cover(entries, end_of_data) or (plain and (entries[:, 1] != chunk_bytes).any()):
            raise DamagedShard(f"{self.path}: the index does not cover the file: {ADVICE}")
        offsets, sizes = entries.astype(np.int64).reshape(*shape, 2).transpose(2, 0, 1)
        return offsets, sizes


def _stretches(frames: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of every stretch of numbers that follow one another, MAX_STRETCH at most."""
    first, count = frames[0], 0
    for frame in frames:
        if frame != first + count or count == MAX_STRETCH:
            yield first, count
            first, count = frame, 0
        count += 1
    yield first, count


def _cover(entries: NDArray[np.uint64], end: int) -> bool:
    """Whether the chunks (offset, bytes), uint64 (C, 2), follow one another from 0 to `end`."""
    if (entries > end).any() or (entries[:, 1] <= CRC_BYTES).any():
        return False
    in_order = entries[np.argsort(entries[:, 0])].astype(np.int64)
    ends = np.cumsum(in_order[:, 1])
    return bool(ends[-1] == end and np.array_equal(in_order[:, 0], ends - in_order[:, 1]))
