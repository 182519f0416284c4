"""Patch tokens -> the bytes of their one Zarr shard file, and the statistics of what is stored.

    W * T chunks, in C order     N * D numbers of a frame, little-endian, then their crc32c (4)
    index                        W * T pairs (offset, bytes) of uint64, then its crc32c (4)

With compression zstd a chunk is the numbers compressed, then the crc32c of that. int8 has a second
such file, uncompressed: N token scales a frame.

This is the standard `sharding_indexed` layout, which zarr and tensorstore read. It is assembled
here and not by zarr, whose encoder takes longer than all the rest together (256 frames of 256
tokens x 768 channels, 2 cores: 0.41 s of 0.75 s; this: 0.05 s), and so that checks, conversion,
statistics and checksums go over a window while it is in the processor's cache.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from .dtypes import FLOAT16_MAX, STORED_DTYPES, from_stored, to_stored
from .int8 import dequantise, quantise
from .storable import is_storable, refuse
from .zstd import compress

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
MAX_THREADS = 4
"""Windows converted at once; NumPy leaves the interpreter lock (a guess)."""


FLOAT32_SQUARES_MAX = 2.0**48
"""Sums of squares of larger values (bfloat16 and int8 have them) may overflow float32."""


@dataclass(frozen=True, kw_only=True)
class TokenStorage:
    """How the tokens of a shard are stored."""

    dtype: str
    """A key of STORED_DTYPES."""
    compression: str = "none"
    """One of COMPRESSIONS."""
    channel_scale: NDArray[np.float32] | None = None
    """float32 (D,), with int8 only."""


@dataclass(frozen=True, kw_only=True)
class EncodedTokens:
    """A Zarr shard file in memory."""

    data: NDArray[np.uint8]
    """uint8 (bytes of the file,)."""
    token_scale_data: NDArray[np.uint8] | None
    """The file of the token scales, with int8 only."""
    statistics: dict[str, Any]
    """Of all stored values: channel_mean and channel_std (lists of D floats), abs_max, and
    beyond_float16, how many float16 could not hold."""


class _UnstorableError(Exception):
    """Raised in a writing thread, caught by `encode_tokens`, which counts."""


def encode_tokens(
    tokens: NDArray[Any],
    order: NDArray[np.intp],
    *,
    storage: TokenStorage,
    clips: Sequence[str],
    token_scale: NDArray[np.float16] | None = None,
) -> EncodedTokens:
    """The shard file of `tokens[order]`, (W, T, N, D), W > 0.

    tokens: float32 or float16, or as stored already: bfloat16 bits in uint16, int8 codes with
    their `token_scale`, float16 (W, T, N). `clips`: the clip of every window, for messages. Raises
    DeltatokError for values that are not finite or do not fit the dtype. Takes the memory of the
    file and little more (twice that with compression).
    """
    try:
        return _Encoder(tokens, token_scale, storage).encode(order)
    except _UnstorableError:
        refuse(tokens, dtype=storage.dtype, clips=clips, channel_scale=storage.channel_scale)


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Of one window, over frames and patches, around the shift."""

    values: NDArray[np.float64]
    squares: NDArray[np.float64]
    abs_max: float
    beyond_float16: int


