"""Writes the Zarr v3 group of a patch-token shard, as `patch_layout` draws it.

zarr writes the metadata and the small arrays; the bytes of the tokens come from `token_encoder`.
Called by `patch_writer`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import STORED_DTYPES
from .patch_layout import (
    CHANNEL_SCALE_SPEC,
    TOKEN_ATTRIBUTES,
    TOKEN_AXES,
    TOKEN_SCALE_SPEC,
    WINDOW_ARRAYS,
    ArraySpec,
    only_chunk,
)
from .token_encoder import EncodedTokens, TokenStorage
from .zstd import LEVEL


def write_group(
    path: Path,
    encoded: EncodedTokens,
    columns: Mapping[str, NDArray[Any]],
    *,
    storage: TokenStorage,
    shape: tuple[int, ...],
    attributes: dict[str, Any],
) -> None:
    """Makes the folder `path`. `shape`: of the tokens, (W, T, N, D); `columns`: the arrays of
    WINDOW_ARRAYS in the order of the file; `attributes`: of the group."""
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
        _write_whole(group, name, columns[name], spec)


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
