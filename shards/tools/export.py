"""export_cache: windows of finished caches as a new one: a subset, a merger, other shards, another
storage type.

With the storage type kept, every stored number is one that was there, so the identity and with it
the fingerprint stay. With another one `identity.storage` names both: `converted_from` holds the
old one, since rounding twice is not rounding once.

Shard by shard with done-records, as extraction: killed anywhere and run again with the same
arguments it goes on, and the bytes are the same. One process.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import CHANNEL_SCALE, CacheInfo, compare, finish_cache, open_cache, read_cache_info
from ..deltas.writer import DeltaRows, write_delta_shard
from ..errors import CacheMismatch, DeltatokError, UsageError
from ..files import check_free, remove_partials
from ..patches.int8 import (
    SAMPLE_CLIPS,
    channel_scale_of,
    read_channel_scale,
    sample_order,
    scale_sha256,
    write_channel_scale,
)
from ..patches.layout import STORED_DTYPES
from ..patches.reader import PatchShards
from ..patches.writer import PatchRows, write_black, write_patch_shard
from ..patches.zarr_arrays import check_compression
from ..plan import PlanEntry, clips_by_shard, write_plan
from ..records import read_done, write_quarantine
from .export_plan import (
    Selection,
    Source,
    deal,
    draw_seed,
    exported_from,
    open_sources,
    select_clips,
)
from .export_rows import gather_columns, in_order_of_content

logger = logging.getLogger(__name__)

SPARE = 1.02
"""Of the tokens' bytes, for metadata, indices and records (a guess)."""


def export_cache(
    folders: Sequence[Path | str],
    out: Path | str,
    *,
    selection: Selection | None = None,
    clips_per_shard: int | None = None,
    windows_per_shard: int | None = None,
    dtype: str | None = None,
    compression: str = "none",
    progress: Callable[[int, int], None] | None = None,
) -> CacheInfo:
    """Writes the selected clips of the caches `folders` into the cache `out`; gives its cache.json.

    dtype, compression: patch caches only; None keeps the dtype. progress(done, all) is called
    after every shard. Raises CacheMismatch, naming the field, for caches of different identity and
    for an `out` begun with other arguments; UsageError for a selection that cannot be; DamagedShard
    for damage in what is read; DeltatokError for values that the dtype cannot hold and where the
    disk has no room for all of it.
    """
    out, selection = Path(out), selection or Selection()
    check_compression(compression)
    if out.resolve() in [Path(folder).resolve() for folder in folders]:
        raise UsageError(f"{out}: is one of the caches to export: give a new folder")
    sources = open_sources(folders)
    if compression != "none" and not isinstance(sources[0].reader, PatchShards):
        raise UsageError(f"compression {compression!r}: delta caches are not compressed")
    clips = select_clips(sources, selection)
    plan = deal(clips, clips_per_shard=clips_per_shard, windows_per_shard=windows_per_shard)
    scale = _new_scale(sources[0], clips, dtype, out)
    info = _describe(sources, dtype, scale)
    info = replace(info, exported_from=exported_from(sources, selection, clips))
    _check_room(out, info, plan, clips)
    _begin(out, info, plan, sources[0], scale)
    shards = clips_by_shard(plan)
    for number, (shard, entries) in enumerate(shards.items(), start=1):
        if read_done(out, shard) is None:
            _write_shard(out, shard, entries, clips, info=info, compression=compression)
        if progress is not None:
            progress(number, len(shards))
    num_lost = len(write_quarantine(out))
    return finish_cache(out, {"clips": len(plan) - num_lost, "quarantined": num_lost})


def _begin(
    out: Path,
    info: CacheInfo,
    plan: Sequence[PlanEntry],
    source: Source,
    scale: NDArray[np.float32] | None,
) -> None:
    """Everything beside the shards; the same for a cache that was begun already."""
    remove_partials(out)
    stored = open_cache(out, info)
    advice = {"what_got": str(out), "what_wanted": "what is asked for"}
    compare(
        {"exported_from": stored.exported_from}, {"exported_from": info.exported_from}, **advice
    )
    remove_partials(out / "shards")
    for entry, wanted in zip(write_plan(out, plan), plan, strict=True):
        if (entry.key, entry.shard) != (wanted.key, wanted.shard):
            raise CacheMismatch(
                f"{out}: shard of clip {entry.key!r} is {entry.shard}, but other shards are asked "
                "for: give the same size of shards as before, or another folder"
            )
    if isinstance(source.reader, PatchShards):
        write_black(out, source.reader.black)
    if scale is not None:
        write_channel_scale(out, scale)


