"""export_cache: windows of finished caches as a new one: a subset, a merger, other shards, another
storage type.

    export_cache(["cache/a", "cache/b"], "cache/train", selection=ClipSelection(splits=("train",)))

Clips are taken whole, those in quarantine too, so that the new cache says what its videos did not
give. With the storage type kept, every stored number is one that was there, so the identity and
with it the fingerprint stay. With another one `identity.storage` names both: `converted_from` holds
the old one, since rounding twice is not rounding once.

Shard by shard with done-records, as extraction: run again with the same arguments, the shards that
are done stay, and the bytes are the same. One process.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import (
    BLACK,
    PATCHES,
    CacheInfo,
    compare,
    compared,
    finish_cache,
    open_cache,
    pca_of,
    read_cache_info,
)
from ..deltas.reader import DeltaShards
from ..deltas.writer import write_delta_shard
from ..errors import CacheMismatch, UsageError
from ..files import check_free, disk_errors, local_path, remove_partials
from ..patches.int8 import (
    SAMPLE_CLIPS,
    channel_scale_of,
    sample_order,
    scale_sha256,
    write_channel_scale,
)
from ..patches.layout import STORED_DTYPES
from ..patches.projection import agree_on_projection, read_projection
from ..patches.reader import PatchShards
from ..patches.writer import write_black, write_patch_shard
from ..patches.zarr_arrays import check_compression
from ..plan import Plan, PlanEntry, plan_order, remove_strangers, write_plan
from ..reader import known_names
from ..records import DoneRecord, Quarantined, iterate_done, quarantined_of, read_done
from ..windows import ShardRows, WindowColumns

logger = logging.getLogger(__name__)

Reader = PatchShards | DeltaShards

SPARE = 1.02
"""Of the tokens' bytes, for metadata, indices and records (a guess)."""


@dataclass(frozen=True, kw_only=True)
class ClipSelection:
    """Which clips; None or empty: all."""

    clips: frozenset[str] | None = None
    """Keys."""
    labels: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    limit: int | None = None
    """The first so many in the plan's order of seed and key."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit is {self.limit}, wanted 1 or more clips")


@dataclass(frozen=True)
class SourceCache:
    """A cache that is exported from."""

    reader: Reader

    @cached_property
    def plan(self) -> dict[str, PlanEntry]:
        """Its plan by key, the clips in quarantine too."""
        return {entry.key: entry for entry in Plan.open(self.reader.folder)}

    @cached_property
    def records(self) -> dict[str, DoneRecord]:
        """By key, the done-record of the clip's shard."""
        by_shard = {record.shard: record for record in iterate_done(self.reader.folder)}
        return {key: by_shard[entry.shard] for key, entry in self.plan.items()}

    @cached_property
    def lost(self) -> dict[str, Quarantined]:
        """By key, what became of the clips that have no windows."""
        return {entry.clip: entry for entry in quarantined_of(iterate_done(self.reader.folder))}

    @cached_property
    def windows(self) -> dict[str, NDArray[np.int64]]:
        """By key, the numbers of the clip's windows, ascending; none for one in quarantine.

        By frames, then crop, then flip: an order that does not depend on the cache they are in, so
        that neither do the bytes of an export."""
        clips, table = self.reader.clip_index, self.reader.table()
        columns = [table.flipped, *table.crop.T[::-1], *table.frame_index.T[::-1], clips]
        order = np.lexsort(columns).astype(np.int64)
        ends = np.cumsum(np.bincount(clips, minlength=len(self.reader.keys)))
        found = dict(zip(self.reader.keys, np.split(order, ends[:-1]), strict=True))
        return {key: found.get(key, order[:0]) for key in self.plan}


Clips = Mapping[str, SourceCache]
"""The clips that are exported, by key in the order of the plan, and the cache each is in."""


