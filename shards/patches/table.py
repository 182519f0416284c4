"""Everything in a patch-token cache but the tokens: one row a window, and black.npy."""

import hashlib
from dataclasses import replace
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
from ..windows import WindowColumns
from .layout import STORED_DTYPES, WINDOW_ARRAYS, array_shapes
from .zarr_arrays import ADVICE, read_array, read_attributes

MAX_BLACK_BYTES = 2**30
"""Of black.npy: one frame in float32 (a guess)."""


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


def read_table(cache: OpenedCache) -> WindowColumns:
    """The windows of all shards of a cache, in shard order."""
    num_frames = cache.info.shape.num_frames
    parts = [WindowColumns.empty(num_frames)]
    for record in cache.records:
        group = shard_path(cache.folder, record.shard, ".zarr")
        check_attributes(group, record, cache.info)
        parts.append(read_shard_table(group, record, num_frames))
    table = WindowColumns.concatenate(parts)
    return replace(table, clip=table.clip.astype(np.int64))


def read_shard_table(group: Path, record: DoneRecord, num_frames: int) -> WindowColumns:
    """The windows of one shard, as stored. Raises DamagedShard if an array is missing or broken."""
    columns: dict[str, Any] = {
        name: read_array(group, name, shape=shape, dtype=WINDOW_ARRAYS[name].dtype)
        for name, shape in array_shapes(record.rows, num_frames).items()
    }
    clip = columns["clip"]
    if not 0 <= clip.min() <= clip.max() < len(record.keys):
        raise DamagedShard(
            f"{group}: clip has an index outside of the {len(record.keys)} keys: {ADVICE}"
        )
    return WindowColumns(**columns, keys=record.keys)


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
