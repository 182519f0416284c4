"""Which stored frames the windows of a delta-token shard are made of.

A cache of training windows gives them as they are. A `uniform` cache holds the frames of a clip at
a fixed rate, cut into consecutive windows: they are joined again, and training windows are drawn
among them. Called by tokenize.py. n windows, T frames of a window to write.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..shards.patches import PatchShards
from ..shards.records import DoneRecord, read_all_done
from .order import Indices


class WindowDraws(Protocol):
    """How training windows are drawn among the stored frames of a clip.

    pipeline/ makes one of extract/'s sampling, which train/ does not know.
    """

    num_windows: int
    """Windows of a clip."""
    num_frames: int
    """T."""

    def identity(self) -> dict[str, Any]:
        """What decides the draws, as plain JSON values: `sampling` of the cache identity."""

    def rows(self, key: str, timestamps_s: NDArray[np.float64]) -> Indices:
        """int64 (num_windows, T) into the clip's stored frames, whose times float64 (F,) increase
        from 0. A function of the arguments and of `identity` alone."""


@dataclass(frozen=True)
class ShardPart:
    """One patch shard: its done-record and where it lies in PatchShards."""

    record: DoneRecord
    first_window: int
    first_key: int


@dataclass(frozen=True, kw_only=True)
class FramePicks:
    """Where the frames of n windows lie in a patch cache."""

    window: Indices
    """int64 (n, T): the stored window of every frame."""
    frame: Indices
    """int64 (n, T): its place in that window."""
    clip: NDArray[np.int32]
    """int32 (n,), index into the shard's keys."""

    def __len__(self) -> int:
        return len(self.clip)

    def take(self, chosen: Indices) -> "FramePicks":
        """Those of the windows `chosen`."""
        return FramePicks(
            window=self.window[chosen], frame=self.frame[chosen], clip=self.clip[chosen]
        )


def shard_parts(folder: str) -> Iterator[ShardPart]:
    """The finished shards of a patch cache, those without windows too."""
    window = key = 0
    for record in read_all_done(folder):
        yield ShardPart(record, window, key)
        if record.rows:
            window += record.rows
            key += len(record.keys)


def stored_windows(patches: PatchShards, part: ShardPart) -> FramePicks:
    """The shard's windows as they are stored, in the same order."""
    windows = _windows_of(part)
    shape = (len(windows), patches.shape[0])
    return FramePicks(
        window=np.broadcast_to(windows[:, None], shape),
        frame=np.broadcast_to(np.arange(shape[1], dtype=np.int64), shape),
        clip=(patches.clip_index[windows] - part.first_key).astype(np.int32),
    )


def drawn_windows(patches: PatchShards, part: ShardPart, draws: WindowDraws) -> FramePicks:
    """`draws.num_windows` windows of every clip of the shard, clip after clip, drawn among all
    frames that are stored of the clip, whatever windows they are stored in."""
    table, windows = patches.table(), _windows_of(part)
    clips = patches.clip_index[windows] - part.first_key
    picked_windows = [np.empty((0, draws.num_frames), dtype=np.int64)]
    picked_frames = [np.empty((0, draws.num_frames), dtype=np.int64)]
    for clip, key in enumerate(part.record.keys):
        own = windows[clips == clip]
        # A slow clip repeats frames, and windows may overlap: every shown frame counts once.
        _, first = np.unique(table.frame_index[own], return_index=True)
        times = table.timestamps_s[own].reshape(-1)[first].astype(np.float64)
        window, frame = own[first // patches.shape[0]], first % patches.shape[0]
        rows = draws.rows(key, times - times[0])
        picked_windows.append(window[rows])
        picked_frames.append(frame[rows].astype(np.int64))
    return FramePicks(
        window=np.concatenate(picked_windows),
        frame=np.concatenate(picked_frames),
        clip=np.repeat(np.arange(len(part.record.keys)), draws.num_windows).astype(np.int32),
    )


def read_tokens(patches: PatchShards, picks: FramePicks) -> NDArray[np.float32]:
    """Patch tokens float32 (n, T, N, D) of the picked frames."""
    whole = (picks.window == picks.window[:, :1]).all()
    if whole and (picks.frame == np.arange(patches.shape[0])).all():
        return patches.tokens(picks.window[:, 0])
    tokens = np.empty((*picks.window.shape, *patches.shape[1:]), dtype=np.float32)
    # Window by window: one of 8 frames at gaps of up to 1/3 s touches few stored windows.
    for row, window, frame in zip(tokens, picks.window, picks.frame, strict=True):
        stored, place = np.unique(window, return_inverse=True)
        row[...] = patches.tokens(stored)[place, frame]
    return tokens


def _windows_of(part: ShardPart) -> Indices:
    return np.arange(part.first_window, part.first_window + part.record.rows, dtype=np.int64)
