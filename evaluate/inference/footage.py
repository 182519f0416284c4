"""The frames a forecast sees, and those that really came: from a video, a folder of frames, arrays.

Videos are decoded by extract/'s own rules, so that a frame is the one that a cache would hold.
T frames of H x W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ...shards.errors import ClipError, DeltatokError, UsageError
from ...shards.sampling import WindowDraw

if TYPE_CHECKING:
    from ...extract.sources.clip import Clip

Frames = NDArray[np.uint8] | Tensor
Video = Frames | str | Path
"""A video file, a folder of frames named `*_<seconds>.jpg`, or frames uint8 (T, H, W, 3), RGB."""

_SLACK = 1e-6
"""Part of a step by which a time may miss the first or last frame: rounding only."""


@dataclass(frozen=True, kw_only=True)
class Footage:
    """What is seen, and what came after it where the video goes on."""

    seen: NDArray[np.uint8]
    """(C, H, W, 3)"""
    times_s: tuple[float, ...]
    """C true times, seconds since the video's first frame, increasing."""
    after: NDArray[np.uint8]
    """(A, H, W, 3): frames at the forecast's times, as many of the first as the video has."""


@dataclass(frozen=True, kw_only=True)
class Glance:
    """Which frames of a video are looked at."""

    num_context: int
    """Frames seen, at most; fewer where the video is shorter."""
    step_s: float
    """Seconds between them, and between the steps of the forecast."""
    num_steps: int
    """Steps of the forecast."""
    at_s: float | None = None
    """Time of the last frame seen; None: the video's end."""

    def rows(self, times_s: NDArray[np.float64]) -> tuple[list[int], list[int]]:
        """Indices of the frames seen, and of those after; times (T,) never decrease.

        The frames nearest to a grid of step `step_s` that ends at `at_s`. UsageError for an
        `at_s` outside the video.
        """
        first, last = float(times_s[0]), float(times_s[-1])
        end = last if self.at_s is None else self.at_s
        slack = _SLACK * self.step_s
        if not first - slack <= end <= last + slack:
            raise UsageError(f"at_s: got {end:g}, wanted a time in the video, {first:g}-{last:g} s")
        now = int(np.abs(times_s - end).argmin())
        back = times_s[now] - self.step_s * np.arange(self.num_context - 1, -1, -1)
        ahead = times_s[now] + self.step_s * np.arange(1, self.num_steps + 1)
        seen = _nearest(times_s, back[back >= first - slack])
        return seen, _nearest(times_s, ahead[ahead <= last + slack], unique=False)


def look(video: Video, glance: Glance, *, times_s: ArrayLike | None, fps: float | None) -> Footage:
    """The footage of a video or of frames with their times (or their rate).

    Raises:
        UsageError: no such file, frames of another type or shape, times that make no sense.
        DeltatokError: a video that cannot be decoded; says why.
    """
    if isinstance(video, str | Path):
        if times_s is not None or fps is not None:
            raise UsageError("times_s and fps: a video file has times of its own; leave them away")
        return _look_at_file(Path(video), glance)
    frames = check_frames(video)
    known = _check_times(len(frames), times_s, fps)
    seen, after = glance.rows(known)
    return Footage(seen=frames[seen], times_s=tuple(known[seen].tolist()), after=frames[after])


def check_frames(frames: Frames) -> NDArray[np.uint8]:
    """Frames as a uint8 array (T, H, W, 3); UsageError for anything else."""
    try:
        array = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
    except ValueError as error:
        raise UsageError(f"frames: {error}; wanted frames of one size") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not array.size:
        raise UsageError(
            f"frames: got {array.dtype} {array.shape}, wanted uint8 (frames, height, width, 3), "
            "RGB, 0-255"
        )
    return array


def frame_planes(frame: NDArray[np.uint8]) -> Tensor:
    """One frame (H, W, 3) as uint8 (1, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]


def _look_at_file(path: Path, glance: Glance) -> Footage:
    # Decoders are imported for files only: arrays need none.
    from ...extract.sources.find import find_clips

    clips = find_clips([path])
    if len(clips) > 1:
        raise UsageError(
            f"{path}: {len(clips)} videos, wanted one; give one of them, e.g. {clips[0].key}"
        )
    num_seen = 0
    refused: UsageError | None = None  # what decoders take for a fault of the video

    def choose(times_s: NDArray[np.float64]) -> list[int]:
        nonlocal num_seen, refused
        try:
            seen, after = glance.rows(times_s)
        except UsageError as error:
            refused = error
            raise
        num_seen = len(seen)
        return [*seen, *after]

    try:
        frames, times = decode_frames(clips[0], choose)
    except ClipError as error:
        if refused is not None:
            raise refused from None
        raise DeltatokError(f"{path}: cannot be decoded: {error}") from error
    return Footage(seen=frames[:num_seen], times_s=times[:num_seen], after=frames[num_seen:])


def decode_frames(
    clip: "Clip", choose: Callable[[NDArray[np.float64]], list[int]]
) -> tuple[NDArray[np.uint8], tuple[float, ...]]:
    """The frames (C, H, W, 3) of a clip that `choose` takes by the times of all, and their times.
    ClipError for a clip that cannot be decoded."""
    from ...extract.decoding.clip import decode_drawn

    def draw(times_s: NDArray[np.float64], height: int, width: int) -> list[WindowDraw]:
        rows = choose(times_s)
        return [
            WindowDraw(
                frame_index=tuple(rows),
                timestamps_s=tuple(times_s[rows].tolist()),
                crop=(0, 0, height, width),
                flipped=False,
            )
        ]

    decoded = decode_drawn(clip, draw=draw, decoder="pyav")
    window = decoded.windows[0]
    return np.stack([decoded.frames[row] for row in window.frame_index]), window.timestamps_s


def _check_times(
    num_frames: int, times_s: ArrayLike | None, fps: float | None
) -> NDArray[np.float64]:
    if (times_s is None) == (fps is None):
        raise UsageError("frames need their times: pass either times_s (seconds) or fps, not both")
    if fps is not None:
        if not 0 < fps < float("inf"):
            raise UsageError(f"fps: got {fps}, wanted a number above 0")
        return np.arange(num_frames) / fps
    times = np.asarray(times_s, np.float64)
    if times.shape != (num_frames,) or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise UsageError(
            f"times_s: got {times.shape} numbers for {num_frames} frames, wanted one for each, "
            "finite and increasing"
        )
    return times


def _nearest(
    times_s: NDArray[np.float64],
    points: Sequence[float] | NDArray[np.float64],
    *,
    unique: bool = True,
) -> list[int]:
    found = [int(np.abs(times_s - point).argmin()) for point in points]
    return sorted(set(found)) if unique else found
