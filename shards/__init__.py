"""The two cache formats: patch-token shards (Zarr v3) and delta-token shards (WebDataset tars).

FORMAT.md beside this file specifies both. Reading needs NumPy only; writing imports zarr or
webdataset when the first shard is written.
"""

from .cache import (
    DELTAS,
    FORMAT_VERSION,
    PATCHES,
    CacheInfo,
    CacheShape,
    canonical_json,
    compare,
    fingerprint,
    finish_cache,
    open_cache,
    read_cache_info,
)
from .deltas.reader import DeltaShards
from .deltas.writer import DeltaRows, write_delta_shard
from .errors import (
    CacheMismatch,
    DamagedShard,
    DeltatokError,
    Stopped,
    TooManyQuarantined,
    UsageError,
)
from .patches.int8 import channel_scale_of, dequantise, quantise, scale_sha256, write_channel_scale
from .patches.reader import PatchShards
from .patches.writer import PatchRows, write_black, write_patch_shard
from .plan import (
    PlanEntry,
    clips_by_shard,
    clips_of_shard,
    make_plan,
    num_shards,
    read_plan,
    window_order,
    write_plan,
)
from .records import (
    DoneRecord,
    Quarantined,
    append_timing,
    done_shards,
    read_done,
    write_done,
    write_quarantine,
)
from .tools.export import Selection, export_cache
from .tools.info import describe_cache
from .tools.verify import VerifyReport, verify_cache

__all__ = [
    "DELTAS",
    "FORMAT_VERSION",
    "PATCHES",
    "CacheInfo",
    "CacheMismatch",
    "CacheShape",
    "DamagedShard",
    "DeltaRows",
    "DeltaShards",
    "DeltatokError",
    "DoneRecord",
    "PatchRows",
    "PatchShards",
    "PlanEntry",
    "Quarantined",
    "Selection",
    "Stopped",
    "TooManyQuarantined",
    "UsageError",
    "VerifyReport",
    "append_timing",
    "canonical_json",
    "channel_scale_of",
    "clips_by_shard",
    "clips_of_shard",
    "compare",
    "dequantise",
    "describe_cache",
    "done_shards",
    "export_cache",
    "fingerprint",
    "finish_cache",
    "make_plan",
    "num_shards",
    "open_cache",
    "quantise",
    "read_cache_info",
    "read_done",
    "read_plan",
    "scale_sha256",
    "verify_cache",
    "window_order",
    "write_black",
    "write_channel_scale",
    "write_delta_shard",
    "write_done",
    "write_patch_shard",
    "write_plan",
    "write_quarantine",
]
