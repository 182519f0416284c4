"""Which windows an export takes, from which caches, and into which shards they go.

    sources = open_sources(["cache/a", "cache/b"])     # of one identity
    clips = select_clips(sources, Selection(splits=("train",)))
    plan = deal(sources, clips, clips_per_shard=64)
Clips are taken whole, those in quarantine too, so that the new
cache says what its videos did not give.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import BLACK, PATCHES, CacheInfo, compare, read_cache_info
from ..deltas.reader import DeltaShards
from ..errors import CacheMismatch, UsageError
from ..patches.reader import PatchShards
from ..plan import PlanEntry, plan_order, read_plan
from ..reader import known_names
from ..records import DoneRecord, read_all_done

Reader = PatchShards | DeltaShards


@dataclass(frozen=True, kw_only=True)
class Selection:
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
class Source:
    """A cache that is exported from."""

    reader: Reader

    @cached_property
    def plan(self) -> dict[str, PlanEntry]:
        """Its plan by key, the clips in quarantine too."""
        return {entry.key: entry for entry in read_plan(self.reader.folder)}

    @cached_property
    def records(self) -> dict[str, DoneRecord]:
        """By key, the done-record of the clip's shard."""
        return {
            key: record
            for record in read_all_done(self.reader.folder)
            for key in (*record.keys, *(entry.clip for entry in record.quarantined))
        }

    def windows_of(self, key: str) -> NDArray[np.int64]:
        """The numbers of the clip's windows, ascending; none for one in quarantine."""
        return self._windows.get(key, np.empty(0, dtype=np.int64))

    @cached_property
    def _windows(self) -> dict[str, NDArray[np.int64]]:
        clips = self.reader.clip_index
        order = np.argsort(clips, kind="stable").astype(np.int64)
        ends = np.cumsum(np.bincount(clips, minlength=len(self.reader.keys)))
        return dict(zip(self.reader.keys, np.split(order, ends[:-1]), strict=True))


def open_sources(folders: Sequence[Path | str]) -> list[Source]:
    """The finished caches in `folders`, delta tars held against their hashes.

    Raises CacheMismatch, naming the field, unless all are of one identity.
    """
    infos = [read_cache_info(folder) for folder in folders]
    for folder, info in zip(folders[1:], infos[1:], strict=True):
        compare(
            _compared(info), _compared(infos[0]), what_got=str(folder), what_wanted=str(folders[0])
        )
    kind = PatchShards if infos[0].format == PATCHES else DeltaShards
    sources = [Source(kind(folder)) for folder in folders]
    _check_black(sources)
    return sources


def select_clips(sources: Sequence[Source], selection: Selection) -> dict[str, Source]:
    """Key -> the cache it is in, in the plan's order.

    Raises UsageError for a clip, label or split that no cache has, for a clip that is in two of
    them, and where nothing is left.
    """
    where = ", ".join(str(source.reader.folder) for source in sources)
    entries = [entry for source in sources for entry in source.plan.values()]
    clips = selection.clips
    if clips is not None:
        clips = frozenset(known_names(clips, {e.key for e in entries}, what="clip", where=where))
    wanted: dict[str, Collection[str]] = {}
    for name, names in (("label", selection.labels), ("split", selection.splits)):
        if names:
            known = {value for entry in entries if (value := getattr(entry, name))}
            wanted[name] = known_names(names, known, what=name, where=where)
    found: dict[str, Source] = {}
    for source in sources:
        for key, entry in source.plan.items():
            if clips is not None and key not in clips:
                continue
            if any(getattr(entry, name) not in names for name, names in wanted.items()):
                continue
            if key in found:
                raise UsageError(
                    f"clip {key!r} is in {found[key].reader.folder} and in {source.reader.folder}: "
                    "a key must be unique; leave one of the caches out, or name the clips to take"
                )
            found[key] = source
    if not found:
        raise UsageError(f"{where}: no clip has all that is asked for (clips, labels, splits)")
    order = plan_order(found, seed=draw_seed(sources[0].reader.info))[: selection.limit]
    return {key: found[key] for key in order}


def deal(
    clips: Mapping[str, Source],
    *,
    clips_per_shard: int | None = None,
    windows_per_shard: int | None = None,
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
        more = len(source.windows_of(key))
        full = num_clips == clips_per_shard or (
            windows_per_shard is not None and num_windows + more > windows_per_shard
        )
        if num_clips and full:
            shard, num_clips, num_windows = shard + 1, 0, 0
        num_clips, num_windows = num_clips + 1, num_windows + more
        plan.append(replace(source.plan[key], shard=shard))
    return plan


def exported_from(
    sources: Sequence[Source], selection: Selection, clips: Mapping[str, Source]
) -> dict[str, Any]:
    """What cache.json says of where the windows come from; plain JSON values."""
    chosen = {"labels": list(selection.labels), "splits": list(selection.splits)}
    return {
        "caches": [
            {
                "fingerprint": source.reader.fingerprint,
                "clips": sum(other is source for other in clips.values()),
                "windows": sum(
                    len(source.windows_of(key)) for key, other in clips.items() if other is source
                ),
                **_its_own_sources(source.reader.info),
            }
            for source in sources
        ],
        **{name: values for name, values in chosen.items() if values},
        **({} if selection.limit is None else {"limit": selection.limit}),
    }


def draw_seed(info: CacheInfo) -> int:
    """The seed that the windows of a cache were drawn with, 0 where it names none."""
    for identity in (info.identity, info.identity.get("patches")):
        sampling = identity.get("sampling") if isinstance(identity, Mapping) else None
        if isinstance(sampling, Mapping) and isinstance(sampling.get("seed"), int):
            return int(sampling["seed"])
    return 0


def _its_own_sources(info: CacheInfo) -> dict[str, Any]:
    return {"exported_from": info.exported_from} if info.exported_from else {}


def _compared(info: CacheInfo) -> dict[str, Any]:
    return {
        "format": info.format,
        "format_version": info.format_version,
        "identity": info.identity,
        "shape": asdict(info.shape),
        "parent_fingerprint": info.parent_fingerprint,
        "licence": info.licence,
    }


def _check_black(sources: Sequence[Source]) -> None:
    first = sources[0].reader
    for source in sources[1:]:
        other = source.reader
        if (
            isinstance(first, PatchShards)
            and isinstance(other, PatchShards)
            and not np.array_equal(first.black, other.black)
        ):
            raise CacheMismatch(
                f"{other.folder}: {BLACK} is not that of {first.folder}: they were made by "
                "different devices or releases; extract both with the same"
            )
