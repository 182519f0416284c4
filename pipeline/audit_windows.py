"""Which windows an audit makes again, and from which clips.

A shard stores its windows permuted; here a stored window is traced back to its clip and to its
number among the clip's windows as they were drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..extract.sources.clip import VIDEO_SUFFIXES, Clip, FrameFolder
from ..extract.sources.find import find_clips
from ..shards.deltas.reader import DeltaShards
from ..shards.errors import UsageError
from ..shards.patches.reader import PatchShards
from ..shards.plan import PlanEntry, read_plan, window_order
from ..shards.records import read_all_done


@dataclass(frozen=True, kw_only=True)
class AuditedWindow:
    """A stored window."""

    window: int
    """Its number in the reader."""
    shard: int
    key: str
    drawn: int
    """Which one of its clip's windows it is, in the order they are drawn."""
    num_drawn: int
    """How many windows the clip has in the cache."""


def choose_windows(
    reader: PatchShards | DeltaShards, *, count: int, draw_seed: int, plan_seed: int
) -> list[AuditedWindow]:
    """Up to `count` different windows, drawn by `draw_seed`, in the order of their clips.

    plan_seed: what the windows of a shard were permuted by.
    """
    rng = np.random.Generator(np.random.PCG64(draw_seed))
    total = reader.num_windows
    if not total:
        raise UsageError(f"{reader.folder}: has no windows: there is nothing to audit")
    chosen = np.sort(rng.choice(total, size=min(count, total), replace=False))
    records = [record for record in read_all_done(reader.folder) if record.rows]
    starts = np.cumsum([0, *(record.rows for record in records)])
    clips, keys = reader.clip_index, reader.keys
    windows = []
    for number in chosen.tolist():
        index = int(np.searchsorted(starts, number, side="right")) - 1
        record, begin = records[index], int(starts[index])
        order = window_order(record.rows, seed=plan_seed, shard=record.shard)
        same_clip = clips[begin : begin + record.rows] == clips[number]
        made = np.sort(order[same_clip])
        windows.append(
            AuditedWindow(
                window=number,
                shard=record.shard,
                key=keys[int(clips[number])],
                drawn=int(np.searchsorted(made, order[number - begin])),
                num_drawn=len(made),
            )
        )
    return sorted(windows, key=lambda window: (window.key, window.window))


def find_audited(
    folder: Path, keys: Sequence[str], *, videos: Sequence[str], root: str | None
) -> dict[str, tuple[Clip, PlanEntry]]:
    """The clips of these keys, with their lines of the plan; among `videos`, or, where none are
    given, where the plan says that they were. UsageError for one that is not there."""
    planned = {entry.key: entry for entry in read_plan(folder)}
    if videos:
        known = {clip.key: clip for clip in find_clips(videos, root=root)}
    else:
        known = {key: _from_source(planned[key]) for key in keys}
    missing = [key for key in keys if key not in known]
    if missing:
        raise UsageError(
            f"--videos: clip {missing[0]!r} of {folder} is not among them ({len(missing)} of "
            f"{len(keys)} clips; it came from {planned[missing[0]].source}): give the paths that "
            "the cache was made from"
        )
    return {key: (known[key], planned[key]) for key in keys}


def _from_source(entry: PlanEntry) -> Clip:
    """The clip where the plan says it was: a video, a folder of frames, or in an archive."""
    path = Path(entry.source)
    if path.is_dir():
        return Clip(entry.key, path, entry.size_bytes, FrameFolder())
    if path.suffix.lower() in VIDEO_SUFFIXES:
        if not path.is_file():
            raise UsageError(f"{path}: clip {entry.key!r} is no longer there: give --videos")
        return Clip(entry.key, path, entry.size_bytes)
    inside = [
        clip for clip in find_clips([path]) if f"/{entry.key}".endswith(f"/{clip.key}")
    ]  # keys of a folder of archives begin with the archives' names
    if not inside:
        raise UsageError(f"{path}: holds no clip {entry.key!r}: give --videos")
    return replace(max(inside, key=lambda clip: len(clip.key)), key=entry.key)
