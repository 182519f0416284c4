"""Everything in a patch-token cache but the tokens: one row a window, and black.npy.

Read by `patches` (all shards, on first use) and by `contents` (shard by shard).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import CacheInfo
from ..errors import CacheMismatch, DamagedShard
from ..npy import read_npy
from ..opening import OpenedCache
from ..records import DoneRecord, shard_path
from ..schema import read_file
from .layout import STORED_DTYPES, WINDOW_ARRAYS, array_shapes
from .zarr_arrays import ADVICE, read_array, read_attributes

MAX_BLACK_BYTES = 2**30
"""Of black.npy: one frame in float32 (a guess)."""


@dataclass(frozen=True, kw_only=True)
class WindowTable:
    """What is known of every window of a cache beside its tokens (shapes as in PatchRows)."""

    timestamps_s: NDArray[np.float32]
    frame_index: NDArray[np.int32]
    crop: NDArray[np.float32]
    flipped: NDArray[np.bool_]
    clip: NDArray[np.int64]
    """int64 (W,), index into PatchShards.keys."""


def logical_dtype(info: CacheInfo) -> str:
    """How the tokens are stored, a key of STORED_DTYPES; CacheMismatch for another."""
    storage = info.identity.get("storage")
    dtype = storage.get("dtype") if isinstance(storage, dict) else None
    if not isinstance(dtype, str) or dtype not in STORED_DTYPES:
        raise CacheMismatch(
            f"cache.json: identity.storage.dtype is {dtype!r}, this release reads "
            f"{', '.join(STORED_DTYPES)}: update deltatok, or extract again"
        )
    return dtype


def read_table(cache: OpenedCache) -> WindowTable:
    """The table of all shards of a cache, in shard order."""
    num_frames = cache.info.shape.num_frames
    columns: dict[str, list[NDArray[Any]]] = {
        name: [np.empty(shape, dtype=WINDOW_ARRAYS[name].dtype)]
        for name, shape in array_shapes(0, num_frames).items()
    }
    for record, first_key in zip(cache.records, cache.first_keys(), strict=True):
        group = shard_path(cache.folder, record.shard, ".zarr")
        check_attributes(group, record, cache.info)
        table = read_shard_table(group, record, num_frames)
        table["clip"] = table["clip"].astype(np.int64) + first_key
        for name, values in table.items():
            columns[name].append(values)
    return WindowTable(**{name: np.concatenate(parts) for name, parts in columns.items()})


def read_shard_table(group: Path, record: DoneRecord, num_frames: int) -> dict[str, NDArray[Any]]:
    """The arrays of one shard beside its tokens, by name, as stored: (W, ...) each.

    Raises DamagedShard if one is missing or broken.
    """
    table = {
        name: read_array(group, name, shape=shape, dtype=WINDOW_ARRAYS[name].dtype)
        for name, shape in array_shapes(record.rows, num_frames).items()
    }
    if not 0 <= table["clip"].min() <= table["clip"].max() < len(record.keys):
        raise DamagedShard(
            f"{group}: clip has an index outside of the {len(record.keys)} keys: {ADVICE}"
        )
    return table


def check_attributes(group: Path, record: DoneRecord, info: CacheInfo) -> None:
    """Raises CacheMismatch if the shard says that it belongs to another cache."""
    attributes = read_attributes(group)
    for name, wanted in (("fingerprint", info.fingerprint), ("keys", record.keys)):
        if attributes.get(name) != wanted:
            raise CacheMismatch(
                f"{group}: its attribute {name} is not that of cache.json and the done-record: "
                f"the shard belongs to another cache; {ADVICE}"
            )


def read_black(path: Path, info: CacheInfo, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """black.npy, float32 `shape`; DamagedShard if it is not that."""
    advice = "extract again, it is written first"
    data = read_file(path, max_bytes=MAX_BLACK_BYTES, advice=advice)
    entry = info.files.get(path.name)
    if entry is not None and hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise DamagedShard(f"{path}: was changed since the cache was finished: {advice}")
    tokens = read_npy(data, dtype=np.dtype("<f4"), num_axes=2, where=str(path))
    if tokens.shape != shape:
        raise DamagedShard(f"{path}: shape {tokens.shape}, cache.json says {shape}: {advice}")
    return tokens