def _write_shard(
    out: Path,
    shard: int,
    entries: Sequence[PlanEntry],
    clips: Mapping[str, Source],
    *,
    info: CacheInfo,
    compression: str,
) -> None:
    records = {entry.key: clips[entry.key].records[entry.key] for entry in entries}
    keys = [key for key, record in records.items() if key in record.keys]
    quarantined = [
        lost for key, record in records.items() for lost in record.quarantined if lost.clip == key
    ]
    decoders = {key: records[key].decoders[key] for key in keys if key in records[key].decoders}
    like = clips[entries[0].key].reader
    found = [(clips[key].reader, clips[key].windows_of(key)) for key in keys]
    columns = gather_columns(
        [(reader, in_order_of_content(reader, windows)) for reader, windows in found],
        like=like,
        kept=like.info.identity.get("storage") == info.identity.get("storage"),
    )
    told: dict[str, Any] = {
        "seed": draw_seed(info),
        "decoders": decoders,
        "quarantined": quarantined,
    }
    try:
        if info.shape.num_tokens is None:
            write_delta_shard(out, shard, DeltaRows(**columns, keys=keys), **told)
        else:
            write_patch_shard(
                out,
                shard,
                PatchRows(**columns, keys=keys),
                dtype=info.identity["storage"]["dtype"],
                compression=compression,
                **told,
            )
    except OSError as error:
        raise DeltatokError(
            f"{out}: shard {shard:06d} cannot be written ({error.strerror or error}): make room "
            "and run the same command again"
        ) from error


def _describe(
    sources: Sequence[Source], dtype: str | None, scale: NDArray[np.float32] | None
) -> CacheInfo:
    """cache.json of the export, but for `exported_from`."""
    info = replace(sources[0].reader.info, counts={}, files={}, complete=False)
    storage = info.identity.get("storage", {})
    if dtype is None or dtype == storage.get("dtype"):
        return info
    if info.shape.num_tokens is None or dtype not in STORED_DTYPES:
        known = "float16" if info.shape.num_tokens is None else ", ".join(STORED_DTYPES)
        raise UsageError(f"dtype {dtype!r}: {info.format} caches store {known}")
    scales = {} if scale is None else {"scale_sha256": scale_sha256(scale)}
    converted = {"dtype": dtype, **scales, "converted_from": storage}
    return replace(info, identity={**info.identity, "storage": converted})


def _new_scale(
    source: Source, clips: Mapping[str, Source], dtype: str | None, out: Path
) -> NDArray[np.float32] | None:
    """The channel scales of an int8 export, float32 (D,): those of the source, those of an export
    that was begun, or fitted as extraction does; None for other dtypes."""
    reader = source.reader
    if not isinstance(reader, PatchShards) or (dtype or reader.dtype) != "int8":
        return None
    if reader.dtype == "int8":
        return reader.channel_scale
    if (out / "cache.json").is_file() and (out / CHANNEL_SCALE).is_file():
        return read_channel_scale(out, read_cache_info(out))
    seed = draw_seed(reader.info)
    order = sorted(clips, key=lambda key: sample_order(seed, key))
    sample = [key for key in order if len(clips[key].windows_of(key))][:SAMPLE_CLIPS]
    if not sample:
        raise UsageError("int8: none of the clips has a window to fit the channel scales on")
    logger.info("int8: fitting the channel scales on one window of each of %d clips", len(sample))
    squares = np.zeros(reader.shape[2], dtype=np.float64)
    for key in sample:
        chosen = in_order_of_content(clips[key].reader, clips[key].windows_of(key))[:1]
        window = clips[key].reader.tokens(chosen).astype(np.float64)
        squares += np.square(window).mean(axis=(0, 1, 2))
    return channel_scale_of(squares / len(sample))


def _check_room(
    out: Path, info: CacheInfo, plan: Sequence[PlanEntry], clips: Mapping[str, Source]
) -> None:
    """Raises DeltatokError if the shards still to be written, uncompressed, do not fit."""
    stored = info.identity.get("storage", {}).get("dtype", "float16")
    shape = info.shape
    frame_bytes = (shape.num_tokens or 1) * shape.hidden_size * STORED_DTYPES[stored].itemsize
    needed = sum(
        shape.num_frames
        * frame_bytes
        * sum(len(clips[entry.key].windows_of(entry.key)) for entry in entries)
        for shard, entries in clips_by_shard(plan).items()
        if read_done(out, shard) is None
    )
    check_free(out, int(needed * SPARE), what="the export")
