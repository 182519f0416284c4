"""Writes one patch-token shard: permute, check, convert, store whole, publish, promise.

    write_patch_shard    the rows of a shard -> shards/NNNNNN.zarr and its done-record
    encode_tokens        patch tokens -> the bytes of their one Zarr shard file, and statistics
    write_group          the Zarr v3 group around it, as `layout` draws it

Same rows, same bytes. The file of the tokens (T frames, N patches, D channels):

    W * T chunks, in C order     N * D numbers of a frame, little-endian, then their crc32c (4)
    index                        W * T pairs (offset, bytes) of uint64, then its crc32c (4)

With compression zstd a chunk is the numbers compressed, then the crc32c of that. int8 has a second
such file, uncompressed: N token scales a frame.

This is the standard `sharding_indexed` layout, which zarr and tensorstore read. It is assembled
here and not by zarr, whose encoder takes longer than all the rest together (256 frames of 256
tokens x 768 channels, 2 cores: 0.41 s of 0.75 s; this: 0.05 s), and so that checks, conversion,
statistics and checksums go over a window while it is in the processor's cache. zarr writes the
metadata and the small arrays.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ..cache import BLACK, PATCHES, CacheInfo, read_cache_info
from ..errors import CacheMismatch, DeltatokError, UsageError
from ..files import create_bytes, partial_path, remove
from ..npy import npy_bytes
from ..plan import window_order
from ..records import DoneRecord, commit_shard, shard_path
from ..windows import ShardRows, WindowColumns
from .int8 import MAX_NORMALISED, UNSTORABLE, dequantise, quantise, read_channel_scale
from .layout import (
    BFLOAT16_MAX,
    CHANNEL_SCALE_SPEC,
    FLOAT16_MAX,
    STORED_DTYPES,
    TOKEN_ATTRIBUTES,
    TOKEN_AXES,
    TOKEN_SCALE_SPEC,
    WINDOW_ARRAYS,
    ArraySpec,
    from_stored,
    only_chunk,
    to_stored,
)
from .zarr_arrays import LEVEL, check_compression, compress

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
MAX_THREADS = 4
"""Windows converted at once; NumPy leaves the interpreter lock (a guess)."""


FLOAT32_SQUARES_MAX = 2.0**48
"""Sums of squares of larger values (bfloat16 and int8 have them) may overflow float32."""

_LIMITS = {"float16": FLOAT16_MAX, "bfloat16": BFLOAT16_MAX}
_BFLOAT16_EXPONENT = np.uint16(0x7F80)
_ADVICE = {
    "float16": "run the backbone in float32, or store bfloat16",
    "bfloat16": "run the backbone in float32",
    "int8": "run the backbone in float32, or store bfloat16",
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
    """Writes shards/NNNNNN.zarr and its done-record into the cache `folder`; gives the record.

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
    partial = partial_path(shard_path(folder, shard, ".zarr"))
    order = window_order(num_windows, seed=seed, shard=shard)
    encoded: EncodedTokens | None = None
    try:
        if num_windows:
            storage = TokenStorage(
                dtype=dtype,
                compression=compression,
                channel_scale=read_channel_scale(folder, info) if dtype == "int8" else None,
            )
            clips = [rows.keys[clip] for clip in rows.clip]
            try:
                encoded = encode_tokens(
                    rows.tokens, order, storage=storage, clips=clips, token_scale=rows.token_scale
                )
            except DeltatokError as error:
                raise DeltatokError(f"shard {shard:06d}: {error}") from error
            attributes = _attributes(info, list(rows.keys), shard=shard, dtype=dtype)
            write_group(
                partial,
                encoded,
                rows.take(order),
                storage=storage,
                shape=rows.tokens.shape,
                attributes=attributes,
            )
    except BaseException:
        remove(partial)
        raise
    record = DoneRecord(
        shard=shard,
        keys=list(rows.keys),
        rows=num_windows,
        files={},
        statistics=encoded.statistics if encoded else {},
        decoders=dict(rows.decoders),
        quarantined=list(rows.quarantined),
    )
    return commit_shard(folder, record, partial=partial, suffix=".zarr")


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


