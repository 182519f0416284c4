"""describe_cache: what a cache is and holds, for `deltatok-shards info`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cache import PATCHES, CacheInfo, read_cache_info
from ..index import INDEX, ShardColumns, read_index
from ..plan import PLAN, Plan
from ..records import StoredFile, iterate_done


def describe_cache(folder: Path | str) -> dict[str, Any]:
    """Format, shape, counts, bytes, dtype, provenance and quarantine, as plain JSON values.

    Reads cache.json and plan.json and, of an unfinished cache, the done-records, else the index;
    not the shards. Raises as the readers do for a folder that is no cache.
    """
    folder = Path(folder)
    info = read_cache_info(folder)
    abs_max, num_lost = info.abs_max or 0.0, info.counts.get("quarantined", 0)
    if info.complete and INDEX in info.files:
        shards = read_index(folder, StoredFile(**info.files[INDEX]))
    else:
        records = list(iterate_done(folder))
        shards = ShardColumns.of(records)
        abs_max = max((record.abs_max for record in records), default=0.0)
        num_lost = sum(len(record.quarantined) for record in records)
    plan = Plan.open(folder) if (folder / PLAN).is_file() else None
    shape = info.shape
    return {
        "format": f"{info.format} {info.format_version}",
        "fingerprint": info.fingerprint,
        "complete": info.complete,
        "shards": len(shards),
        "shards_planned": plan and plan.num_shards,
        "windows": int(shards.rows.sum()),
        "clips": int(shards.clips.sum()),
        "clips_planned": plan and plan.num_clips,
        "quarantined": num_lost,
        "frames_per_window": shape.num_frames,
        "tokens_per_frame": shape.num_tokens,
        "grid": None if shape.grid is None else list(shape.grid),
        "channels": shape.hidden_size,
        "dtype": _lookup(info.identity, "storage", "dtype"),
        "bytes": int(shards.bytes.sum()),
        "abs_max": abs_max,
        "provenance": _provenance(info),
        "backbone": info.backbone,
        "licence": info.licence,
        "software": info.software,
        "counts": info.counts,
        **({"exported_from": info.exported_from} if info.exported_from else {}),
    }


def _provenance(info: CacheInfo) -> list[dict[str, Any]]:
    """From the videos to this cache: what was run, and the hashes that tell it apart."""
    deltas = info.format != PATCHES
    patches = _lookup(info.identity, "patches") if deltas else info.identity
    patches = patches if isinstance(patches, dict) else {}
    chain: list[dict[str, Any]] = [
        {"step": "backbone", "weights_sha256": _lookup(patches, "backbone", "weights_sha256")},
        {
            "step": "patches",
            "fingerprint": info.parent_fingerprint if deltas else info.fingerprint,
            "frame_size": _lookup(patches, "preprocessing", "frame_size"),
            "sampling": _lookup(patches, "sampling"),
        },
    ]
    if deltas:
        weights = _lookup(info.identity, "tokenizer", "weights_sha256")
        chain.append({"step": "tokenizer", "weights_sha256": weights})
        chain.append({"step": "deltas", "fingerprint": info.fingerprint})
    return chain


def _lookup(value: Any, *names: str) -> Any:
    """The value below `names`, None where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
