"""Patch tokens -> the bytes of their one Zarr shard file, and the statistics of what is stored.

    W * T chunks, in C order     N * D numbers of a frame, little-endian, then their crc32c (4)
    index                        W * T pairs (offset, bytes) of uint64, then its crc32c (4)

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

from .dtypes import BFLOAT16_MAX, FLOAT16_MAX, STORED_DTYPES, from_stored, to_stored
from .errors import DeltatokError

CRC_BYTES = 4
MAX_THREADS = 4
"""Windows converted at once; NumPy leaves the interpreter lock (a guess)."""


FLOAT32_SQUARES_MAX = 2.0**48
"""Sums of squares of larger values (only bfloat16 has them) may overflow float32."""


@dataclass(frozen=True, kw_only=True)
class EncodedTokens:
    """A Zarr shard file in memory."""

    data: NDArray[np.uint8]
    """uint8 (bytes of the file,)."""
    statistics: dict[str, Any]
    """Of all stored values: channel_mean and channel_std (lists of D floats), abs_max."""


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Of one window, over frames and patches, around `shift`."""

    values: NDArray[np.float64]
    squares: NDArray[np.float64]
    abs_max: float


def encode_tokens(
    tokens: NDArray[Any], order: NDArray[np.intp], *, dtype: str, clips: Sequence[str]
) -> EncodedTokens:
    """The shard file of `tokens[order]`; tokens: float32 or float16 (W, T, N, D), W > 0.

    `clips`: the clip of every window, for messages. Raises DeltatokError for values that are not
    finite or do not fit `dtype`. Takes the memory of the file and little more.
    """
    num_windows, num_frames, num_tokens, num_channels = tokens.shape
    stored_dtype = STORED_DTYPES[dtype]
    frame_bytes = num_tokens * num_channels * stored_dtype.itemsize
    num_chunks = num_windows * num_frames
    data = np.empty(num_chunks * (frame_bytes + CRC_BYTES + 16) + CRC_BYTES, dtype=np.uint8)
    chunks = data[: num_chunks * (frame_bytes + CRC_BYTES)]
    chunks = chunks.reshape(num_windows, num_frames, frame_bytes + CRC_BYTES)
    _check_values(tokens[order[0]], dtype=dtype, clip=clips[order[0]])
    # Sums around the mean of one frame: outlier channels keep their digits.
    first_frame = from_stored(to_stored(tokens[order[0], 0], dtype), dtype)
    shift = first_frame.mean(axis=0, dtype=np.float64).astype(np.float32)

    def encode(target: int) -> _Sums:
        source = int(order[target])
        _check_values(tokens[source], dtype=dtype, clip=clips[source])
        return _encode_window(tokens[source], chunks[target], dtype=dtype, shift=shift)

    with ThreadPoolExecutor(max_workers=min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        sums = list(pool.map(encode, range(num_windows)))
    _fill_index(data[chunks.size :], num_chunks=num_chunks, chunk_bytes=frame_bytes + CRC_BYTES)
    return EncodedTokens(
        data=data, statistics=_statistics(sums, shift, count=num_chunks * num_tokens)
    )


def _encode_window(
    window: NDArray[Any], chunks: NDArray[np.uint8], *, dtype: str, shift: NDArray[np.float32]
) -> _Sums:
    """Fills `chunks`, uint8 (T, bytes of a chunk), from `window` (T, N, D)."""
    values = np.empty(window.shape[1:], dtype=np.float32)
    sums = np.zeros(window.shape[-1], dtype=np.float64)
    squares = np.zeros(window.shape[-1], dtype=np.float64)
    abs_max = 0.0
    for frame, chunk in zip(window, chunks, strict=True):
        numbers, crc = chunk[:-CRC_BYTES], chunk[-CRC_BYTES:]
        stored = np.ascontiguousarray(to_stored(frame, dtype))
        numbers[:] = stored.reshape(-1).view(np.uint8)
        crc[:] = _crc32c(numbers)
        from_stored(stored, dtype, out=values)
        frame_max = max(float(values.max()), -float(values.min()))
        abs_max = max(abs_max, frame_max)
        centred: NDArray[Any] = values
        if frame_max > FLOAT32_SQUARES_MAX:
            centred = values.astype(np.float64)
        centred -= shift
        sums += centred.sum(axis=0)
        squares += np.einsum("nd,nd->d", centred, centred)
    return _Sums(values=sums, squares=squares, abs_max=abs_max)


def _fill_index(out: NDArray[np.uint8], *, num_chunks: int, chunk_bytes: int) -> None:
    index = np.empty((num_chunks, 2), dtype="<u8")
    index[:, 0] = np.arange(num_chunks, dtype=np.uint64) * np.uint64(chunk_bytes)
    index[:, 1] = chunk_bytes
    out[:-CRC_BYTES] = index.reshape(-1).view(np.uint8)
    out[-CRC_BYTES:] = _crc32c(out[:-CRC_BYTES])


def _statistics(sums: Sequence[_Sums], shift: NDArray[np.float32], *, count: int) -> dict[str, Any]:
    mean = sum((window.values for window in sums), np.zeros(len(shift))) / count
    square = sum((window.squares for window in sums), np.zeros(len(shift))) / count
    std = np.sqrt(np.maximum(square - mean * mean, 0.0))
    return {
        "channel_mean": [float(value) for value in (mean + shift).astype(np.float32)],
        "channel_std": [float(value) for value in std.astype(np.float32)],
        "abs_max": max(window.abs_max for window in sums),
    }


def _check_values(window: NDArray[Any], *, dtype: str, clip: str) -> None:
    limit = FLOAT16_MAX if dtype == "float16" else BFLOAT16_MAX
    # A NaN makes a comparison false.
    if -limit <= window.min() and window.max() <= limit:
        return
    finite = np.isfinite(window)
    num_not_finite = window.size - int(np.count_nonzero(finite))
    num_large = int(np.count_nonzero(np.abs(window[finite]) > limit))
    raise DeltatokError(
        f"clip {clip!r}: {num_not_finite} of {window.size} token values are not finite and "
        f"{num_large} beyond the range of {dtype} (+-{limit:g}): run the backbone in float32, "
        "or store bfloat16"
    )


def _crc32c(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.array([google_crc32c.value(data)], dtype="<u4").view(np.uint8)