def _check_tokens(rows: ShardRows, info: CacheInfo, *, dtype: str, where: str) -> None:
    tokens, token_scale = rows.tokens, rows.token_scale
    if dtype not in STORED_DTYPES:
        raise UsageError(f"dtype {dtype!r}, wanted one of {', '.join(STORED_DTYPES)}")
    stored = info.identity.get("storage", {}).get("dtype", dtype)
    if dtype != stored:
        raise CacheMismatch(f"{where}: dtype {dtype}, cache.json says {stored}: use that one")
    shape = info.shape
    wanted = (len(tokens), shape.num_frames, shape.num_tokens, shape.hidden_size)
    dtypes = {np.dtype(np.float32), np.dtype(np.float16), STORED_DTYPES[dtype]}
    if tokens.shape != wanted or tokens.dtype not in dtypes:
        raise CacheMismatch(
            f"{where}: tokens {tokens.dtype} {tokens.shape}, wanted "
            f"{' or '.join(sorted(map(str, dtypes)))} {wanted} as in cache.json: use the backbone "
            "and sampling the cache was made with"
        )
    if (token_scale is not None) != (tokens.dtype == np.int8):
        raise CacheMismatch(f"{where}: token_scale goes with int8 codes, and only with them")
    scale_shape = tokens.shape[:3]
    if token_scale is not None and (
        token_scale.shape != scale_shape or token_scale.dtype != np.float16
    ):
        raise CacheMismatch(
            f"{where}: token_scale is {token_scale.dtype} {token_scale.shape}, wanted float16 "
            f"{scale_shape}"
        )


def _attributes(info: CacheInfo, keys: list[str], *, shard: int, dtype: str) -> dict[str, Any]:
    return {
        "format": info.format,
        "format_version": info.format_version,
        "fingerprint": info.fingerprint,
        "licence": info.licence,
        "shard": shard,
        "logical_dtype": dtype,
        "grid": None if info.shape.grid is None else list(info.shape.grid),
        "keys": keys,
    }


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