def export_cache(
    folders: Sequence[Path | str],
    out: Path | str,
    *,
    selection: ClipSelection | None = None,
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
    out, selection = local_path(out), selection or ClipSelection()
    check_compression(compression)
    if out.resolve() in [Path(folder).resolve() for folder in folders]:
        raise UsageError(f"{out}: is one of the caches to export: give a new folder")
    sources = open_sources(folders)
    like = sources[0].reader
    if compression != "none" and not isinstance(like, PatchShards):
        raise UsageError(f"compression {compression!r}: delta caches are not compressed")
    clips = select_clips(sources, selection)
    plan = plan_shards(clips, clips_per_shard=clips_per_shard, windows_per_shard=windows_per_shard)
    shards = {shard: list(group) for shard, group in groupby(plan, key=attrgetter("shard"))}
    scale = _channel_scale(like, clips, dtype)
    info = replace(
        like.info,
        identity=_identity(like.info, dtype, scale),
        exported_from=_exported_from(sources, selection, clips),
        counts={},
        files={},
        complete=False,
    )
    _check_room(out, info, shards, clips)
    _begin(out, info, plan)
    if isinstance(like, PatchShards):
        write_black(out, like.black)
        if pca_of(like.info.identity) is not None:
            agree_on_projection(out, read_projection(like.folder, like.info))
    if scale is not None:
        write_channel_scale(out, scale)
    for number, (shard, entries) in enumerate(shards.items(), start=1):
        if read_done(out, shard) is None:
            keys = [entry.key for entry in entries]
            _write_shard(out, shard, {key: clips[key] for key in keys}, info, compression)
        if progress is not None:
            progress(number, len(shards))
    remove_strangers(out)
    return finish_cache(out)


def open_sources(folders: Sequence[Path | str]) -> list[SourceCache]:
    """The finished caches in `folders`, delta tars held against their hashes.

    Raises CacheMismatch, naming the field, unless all are of one identity.
    """
    infos = [read_cache_info(folder) for folder in folders]
    for folder, info in zip(folders[1:], infos[1:], strict=True):
        ours, theirs = ({**compared(i), "licence": i.licence} for i in (info, infos[0]))
        compare(ours, theirs, what_got=str(folder), what_wanted=str(folders[0]))
    kind = PatchShards if infos[0].format == PATCHES else DeltaShards
    readers: list[Reader] = [kind(folder) for folder in folders]
    black = [reader.black for reader in readers if isinstance(reader, PatchShards)]
    for reader, other in zip(readers[1:], black[1:], strict=False):
        if not np.array_equal(other, black[0]):
            raise CacheMismatch(
                f"{reader.folder}: {BLACK} is not that of {readers[0].folder}: they were made by "
                "different devices or releases; extract both with the same"
            )
    return [SourceCache(reader) for reader in readers]


def select_clips(
    sources: Sequence[SourceCache], selection: ClipSelection
) -> dict[str, SourceCache]:
    """Key -> the cache it is in, in the plan's order.

    Raises UsageError for a clip, label or split that no cache has, for a clip that is in two of
    them, and where nothing is left.
    """
    where = ", ".join(str(source.reader.folder) for source in sources)
    entries = [entry for source in sources for entry in source.plan.values()]
    wanted: dict[str, Collection[str]] = {}
    for field, what, names in (
        ("key", "clip", selection.clips),
        ("label", "label", selection.labels or None),
        ("split", "split", selection.splits or None),
    ):
        if names is not None:
            known = {value for entry in entries if (value := getattr(entry, field))}
            wanted[field] = known_names(names, known, what=what, where=where)
    found: dict[str, SourceCache] = {}
    for source in sources:
        for key, entry in source.plan.items():
            if any(getattr(entry, field) not in names for field, names in wanted.items()):
                continue
            if key in found:
                raise UsageError(
                    f"clip {key!r} is in {found[key].reader.folder} and in {source.reader.folder}: "
                    "a key must be unique; leave one of the caches out, or name the clips to take"
                )
            found[key] = source
    if not found:
        raise UsageError(f"{where}: no clip has all that is asked for (clips, labels, splits)")
    order = plan_order(found, seed=_draw_seed(sources[0].reader.info))[: selection.limit]
    return {key: found[key] for key in order}


def plan_shards(
    clips: Clips, *, clips_per_shard: int | None = None, windows_per_shard: int | None = None
) -> list[PlanEntry]:
    """The plan of the new cache: `clips` dealt in order into shards of so many clips, or of at most
    so many windows (more where one clip has more); with neither as many clips as the largest
    shard they come from."""
    for name, value in (("clips", clips_per_shard), ("windows", windows_per_shard)):
        if value is not None and value < 1:
            raise UsageError(f"{name}_per_shard is {value}, wanted 1 or more")
    if clips_per_shard is not None and windows_per_shard is not None:
        raise UsageError("clips_per_shard and windows_per_shard: give one of them")
    if clips_per_shard is None and windows_per_shard is None:
        clips_per_shard = max(
            int(np.bincount([entry.shard for entry in source.plan.values()]).max())
            for source in set(clips.values())
        )
    plan: list[PlanEntry] = []
    shard, num_clips, num_windows = 0, 0, 0
    for key, source in clips.items():
        more = len(source.windows[key])
        full = num_clips == clips_per_shard or (
            windows_per_shard is not None and num_windows + more > windows_per_shard
        )
        if num_clips and full:
            shard, num_clips, num_windows = shard + 1, 0, 0
        num_clips, num_windows = num_clips + 1, num_windows + more
        plan.append(replace(source.plan[key], shard=shard))
    return plan


def _begin(out: Path, info: CacheInfo, plan: Sequence[PlanEntry]) -> None:
    """cache.json, the plan and the folder of the shards; CacheMismatch where an `out` that was
    begun is another export."""
    remove_partials(out)
    stored = open_cache(out, info)
    compare(
        {"exported_from": stored.exported_from},
        {"exported_from": info.exported_from},
        what_got=str(out),
        what_wanted="what is asked for",
    )
    remove_partials(out / "shards")
    write_plan(out, plan)


def _write_shard(out: Path, shard: int, clips: Clips, info: CacheInfo, compression: str) -> None:
    records = {key: source.records[key] for key, source in clips.items()}
    lost = {key: clips[key].lost[key] for key in clips if key in clips[key].lost}
    keys = [key for key in clips if key not in lost]
    like = next(iter(clips.values())).reader
    tokens, token_scale = _gather_tokens({key: clips[key] for key in keys}, info, like=like)
    parts = [WindowColumns.empty(info.shape.num_frames)]
    for key in keys:
        windows = clips[key].reader.table().take(clips[key].windows[key])
        parts.append(replace(windows, clip=np.zeros(len(windows), np.int32), keys=[key]))
    rows = ShardRows(
        **vars(WindowColumns.concatenate(parts)),
        tokens=tokens,
        token_scale=token_scale,
        decoders={k: name for key in keys for k, name in records[key].decoders([key]).items()},
        quarantined=list(lost.values()),
    )
    seed = _draw_seed(info)
    with disk_errors(out):
        if info.format == PATCHES:
            dtype = info.identity["storage"]["dtype"]
            write_patch_shard(out, shard, rows, dtype=dtype, seed=seed, compression=compression)
        else:
            write_delta_shard(out, shard, rows, seed=seed)


def _gather_tokens(
    clips: Clips, info: CacheInfo, *, like: Reader
) -> tuple[NDArray[Any], NDArray[np.float16] | None]:
    """The tokens of the windows of each clip in turn, and of int8 codes their scales. Patch tokens
    as they are stored where the new cache stores them so, else as float16 or float32 values.

    like: any reader, for the shapes where there are no clips.
    """
    picks = [(source.reader, source.windows[key]) for key, source in clips.items()]
    ends = np.cumsum([0, *(len(windows) for _, windows in picks)])
    dtype: np.dtype[Any] = np.dtype(np.float16)
    if isinstance(like, PatchShards):
        is_kept = like.dtype in ("float16", info.identity["storage"]["dtype"])
        dtype = STORED_DTYPES[like.dtype] if is_kept else np.dtype(np.float32)
    tokens = np.empty((ends[-1], *like.shape), dtype=dtype)
    scales = [np.empty((0, *like.shape[:2]), dtype=np.float16)]
    for (reader, windows), begin, end in zip(picks, ends[:-1], ends[1:], strict=True):
        if isinstance(reader, PatchShards) and dtype != np.float32:
            reader.stored_tokens(windows, out=tokens[begin:end])
        else:
            reader.tokens(windows, out=tokens[begin:end])
        if isinstance(reader, PatchShards) and dtype == np.int8:
            scales.append(reader.token_scale(windows))
    return tokens, np.concatenate(scales) if dtype == np.int8 else None


def _identity(
    info: CacheInfo, dtype: str | None, scale: NDArray[np.float32] | None
) -> dict[str, Any]:
    """That of the export: another one where another dtype is asked for."""
    storage = info.identity.get("storage", {})
    if dtype is None or dtype == storage.get("dtype"):
        return info.identity
    if info.format != PATCHES or dtype not in STORED_DTYPES:
        known = ", ".join(STORED_DTYPES) if info.format == PATCHES else "float16"
        raise UsageError(f"dtype {dtype!r}: {info.format} caches store {known}")
    converted = {"dtype": dtype, "converted_from": storage}
    if scale is not None:
        converted["scale_sha256"] = scale_sha256(scale)
    return {**info.identity, "storage": converted}


def _channel_scale(reader: Reader, clips: Clips, dtype: str | None) -> NDArray[np.float32] | None:
    """The channel scales of an int8 export, float32 (D,): those of the source, or fitted as
    extraction does; None for other dtypes."""
    if not isinstance(reader, PatchShards) or (dtype or reader.dtype) != "int8":
        return None
    if reader.dtype == "int8":
        return reader.channel_scale
    seed = _draw_seed(reader.info)
    order = sorted(clips, key=lambda key: sample_order(seed, key))
    sample = [key for key in order if len(clips[key].windows[key])][:SAMPLE_CLIPS]
    if not sample:
        raise UsageError("int8: none of the clips has a window to fit the channel scales on")
    logger.info("int8: fitting the channel scales on one window of each of %d clips", len(sample))
    squares = np.zeros(reader.shape[2], dtype=np.float64)
    for key in sample:
        window = clips[key].reader.tokens(clips[key].windows[key][:1]).astype(np.float64)
        squares += np.square(window).mean(axis=(0, 1, 2))
    return channel_scale_of(squares / len(sample))


def _check_room(
    out: Path, info: CacheInfo, shards: Mapping[int, Sequence[PlanEntry]], clips: Clips
) -> None:
    """Raises DeltatokError if the shards still to be written, uncompressed, do not fit."""
    dtype = STORED_DTYPES[info.identity.get("storage", {}).get("dtype", "float16")]
    shape = info.shape
    values = shape.num_frames * (shape.num_tokens or 1) * shape.hidden_size
    num_windows = sum(
        len(clips[entry.key].windows[entry.key])
        for shard, entries in shards.items()
        if read_done(out, shard) is None
        for entry in entries
    )
    needed_bytes = int(num_windows * values * dtype.itemsize * SPARE)
    check_free(out, needed_bytes, what="the export")


def _exported_from(
    sources: Sequence[SourceCache], selection: ClipSelection, clips: Clips
) -> dict[str, Any]:
    """What cache.json says of where the windows come from; plain JSON values."""
    caches = []
    for source in sources:
        own = [key for key, other in clips.items() if other is source]
        cache = {
            "fingerprint": source.reader.fingerprint,
            "clips": len(own),
            "windows": sum(len(source.windows[key]) for key in own),
        }
        if source.reader.info.exported_from:
            cache["exported_from"] = source.reader.info.exported_from
        caches.append(cache)
    chosen = {
        "labels": list(selection.labels),
        "splits": list(selection.splits),
        "limit": selection.limit,
    }
    return {"caches": caches, **{name: value for name, value in chosen.items() if value}}


def _draw_seed(info: CacheInfo) -> int:
    """The seed that the windows of a cache were drawn with, 0 where it names none."""
    for identity in (info.identity, info.identity.get("patches")):
        sampling = identity.get("sampling") if isinstance(identity, Mapping) else None
        if isinstance(sampling, Mapping) and isinstance(sampling.get("seed"), int):
            return int(sampling["seed"])
    return 0
