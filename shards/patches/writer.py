"""Writes one patch-token shard: permute, check, convert, store whole, publish, promise.

    write_patch_shard    the rows of a shard -> shards/NNNNNN.zarr.zip and its done-record
    _Encoder             patch tokens -> the bytes of their one Zarr shard file
    _write_group         the Zarr v3 group around it, in a zip, as `layout` draws it

Same rows, same bytes. The file of the tokens (T frames, N patches, D channels):

    W * T chunks, in C order     N * D numbers of a frame, little-endian, then their crc32c (4)
    index                        W * T pairs (offset, bytes) of uint64, then its crc32c (4)

With compression zstd a chunk is the numbers compressed, then the crc32c of that. int8 has a second
such file, uncompressed: N token scales a frame.

This is the standard `sharding_indexed` layout, which zarr and tensorstore read. It is assembled
here and not by zarr, whose encoder takes longer than all the rest together (256 frames of 256
tokens x 768 channels, 2 cores: 0.41 s of 0.75 s; this: 0.05 s), and so that checks, conversion and
checksums go over a window while it is in the processor's cache. zarr writes the metadata and the
small arrays.
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import BLACK, PATCHES, CacheInfo, read_cache_info
from ..errors import CacheMismatch, DeltatokError
from ..files import create_bytes, partial_path, remove
from ..npy import npy_bytes
from ..plan import window_order
from ..records import DoneRecord, commit_shard, shard_path
from ..stores.upload import top_changed
from ..windows import ShardRows, WindowColumns
from .archive import write_archive
from .int8 import UNSTORABLE, dequantise, quantise, read_channel_scale
from .layout import (
    BFLOAT16_MAX,
    CHANNEL_SCALE_SPEC,
    FLOAT16_MAX,
    STORED_DTYPES,
    SUFFIX,
    TOKEN_ATTRIBUTES,
    TOKEN_AXES,
    TOKEN_SCALE_CHUNK,
    TOKEN_SCALE_SPEC,
    TOKENS_CHUNK,
    WINDOW_ARRAYS,
    ArraySpec,
    from_stored,
    member_names,
    to_stored,
)
from .zarr_arrays import LEVEL, check_compression, compress

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
MAX_THREADS = 4
"""Windows converted at once; NumPy leaves the interpreter lock (a guess)."""


_LIMITS = {"float16": FLOAT16_MAX, "bfloat16": BFLOAT16_MAX}
_BFLOAT16_EXPONENT = np.uint16(0x7F80)
_RANGES = {
    "float16": f" (+-{FLOAT16_MAX:g})",
    "bfloat16": f" (+-{BFLOAT16_MAX:g})",
    "int8": " with the scales of this cache",
}


def write_patch_shard(
    folder: Path | str,
    shard: int,
    rows: ShardRows,
    *,
    dtype: str,
    seed: int,
    compression: str = "none",
) -> DoneRecord:
    """Writes shards/NNNNNN.zarr.zip and its done-record into the cache `folder`; gives the record.

    The windows are stored in the order `window_order(W, seed=seed, shard=shard)`. Whatever an
    earlier run left of this shard is replaced. Without windows only the done-record is written.
    int8 takes the channel scales from channel_scale.npy.

    Raises DeltatokError, naming the clip, for values that are not finite or do not fit the dtype;
    CacheMismatch for rows of another shape or dtype than the cache's.
    """
    folder = Path(folder)
    info = read_cache_info(folder, format=PATCHES)
    check_compression(compression)
    where, num_windows = f"{folder}: shard {shard:06d}", len(rows.tokens)
    _check_tokens(rows, info, dtype=dtype, where=where)
    rows.check_columns(num_windows=num_windows, num_frames=info.shape.num_frames, where=where)
    partial = partial_path(shard_path(folder, shard, SUFFIX))
    order = window_order(num_windows, seed=seed, shard=shard)
    abs_max, beyond_float16 = 0.0, 0
    try:
        if num_windows:
            scale = read_channel_scale(folder, info) if dtype == "int8" else None
            encoder = _Encoder(
                rows, dtype=dtype, compression=compression, channel_scale=scale, where=where
            )
            encoder.encode(order)
            abs_max, beyond_float16 = encoder.abs_max, encoder.beyond_float16
            _write_group(partial, encoder, rows.take(order), _attributes(info, rows, shard, dtype))
    except BaseException:
        remove(partial)
        raise
    record = rows.record(shard, abs_max=abs_max, beyond_float16=beyond_float16)
    return commit_shard(folder, record, partial=partial, suffix=SUFFIX)


def write_black(folder: Path | str, tokens: NDArray[np.float32]) -> None:
    """Writes black.npy, float32 (N, D): the tokens of a black frame under this backbone; one that
    another process has just written stays."""
    folder = Path(folder)
    shape = read_cache_info(folder, format=PATCHES).shape
    if tokens.shape != (shape.num_tokens, shape.hidden_size) or not np.isfinite(tokens).all():
        raise CacheMismatch(
            f"{folder}: black-frame tokens of shape {tokens.shape}, wanted finite "
            f"({shape.num_tokens}, {shape.hidden_size}): use the backbone and frame size "
            "of the cache"
        )
    create_bytes(folder / BLACK, npy_bytes(tokens.astype("<f4")))
    top_changed(folder, BLACK)


def _check_tokens(rows: ShardRows, info: CacheInfo, *, dtype: str, where: str) -> None:
    tokens, shape = rows.tokens, info.shape
    stored = info.identity.get("storage", {}).get("dtype", dtype)
    if dtype != stored:
        raise CacheMismatch(f"{where}: dtype {dtype}, cache.json says {stored}: use that one")
    wanted = (len(tokens), shape.num_frames, shape.num_tokens, shape.hidden_size)
    dtypes = {np.dtype(np.float32), np.dtype(np.float16), STORED_DTYPES[dtype]}
    if tokens.shape != wanted or tokens.dtype not in dtypes:
        raise CacheMismatch(
            f"{where}: tokens {tokens.dtype} {tokens.shape}, wanted "
            f"{' or '.join(sorted(map(str, dtypes)))} {wanted} as in cache.json: use the backbone "
            "and sampling the cache was made with"
        )


def _attributes(info: CacheInfo, rows: ShardRows, shard: int, dtype: str) -> dict[str, Any]:
    return {
        "format": info.format,
        "format_version": info.format_version,
        "fingerprint": info.fingerprint,
        "licence": info.licence,
        "shard": shard,
        "logical_dtype": dtype,
        "grid": None if info.shape.grid is None else list(info.shape.grid),
        "keys": list(rows.keys),
    }


class _Encoder:
    """The tokens of a shard, (W, T, N, D), W > 0, on their way to the bytes of their Zarr shard.

    Takes the memory of the file and little more (twice that with compression).
    """

    data: NDArray[np.uint8]
    """uint8 (bytes of the file,)."""
    token_scale_data: NDArray[np.uint8] | None = None
    """The file of the token scales, with int8 only."""
    abs_max: float
    """The largest absolute value that is stored."""
    beyond_float16: int
    """How many of the stored values float16 could not hold."""

    def __init__(
        self,
        rows: ShardRows,
        *,
        dtype: str,
        compression: str,
        channel_scale: NDArray[np.float32] | None,
        where: str,
    ) -> None:
        """channel_scale: float32 (D,), with int8 only. where: for messages."""
        self._where, self._clips = where, [rows.keys[clip] for clip in rows.clip]
        self.dtype, self.compression, self.channel_scale = dtype, compression, channel_scale
        self._tokens, self._token_scale = rows.tokens, rows.token_scale
        self.shape: tuple[int, ...] = rows.tokens.shape
        self._num_chunks = self.shape[0] * self.shape[1]
        self._scales = np.empty(self.shape[:3], dtype=np.float16)
        self._chunk_bytes = math.prod(self.shape[2:]) * STORED_DTYPES[dtype].itemsize + CRC_BYTES
        self._plain = compression == "none"
        num_bytes = self._num_chunks * (self._chunk_bytes + INDEX_ENTRY_BYTES) + CRC_BYTES
        self.data = np.empty(num_bytes if self._plain else 0, dtype=np.uint8)
        self._compressed = [self.data] * (0 if self._plain else self._num_chunks)

    def encode(self, order: NDArray[np.intp]) -> None:
        """Makes the file of the windows in this order."""
        with ThreadPoolExecutor(max_workers=min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            found = list(pool.map(self._encode_window, order.tolist(), range(len(order))))
        self.abs_max = max(largest for largest, _ in found)
        self.beyond_float16 = sum(count for _, count in found)
        if self._plain:
            index = _index([self._chunk_bytes] * self._num_chunks)
            self.data[-index.size :] = index
        else:
            index = _index([chunk.nbytes for chunk in self._compressed])
            self.data = np.concatenate([*self._compressed, index])
        if self.channel_scale is not None:
            chunks = self._scales.reshape(self._num_chunks, -1).astype("<f2").view(np.uint8)
            parts = [part for chunk in chunks for part in (chunk, _crc32c(chunk))]
            index = _index([chunks.shape[1] + CRC_BYTES] * self._num_chunks)
            self.token_scale_data = np.concatenate([*parts, index])

    def _encode_window(self, source: int, target: int) -> tuple[float, int]:
        """Fills the chunks of window `target` of the file from `source` of the rows; gives its
        largest absolute value and how many float16 could not hold."""
        values = np.empty(self.shape[2:], dtype=np.float32)
        abs_max, beyond_float16 = 0.0, 0
        for frame in range(self.shape[1]):
            stored, scale = self._store(source, frame)
            self._put(target * self.shape[1] + frame, stored.reshape(-1).view(np.uint8))
            if scale is not None:
                self._scales[target, frame] = scale
            self._decode(stored, scale, out=values)
            frame_max = max(float(values.max()), -float(values.min()))
            abs_max = max(abs_max, frame_max)
            if frame_max > FLOAT16_MAX:
                beyond_float16 += int(np.count_nonzero(np.abs(values) > FLOAT16_MAX))
        return abs_max, beyond_float16

    def _store(self, window: int, frame: int) -> tuple[NDArray[Any], NDArray[np.float16] | None]:
        """A frame (N, D) as stored, C-contiguous, and its token scales (N,)."""
        tokens, scale = self._tokens[window, frame], None
        if self._token_scale is not None:
            scale = self._token_scale[window, frame]
        elif self.channel_scale is not None:
            tokens, scale = quantise(tokens, self.channel_scale)
        usable = scale is None or bool(np.isfinite(scale).all())
        if not usable or not is_storable(tokens, dtype=self.dtype):
            raise DeltatokError(
                f"{self._where}: clip {self._clips[window]!r}: token values that are not finite or "
                f"beyond the range of {self.dtype}{_RANGES[self.dtype]}: run the backbone in "
                f"float32{'' if self.dtype == 'bfloat16' else ', or store bfloat16'}"
            )
        return np.ascontiguousarray(to_stored(tokens, self.dtype)), scale

    def _decode(
        self,
        stored: NDArray[Any],
        scale: NDArray[np.float16] | None,
        *,
        out: NDArray[np.float32],
    ) -> None:
        if scale is None or self.channel_scale is None:
            from_stored(stored, self.dtype, out=out)
        else:
            dequantise(stored, scale, self.channel_scale, out=out)

    def _put(self, number: int, numbers: NDArray[np.uint8]) -> None:
        """Stores the bytes of a frame, uint8 (n,), as chunk `number`."""
        if self._plain:
            chunk = self.data[number * self._chunk_bytes : (number + 1) * self._chunk_bytes]
            chunk[:-CRC_BYTES] = numbers
            chunk[-CRC_BYTES:] = _crc32c(numbers)
        else:
            packed = compress(numbers)
            self._compressed[number] = np.concatenate([packed, _crc32c(packed)])


def _index(sizes: Sequence[int]) -> NDArray[np.uint8]:
    """The index of chunks of these sizes that follow one another, with its checksum."""
    index = np.empty((len(sizes), 2), dtype="<u8")
    index[:, 1] = sizes
    index[:, 0] = np.cumsum(index[:, 1]) - index[:, 1]
    data = index.reshape(-1).view(np.uint8)
    return np.concatenate([data, _crc32c(data)])


def _crc32c(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import google_crc32c  # by the first chunk, as in zarr_arrays.py

    return np.array([google_crc32c.value(data)], dtype="<u4").view(np.uint8)


def is_storable(window: NDArray[Any], *, dtype: str) -> bool:
    """Whether `dtype` holds every value of `window` (T, N, D); int8: of its codes."""
    if window.dtype == np.uint16:
        return not ((window & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any()
    if window.dtype == np.int8:
        return bool(window.min() != UNSTORABLE)
    # A NaN makes a comparison false. As Python's floats: no limit is rounded to float16.
    return -_LIMITS[dtype] <= float(window.min()) and float(window.max()) <= _LIMITS[dtype]


def _write_group(
    path: Path, encoder: _Encoder, windows: WindowColumns, attributes: dict[str, Any]
) -> None:
    """Writes the zip `path` of the Zarr v3 group; `windows`: in the order of the file."""
    # Imported here: readers do without zarr, and it takes a third of a second.
    import zarr

    members: dict[str, Any] = {}
    store = zarr.storage.MemoryStore(members)
    group = zarr.create_group(store=store, zarr_format=3, attributes=attributes)
    tokens = ArraySpec(
        STORED_DTYPES[encoder.dtype],
        TOKEN_AXES,
        {**TOKEN_ATTRIBUTES, "logical_dtype": encoder.dtype},
    )
    _create_sharded(group, "tokens", tokens, encoder.shape, compression=encoder.compression)
    if encoder.channel_scale is not None:
        _create_sharded(group, "token_scale", TOKEN_SCALE_SPEC, encoder.shape[:3])
        _write_whole(group, "channel_scale", encoder.channel_scale, CHANNEL_SCALE_SPEC)
    for name, spec in WINDOW_ARRAYS.items():
        _write_whole(group, name, getattr(windows, name), spec)
    data = {name: member.to_bytes() for name, member in members.items()}
    data[TOKENS_CHUNK] = encoder.data.data
    if encoder.token_scale_data is not None:
        data[TOKEN_SCALE_CHUNK] = encoder.token_scale_data.data
    names = member_names(encoder.dtype)
    with path.open("xb") as file:
        write_archive(file, ((name, data.pop(name)) for name in names), last=TOKENS_CHUNK)
    if data:
        raise AssertionError(f"zarr wrote {sorted(data)}, which no shard has")


def _create_sharded(
    group: Any, name: str, spec: ArraySpec, shape: tuple[int, ...], *, compression: str = "none"
) -> None:
    """An array of one Zarr shard, a chunk a frame, that is still to be written."""
    chunks = (1, 1, *shape[2:])
    _create(group, name, spec, compression, shape=shape, chunks=chunks, shards=shape)


def _write_whole(group: Any, name: str, values: NDArray[Any], spec: ArraySpec) -> None:
    """An array of one chunk."""
    shape, config = values.shape, {"write_empty_chunks": True}
    array = _create(group, name, spec, "none", shape=shape, chunks=shape, config=config)
    array[...] = np.ascontiguousarray(values, dtype=spec.dtype)


def _create(group: Any, name: str, spec: ArraySpec, compression: str, **layout: Any) -> Any:
    """An empty array of the group."""
    from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

    return group.create_array(
        name,
        dtype=spec.dtype,
        filters=None,
        serializer=BytesCodec(endian="little" if spec.dtype.itemsize > 1 else None),
        compressors=[*([ZstdCodec(level=LEVEL)] if compression == "zstd" else []), Crc32cCodec()],
        fill_value=False if spec.dtype == np.bool_ else 0,
        attributes=spec.attributes,
        dimension_names=spec.axes,
        **layout,
    )