def is_storable(window: NDArray[Any], *, dtype: str) -> bool:
    """Whether `dtype` holds every value of `window` (T, N, D); int8: of its codes."""
    if window.dtype == np.uint16:
        return not ((window & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any()
    if window.dtype == np.int8:
        return bool(window.min() != UNSTORABLE)
    # A NaN makes a comparison false. As Python's floats: no limit is rounded to float16.
    return -_LIMITS[dtype] <= float(window.min()) and float(window.max()) <= _LIMITS[dtype]


def count(
    window: NDArray[Any], dtype: str, channel_scale: NDArray[np.float32] | None
) -> tuple[int, int]:
    """How many values are not finite, and how many beyond the range of `dtype`.

    What the device converted tells only part: float16 infinity is a value beyond its range (those
    that were infinite before are NaN), an infinity in bfloat16 bits is not finite, and a code
    UNSTORABLE is counted as beyond the range.
    """
    if window.dtype == np.uint16:
        bad = (window & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT
        return int(np.count_nonzero(bad)), 0
    if window.dtype == np.int8:
        return 0, int(np.count_nonzero(window == UNSTORABLE))
    if window.dtype == np.float16 and dtype == "float16":
        return int(np.count_nonzero(np.isnan(window))), int(np.count_nonzero(np.isinf(window)))
    finite = np.isfinite(window)
    with np.errstate(invalid="ignore", over="ignore"):
        if channel_scale is None:
            large = finite & (np.abs(window) > _LIMITS[dtype])
        else:
            large = finite & (np.abs(window / channel_scale) > MAX_NORMALISED)
    return window.size - int(np.count_nonzero(finite)), int(np.count_nonzero(large))


def refuse(
    tokens: NDArray[Any],
    *,
    dtype: str,
    clips: Sequence[str],
    channel_scale: NDArray[np.float32] | None = None,
) -> NoReturn:
    """Raises DeltatokError with the counts of a whole shard (W, T, N, D), and the first clip.

    `clips`: the clip of every window. Called when a window was found that is not storable.
    """
    counts = [count(window, dtype, channel_scale) for window in tokens]
    touched = sorted({clip for clip, bad in zip(clips, counts, strict=True) if any(bad)})
    if not touched:
        raise DeltatokError("token scales of int8 codes that are not finite: quantise them again")
    num_not_finite, num_large = (sum(column) for column in zip(*counts, strict=True))
    others = f" and {len(touched) - 1} more" if len(touched) > 1 else ""
    range_of = f" (+-{_LIMITS[dtype]:g})" if dtype in _LIMITS else " with the scales of this cache"
    raise DeltatokError(
        f"clip {touched[0]!r}{others}: {num_not_finite} of the shard's {tokens.size} token values "
        f"are not finite and {num_large} beyond the range of {dtype}{range_of}: {_ADVICE[dtype]}"
    )


def write_group(
    path: Path,
    encoded: EncodedTokens,
    windows: WindowColumns,
    *,
    storage: TokenStorage,
    shape: tuple[int, ...],
    attributes: dict[str, Any],
) -> None:
    """Makes the folder `path`. `shape`: of the tokens, (W, T, N, D); `windows`: in the
    order of the file; `attributes`: of the group."""
    # Imported here: readers do without zarr, and it takes a third of a second.
    import zarr

    group = zarr.create_group(store=str(path), zarr_format=3, attributes=attributes)
    _write_sharded(
        group,
        path / "tokens",
        encoded.data,
        shape=shape,
        spec=ArraySpec(
            STORED_DTYPES[storage.dtype],
            TOKEN_AXES,
            {**TOKEN_ATTRIBUTES, "logical_dtype": storage.dtype},
        ),
        compression=storage.compression,
    )
    if encoded.token_scale_data is not None and storage.channel_scale is not None:
        _write_sharded(
            group,
            path / "token_scale",
            encoded.token_scale_data,
            shape=shape[:3],
            spec=TOKEN_SCALE_SPEC,
            compression="none",
        )
        _write_whole(group, "channel_scale", storage.channel_scale, CHANNEL_SCALE_SPEC)
    for name, spec in WINDOW_ARRAYS.items():
        _write_whole(group, name, getattr(windows, name), spec)


def _write_sharded(
    group: Any,
    folder: Path,
    data: NDArray[np.uint8],
    *,
    shape: tuple[int, ...],
    spec: ArraySpec,
    compression: str,
) -> None:
    """The array `folder` of the group, whose one Zarr shard is `data`."""
    from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

    group.create_array(
        folder.name,
        shape=shape,
        dtype=spec.dtype,
        chunks=(1, 1, *shape[2:]),
        shards=shape,
        filters=None,
        serializer=BytesCodec(endian="little" if spec.dtype.itemsize > 1 else None),
        compressors=[
            *([ZstdCodec(level=LEVEL)] if compression == "zstd" else []),
            Crc32cCodec(),
        ],
        fill_value=0,
        attributes=spec.attributes,
        dimension_names=spec.axes,
    )
    path = folder.joinpath(*only_chunk(len(shape)))
    path.parent.mkdir(parents=True)
    with path.open("xb") as file:
        file.write(data.data)


def _write_whole(group: Any, name: str, values: NDArray[Any], spec: ArraySpec) -> None:
    """An array of one chunk."""
    from zarr.codecs import BytesCodec, Crc32cCodec

    values = np.ascontiguousarray(values, dtype=spec.dtype)
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=values.shape,
        filters=None,
        serializer=BytesCodec(endian="little" if values.itemsize > 1 else None),
        compressors=[Crc32cCodec()],
        fill_value=False if values.dtype == np.bool_ else 0,
        attributes=spec.attributes,
        dimension_names=spec.axes,
        config={"write_empty_chunks": True},
    )
    array[...] = values
