"""Writes one patch-token shard: permute, check, convert, store whole, publish, promise.

Called by extract/ with the features of all windows of a shard's clips. Same rows, same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache import BLACK, PATCHES, CacheInfo, read_cache_info
from .dtypes import STORED_DTYPES
from .errors import CacheMismatch, DeltatokError, UsageError
from .files import partial_path, remove, write_bytes
from .npy import npy_bytes
from .patch_layout import TOKEN_ATTRIBUTES, TOKEN_AXES, TOKENS_CHUNK, WINDOW_ARRAYS, array_shapes
from .plan import window_order
from .publishing import publish_shard
from .records import DoneRecord, Quarantined, shard_path
from .token_encoder import EncodedTokens, encode_tokens


@dataclass(frozen=True, kw_only=True)
class PatchRows:
    """The W windows of one shard, in any order; T frames, N patches, D channels."""

    tokens: NDArray[Any]
    """float32 or float16 (W, T, N, D), finite."""
    timestamps_s: NDArray[np.float32]
    """float32 (W, T), seconds since the clip's first shown frame."""
    frame_index: NDArray[np.int32]
    """int32 (W, T), in presentation order."""
    crop: NDArray[np.float32]
    """float32 (W, 4): top, left, height, width in source pixels."""
    flipped: NDArray[np.bool_]
    """bool (W,)."""
    clip: NDArray[np.int32]
    """int32 (W,), index into keys."""
    keys: list[str]
    """The shard's clips that have windows."""


def write_patch_shard(
    folder: Path | str,
    shard: int,
    rows: PatchRows,
    *,
    dtype: str,
    seed: int,
    decoders: Mapping[str, str] | None = None,
    quarantined: Sequence[Quarantined] = (),
) -> DoneRecord:
    """Writes shards/NNNNNN.zarr and its done-record into the cache `folder`; gives the record.

    The windows are stored in the order `window_order(W, seed=seed, shard=shard)`. Whatever an
    earlier run left of this shard is replaced. Without windows only the done-record is written.

    Raises DeltatokError, naming the clip, for values that are not finite or do not fit float16;
    CacheMismatch for rows of another shape or dtype than the cache's.
    """
    folder = Path(folder)
    info = read_cache_info(folder, format=PATCHES)
    _check_rows(rows, info, dtype=dtype, where=f"{folder}: shard {shard:06d}")
    num_windows = len(rows.tokens)
    partial = partial_path(shard_path(folder, shard, ".zarr"))
    order = window_order(num_windows, seed=seed, shard=shard)
    encoded: EncodedTokens | None = None
    try:
        if num_windows:
            encoded = _encode(rows, order, dtype=dtype, shard=shard)
            attributes = _attributes(info, rows, shard=shard, dtype=dtype)
            _write_group(partial, encoded, rows, order, attributes=attributes)
    except BaseException:
        remove(partial)
        raise
    record = DoneRecord(
        shard=shard,
        keys=list(rows.keys),
        rows=num_windows,
        files={},
        statistics=encoded.statistics if encoded else {},
        decoders=dict(decoders or {}),
        quarantined=list(quarantined),
    )
    return publish_shard(folder, record, partial=partial, suffix=".zarr")


def write_black(folder: Path | str, tokens: NDArray[np.float32]) -> None:
    """Writes black.npy, float32 (N, D): the tokens of a black frame under this backbone."""
    folder = Path(folder)
    shape = read_cache_info(folder, format=PATCHES).shape
    if tokens.shape != (shape.num_tokens, shape.hidden_size) or not np.isfinite(tokens).all():
        raise CacheMismatch(
            f"{folder}: black-frame tokens of shape {tokens.shape}, wanted finite "
            f"({shape.num_tokens}, {shape.hidden_size}): use the backbone and frame size "
            "of the cache"
        )
    write_bytes(folder / BLACK, npy_bytes(tokens.astype("<f4")))


def _check_rows(rows: PatchRows, info: CacheInfo, *, dtype: str, where: str) -> None:
    if dtype not in STORED_DTYPES:
        raise UsageError(f"dtype {dtype!r}, wanted one of {', '.join(STORED_DTYPES)}")
    stored = info.identity.get("storage", {}).get("dtype", dtype)
    if dtype != stored:
        raise CacheMismatch(f"{where}: dtype {dtype}, cache.json says {stored}: use that one")
    shape = info.shape
    num_windows = len(rows.tokens)
    wanted = (num_windows, shape.num_frames, shape.num_tokens, shape.hidden_size)
    if rows.tokens.shape != wanted or rows.tokens.dtype not in (np.float32, np.float16):
        raise CacheMismatch(
            f"{where}: tokens {rows.tokens.dtype} {rows.tokens.shape}, wanted float32 or float16 "
            f"{wanted} as in cache.json: use the backbone and sampling the cache was made with"
        )
    for name, array_shape in array_shapes(num_windows, shape.num_frames).items():
        array: NDArray[Any] = getattr(rows, name)
        spec = WINDOW_ARRAYS[name]
        if array.shape != array_shape or array.dtype != spec.dtype:
            raise CacheMismatch(
                f"{where}: {name} is {array.dtype} {array.shape}, wanted {spec.dtype} {array_shape}"
            )
    if num_windows and not 0 <= rows.clip.min() <= rows.clip.max() < len(rows.keys):
        raise CacheMismatch(f"{where}: clip has an index outside of the {len(rows.keys)} keys")


def _attributes(info: CacheInfo, rows: PatchRows, *, shard: int, dtype: str) -> dict[str, Any]:
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


def _encode(rows: PatchRows, order: NDArray[np.intp], *, dtype: str, shard: int) -> EncodedTokens:
    clips = [rows.keys[clip] for clip in rows.clip]
    try:
        return encode_tokens(rows.tokens, order, dtype=dtype, clips=clips)
    except DeltatokError as error:
        raise DeltatokError(f"shard {shard:06d}: {error}") from error


def _write_group(
    path: Path,
    encoded: EncodedTokens,
    rows: PatchRows,
    order: NDArray[np.intp],
    *,
    attributes: dict[str, Any],
) -> None:
    # Imported here: readers do without zarr, and it takes a third of a second.
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    group = zarr.create_group(store=str(path), zarr_format=3, attributes=attributes)
    shape = rows.tokens.shape
    group.create_array(
        "tokens",
        shape=shape,
        dtype=STORED_DTYPES[attributes["logical_dtype"]],
        chunks=(1, 1, *shape[2:]),
        shards=shape,
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        fill_value=0,
        attributes={**TOKEN_ATTRIBUTES, "logical_dtype": attributes["logical_dtype"]},
        dimension_names=TOKEN_AXES,
    )
    tokens_path = path.joinpath("tokens", *TOKENS_CHUNK)
    tokens_path.parent.mkdir(parents=True)
    with tokens_path.open("xb") as file:
        file.write(encoded.data.data)
    for name, spec in WINDOW_ARRAYS.items():
        values = np.ascontiguousarray(getattr(rows, name)[order], dtype=spec.dtype)
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