class _Encoder:
    """One shard on its way from the tokens of its windows to its file."""

    def __init__(
        self,
        tokens: NDArray[Any],
        token_scale: NDArray[np.float16] | None,
        storage: TokenStorage,
    ) -> None:
        self._tokens = tokens
        self._token_scale = token_scale
        self._storage = storage
        self._num_chunks = tokens.shape[0] * tokens.shape[1]
        self._scales = np.empty(tokens.shape[:3], dtype=np.float16)
        stored = STORED_DTYPES[storage.dtype]
        self._chunk_bytes = tokens.shape[2] * tokens.shape[3] * stored.itemsize + CRC_BYTES
        self._plain = storage.compression == "none"
        num_bytes = self._num_chunks * (self._chunk_bytes + INDEX_ENTRY_BYTES) + CRC_BYTES
        self._data = np.empty(num_bytes if self._plain else 0, dtype=np.uint8)
        self._compressed = [self._data] * (0 if self._plain else self._num_chunks)
        self._shift = np.zeros(tokens.shape[3], dtype=np.float32)

    def encode(self, order: NDArray[np.intp]) -> EncodedTokens:
        """The file of the windows in this order."""
        # Sums around the mean of one frame: outlier channels keep their digits.
        first = np.empty(self._tokens.shape[2:], dtype=np.float32)
        self._decode(*self._store(int(order[0]), 0), out=first)
        self._shift = first.mean(axis=0, dtype=np.float64).astype(np.float32)
        with ThreadPoolExecutor(max_workers=min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            sums = list(pool.map(self._encode_window, order.tolist(), range(len(order))))
        if self._plain:
            data, sizes = self._data, [self._chunk_bytes] * self._num_chunks
            data[-self._num_chunks * INDEX_ENTRY_BYTES - CRC_BYTES :] = _index(sizes)
        else:
            sizes = [chunk.nbytes for chunk in self._compressed]
            data = np.concatenate([*self._compressed, _index(sizes)])
        return EncodedTokens(
            data=data,
            token_scale_data=self._token_scale_file(),
            statistics=_statistics(
                sums, self._shift, count=self._num_chunks * self._tokens.shape[2]
            ),
        )

    def _encode_window(self, source: int, target: int) -> _Sums:
        """Fills the chunks of window `target` of the file from `source` of the rows."""
        num_channels = self._tokens.shape[3]
        values = np.empty(self._tokens.shape[2:], dtype=np.float32)
        sums = np.zeros(num_channels, dtype=np.float64)
        squares = np.zeros(num_channels, dtype=np.float64)
        abs_max, beyond_float16 = 0.0, 0
        for frame in range(self._tokens.shape[1]):
            stored, scale = self._store(source, frame)
            self._put(target * self._tokens.shape[1] + frame, stored.reshape(-1).view(np.uint8))
            if scale is not None:
                self._scales[target, frame] = scale
            self._decode(stored, scale, out=values)
            frame_max = max(float(values.max()), -float(values.min()))
            abs_max = max(abs_max, frame_max)
            if frame_max > FLOAT16_MAX:
                beyond_float16 += int(np.count_nonzero(np.abs(values) > FLOAT16_MAX))
            centred: NDArray[Any] = values
            if frame_max > FLOAT32_SQUARES_MAX:
                centred = values.astype(np.float64)
            centred -= self._shift
            sums += centred.sum(axis=0)
            squares += np.einsum("nd,nd->d", centred, centred)
        return _Sums(values=sums, squares=squares, abs_max=abs_max, beyond_float16=beyond_float16)

    def _store(self, window: int, frame: int) -> tuple[NDArray[Any], NDArray[np.float16] | None]:
        """A frame (N, D) as stored, C-contiguous, and its token scales (N,)."""
        tokens, scale = self._tokens[window, frame], None
        if self._token_scale is not None:
            scale = self._token_scale[window, frame]
        elif self._storage.channel_scale is not None:
            tokens, scale = quantise(tokens, self._storage.channel_scale)
        usable = scale is None or bool(np.isfinite(scale).all())
        if not usable or not is_storable(tokens, dtype=self._storage.dtype):
            raise _UnstorableError
        return np.ascontiguousarray(to_stored(tokens, self._storage.dtype)), scale

    def _decode(
        self,
        stored: NDArray[Any],
        scale: NDArray[np.float16] | None,
        *,
        out: NDArray[np.float32],
    ) -> None:
        if scale is None or self._storage.channel_scale is None:
            from_stored(stored, self._storage.dtype, out=out)
        else:
            dequantise(stored, scale, self._storage.channel_scale, out=out)

    def _put(self, number: int, numbers: NDArray[np.uint8]) -> None:
        """Stores the bytes of a frame, uint8 (n,), as chunk `number`."""
        if self._plain:
            chunk = self._data[number * self._chunk_bytes : (number + 1) * self._chunk_bytes]
            chunk[:-CRC_BYTES] = numbers
            chunk[-CRC_BYTES:] = _crc32c(numbers)
        else:
            packed = compress(numbers)
            self._compressed[number] = np.concatenate([packed, _crc32c(packed)])

    def _token_scale_file(self) -> NDArray[np.uint8] | None:
        if self._storage.channel_scale is None:
            return None
        chunks = self._scales.reshape(self._num_chunks, -1).astype("<f2").view(np.uint8)
        sizes = [chunks.shape[1] + CRC_BYTES] * self._num_chunks
        parts = [part for chunk in chunks for part in (chunk, _crc32c(chunk))]
        return np.concatenate([*parts, _index(sizes)])


def _index(sizes: Sequence[int]) -> NDArray[np.uint8]:
    """The index of chunks of these sizes that follow one another, with its checksum."""
    index = np.empty((len(sizes), 2), dtype="<u8")
    index[:, 1] = sizes
    index[:, 0] = np.cumsum(index[:, 1]) - index[:, 1]
    data = index.reshape(-1).view(np.uint8)
    return np.concatenate([data, _crc32c(data)])


def _statistics(sums: Sequence[_Sums], shift: NDArray[np.float32], *, count: int) -> dict[str, Any]:
    mean = sum((window.values for window in sums), np.zeros(len(shift))) / count
    square = sum((window.squares for window in sums), np.zeros(len(shift))) / count
    std = np.sqrt(np.maximum(square - mean * mean, 0.0))
    return {
        "channel_mean": [float(value) for value in (mean + shift).astype(np.float32)],
        "channel_std": [float(value) for value in std.astype(np.float32)],
        "abs_max": max(window.abs_max for window in sums),
        "beyond_float16": sum(window.beyond_float16 for window in sums),
    }


def _crc32c(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.array([google_crc32c.value(data)], dtype="<u4").view(np.uint8)
