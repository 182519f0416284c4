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
from .files import create_bytes, partial_path, remove
from .int8 import read_channel_scale
from .npy import npy_bytes
from .patch_group import write_group
from .patch_layout import WINDOW_ARRAYS, array_shapes
from .plan import window_order
from .publishing import publish_shard
from .records import DoneRecord, Quarantined, shard_path
from .token_encoder import EncodedTokens, TokenStorage, encode_tokens
from .zstd import check_compression


@dataclass(frozen=True, kw_only=True)
class PatchRows:
    """The W windows of one shard, in any order; T frames, N patches, D channels."""

    tokens: NDArray[Any]
    """float32 or float16 (W, T, N, D), finite; or as they are to be stored: uint16 bits for
    bfloat16, int8 codes for int8 (see `int8`)."""
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
    token_scale: NDArray[np.float16] | None = None
    """float16 (W, T, N), with int8 codes only."""


def write_patch_shard(
    folder: Path | str,
    shard: int,
    rows: PatchRows,
    *,
    dtype: str,
    seed: int,
    compression: str = "none",
    decoders: Mapping[str, str] | None = None,
    quarantined: Sequence[Quarantined] = (),
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
    _check_rows(rows, info, dtype=dtype, where=f"{folder}: shard {shard:06d}")
    num_windows = len(rows.tokens)
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
            encoded = _encode(rows, order, storage=storage, shard=shard)
            columns = {name: getattr(rows, name)[order] for name in WINDOW_ARRAYS}
            attributes = _attributes(info, rows, shard=shard, dtype=dtype)
            write_group(
                partial,
                encoded,
                columns,
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
        decoders=dict(decoders or {}),
        quarantined=list(quarantined),
    )
    return publish_shard(folder, record, partial=partial, suffix=".zarr")


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


def _check_rows(rows: PatchRows, info: CacheInfo, *, dtype: str, where: str) -> None:
    if dtype not in STORED_DTYPES:
        raise UsageError(f"dtype {dtype!r}, wanted one of {', '.join(STORED_DTYPES)}")
    stored = info.identity.get("storage", {}).get("dtype", dtype)
    if dtype != stored:
        raise CacheMismatch(f"{where}: dtype {dtype}, cache.json says {stored}: use that one")
    shape = info.shape
    num_windows = len(rows.tokens)
    wanted = (num_windows, shape.num_frames, shape.num_tokens, shape.hidden_size)
    dtypes = {np.dtype(np.float32), np.dtype(np.float16), STORED_DTYPES[dtype]}
    if rows.tokens.shape != wanted or rows.tokens.dtype not in dtypes:
        raise CacheMismatch(
            f"{where}: tokens {rows.tokens.dtype} {rows.tokens.shape}, wanted "
            f"{' or '.join(sorted(map(str, dtypes)))} {wanted} as in cache.json: use the backbone "
            "and sampling the cache was made with"
        )
    _check_token_scale(rows, where=where)
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


def _check_token_scale(rows: PatchRows, *, where: str) -> None:
    scale, shape = rows.token_scale, rows.tokens.shape[:3]
    if (scale is not None) != (rows.tokens.dtype == np.int8):
        raise CacheMismatch(f"{where}: token_scale goes with int8 codes, and only with them")
    if scale is not None and (scale.shape != shape or scale.dtype != np.float16):
        raise CacheMismatch(
            f"{where}: token_scale is {scale.dtype} {scale.shape}, wanted float16 {shape}"
        )


def _encode(
    rows: PatchRows, order: NDArray[np.intp], *, storage: TokenStorage, shard: int
) -> EncodedTokens:
    clips = [rows.keys[clip] for clip in rows.clip]
    try:
        return encode_tokens(
            rows.tokens, order, storage=storage, clips=clips, token_scale=rows.token_scale
        )
    except DeltatokError as error:
        raise DeltatokError(f"shard {shard:06d}: {error}") from error
