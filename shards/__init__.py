"""The two cache formats: patch-token shards (Zarr v3) and delta-token shards (WebDataset tars).

FORMAT.md beside this file specifies both. What is named here reads caches, with NumPy alone; the
writers (`patches.writer`, `deltas.writer`) import zarr or webdataset when they write the first
shard, and `tools` holds what `deltatok-shards` runs.
"""

from .cache import DELTAS, PATCHES, CacheInfo, CacheShape, read_cache_info
from .deltas.reader import DeltaShards
from .errors import (
    CacheMismatch,
    DamagedShard,
    DeltatokError,
    Stopped,
    TooManyQuarantined,
    UsageError,
)
from .patches.reader import PatchShards

__all__ = [
    "DELTAS",
    "PATCHES",
    "CacheInfo",
    "CacheMismatch",
    "CacheShape",
    "DamagedShard",
    "DeltaShards",
    "DeltatokError",
    "PatchShards",
    "Stopped",
    "TooManyQuarantined",
    "UsageError",
    "read_cache_info",
]
