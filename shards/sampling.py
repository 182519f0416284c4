"""From a clip's timestamps to windows: which frames, which crop, which flip.

Numpy only, so that the decoding processes start quickly. Every draw is a function of (seed, clip
key, window) alone: never of the order of clips, the number of workers or the decoder. The uniform
numbers come from raw Philox output, which numpy promises not to change.

T frames in a window, W windows of a clip, N frames of the clip.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import ClipError


@dataclass(frozen=True)
class Square:
    """A crop is resized to `height` x `width`, then a square of the frame size is cut from it."""

    height: int
    width: int
    top: int
    left: int
    side: int

    def in_pixels_of(self, crop: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
        """Where the square lies in the frame of which `crop` is resized."""
        top, left, height, width = crop
        return (
            top + self.top * height / self.height,
            left + self.left * width / self.width,
            self.side * height / self.height,
            self.side * width / self.width,
        )


Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

KINETICS_STRIDE_RANGE_S = (1 / 25, 1 / 3)
"""The paper's gaps between the frames of a training window, in seconds."""

CROP_TRIES = 10
"""Tries before the central crop, as torchvision's RandomResizedCrop has it."""

GRID_SLACK = 1e-6
"""Part of a step by which a uniform grid may overshoot the last frame: float64 rounding only."""

MAX_REPEATS = 100
"""Grid points a shown frame may serve on average before a clip is refused (a guess: it only has to
keep damaged timestamps from asking for years of video)."""


@dataclass(frozen=True)
class WindowDraw:
    """One window: T frames of one clip under one crop and one flip."""

    frame_index: tuple[int, ...]
    """T indices into the shown frames, in presentation order; a slow clip repeats frames."""
    timestamps_s: tuple[float, ...]
    """T true times of these frames, in seconds since the first shown frame."""
    crop: tuple[int, int, int, int]
    """top, left, height, width in pixels of the shown (rotated) frame."""
    flipped: bool
    """Mirrored left to right, after the crop."""
    square: Square | None = None
    """A square that is cut from the resized crop (evaluation); None: the crop is resized to it."""

    @property
    def source_crop(self) -> tuple[float, float, float, float]:
        """Top, left, height, width of what is seen, in pixels of the shown frame."""
        if self.square is None:
            return self.crop
        return self.square.in_pixels_of(self.crop)


@dataclass(frozen=True, kw_only=True)
class SamplingPolicy:
    """How windows are drawn; the fields are those of an extraction."""

    policy: Literal["windows", "uniform"]
    num_frames: int
    num_windows: int
    time_stride_range: tuple[float, float]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip_probability: float
    fps: float | None
    seed: int
    min_frames: int
    aspect: float = 1.0
    """Width / height of the frames that crops are resized to, times which `crop_ratio` counts. The
    cache's identity has it as their size."""

    def identity(self) -> dict[str, Any]:
        """What of the policy decides a cache's content: `sampling` of the cache identity."""
        identity: dict[str, Any] = {
            "policy": self.policy,
            "num_frames": self.num_frames,
            "min_frames": self.min_frames,
            "seed": self.seed,
        }
        if self.policy == "uniform":
            return identity | {"fps": self.fps}
        return identity | {
            "num_windows": self.num_windows,
            "time_stride_range": list(self.time_stride_range),
            "crop_scale": list(self.crop_scale),
            "crop_ratio": list(self.crop_ratio),
            "flip_probability": self.flip_probability,
        }


def draw_windows(
    policy: SamplingPolicy, key: str, timestamps_s: Float64, height: int, width: int
) -> list[WindowDraw]:
    """The windows of the clip `key`, in order.

    Args:
        timestamps_s: float64 (N,), seconds since the first shown frame, never decreasing.
        height, width: of the shown frame, in pixels.

    Raises:
        ClipError: fewer than `min_frames` different frames, or (uniform) not one window long.
    """
    shown = len(np.unique(timestamps_s))
    if shown < policy.min_frames:
        frames = "frame" if shown == 1 else "frames"
        raise ClipError(
            f"shows {shown} {frames}; a window needs at least {policy.min_frames}", stage="sample"
        )
    if policy.policy == "uniform":
        rows = _uniform_rows(policy, timestamps_s)
        whole = (0, 0, height, width)
        return [_window(row, timestamps_s, crop=whole, flipped=False) for row in rows]
    windows = []
    for number in range(policy.num_windows):
        draws = _uniform_numbers(policy, key, number)
        low, high = policy.time_stride_range
        gaps_s = (low + (high - low) * draws.gaps).astype(np.float32)
        row = sample_frame_indices(
            timestamps_s.astype(np.float32), gaps_s=gaps_s, start_fraction=draws.start
        )
        ratio = policy.crop_ratio[0] * policy.aspect, policy.crop_ratio[1] * policy.aspect
        crop = random_crop(height, width, scale=policy.crop_scale, ratio=ratio, draws=draws.crop)
        flipped = draws.flip < policy.flip_probability
        windows.append(_window(row, timestamps_s, crop=crop, flipped=flipped))
    return windows


class UniformDraws:
    """Training windows drawn among the stored frames of a `uniform` cache: the paper's gaps and
    starts by the rule and random numbers of `draw_windows`, but the nearest stored frame, the whole
    frame and no flip, since crops and flips are made on pixels, which are gone."""

    def __init__(self, *, num_windows: int, num_frames: int, seed: int) -> None:
        self.num_windows = num_windows
        self.num_frames = num_frames
        self._policy = SamplingPolicy(
            policy="windows",
            num_frames=num_frames,
            num_windows=num_windows,
            time_stride_range=KINETICS_STRIDE_RANGE_S,
            crop_scale=(1.0, 1.0),
            crop_ratio=(1.0, 1.0),
            flip_probability=0.0,
            fps=None,
            seed=seed,
            min_frames=1,
        )

    def identity(self) -> dict[str, Any]:
        """`sampling` of the cache identity: the deviation from `windows`, in words that a reader of
        cache.json understands."""
        return {
            "policy": "windows from uniform",
            "num_windows": self.num_windows,
            "num_frames": self.num_frames,
            "time_stride_range": list(self._policy.time_stride_range),
            "frames": "the nearest stored frame; no crop, no flip",
            "seed": self._policy.seed,
        }

    def rows(self, key: str, timestamps_s: Float64) -> Int64:
        """int64 (num_windows, T) into the clip's stored frames, whose times float64 (F,) increase
        from 0; a function of (seed, key, window)."""
        draws = draw_windows(self._policy, key, timestamps_s, height=1, width=1)
        return np.array([draw.frame_index for draw in draws], dtype=np.int64)


def sample_frame_indices(timestamps_s: Float32, *, gaps_s: Float32, start_fraction: float) -> Int64:
    """int64 (T,): the frames nearest to start, start + gap 0, start + gap 0 + gap 1, ...

    The release's rule in its float32 arithmetic. The start lies at `start_fraction` of the room
    that is left before the last frame, 0 where the window is longer than the clip. Of two frames
    equally near the first is taken.

    Args:
        timestamps_s: float32 (N,), seconds.
        gaps_s: float32 (T - 1,), seconds between the frames of the window.
        start_fraction: in [0, 1).
    """
    # The running sum is kept in float64 and rounded at every step, as torch.cumsum does it.
    offsets = np.concatenate([[0.0], np.cumsum(gaps_s, dtype=np.float64)]).astype(np.float32)
    room = np.maximum(timestamps_s[-1] - offsets[-1], np.float32(0))
    targets = np.float32(start_fraction) * room + offsets
    distances_s = np.abs(timestamps_s[None, :] - targets[:, None])
    nearest: Int64 = distances_s.argmin(axis=1).astype(np.int64)
    return nearest


def uniform_windows(timestamps_s: Float64, *, fps: float, num_frames: int) -> Int64:
    """int64 (W, num_frames): the frames nearest to 0, 1/fps, 2/fps, ... up to the last frame.

    Cut into consecutive windows without overlap; what is left at the end is dropped. Of two frames
    equally near the first is taken. `timestamps_s` is float64 (N,), never decreasing.
    """
    num_points = math.floor(float(timestamps_s[-1]) * fps + GRID_SLACK) + 1
    points = np.arange(num_points // num_frames * num_frames) / fps
    after = np.searchsorted(timestamps_s, points).clip(max=len(timestamps_s) - 1)
    before = np.maximum(after - 1, 0)
    closer = points - timestamps_s[before] <= timestamps_s[after] - points
    nearest = timestamps_s[np.where(closer, before, after)]
    rows: Int64 = np.searchsorted(timestamps_s, nearest).astype(np.int64)
    return rows.reshape(-1, num_frames)


def middle_frame_indices(timestamps_s: Float64, *, num_frames: int, time_stride_s: float) -> Int64:
    """int64 (num_frames,): frames at a fixed stride around the middle of the clip.

    The release's rule: the stride is a whole number of frames at the clip's average rate. A clip
    that is too short gives negative indices; the caller decides what that means.
    """
    num_shown = len(timestamps_s)
    rate = (num_shown - 1) / float(timestamps_s[-1])
    stride = max(1, round(time_stride_s * rate))
    span = (num_frames - 1) * stride
    start = min(max(0, num_shown // 2 - span // 2), num_shown - 1 - span)
    return np.arange(num_frames, dtype=np.int64) * stride + start


def random_crop(
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: Float64,
) -> tuple[int, int, int, int]:
    """top, left, height, width of a random crop: the distribution of torchvision's
    RandomResizedCrop, with its ten tries and its central crop when all of them fail.

    Args:
        draws: float64 (10, 4) in [0, 1): area, ratio, top and left of every try.
    """
    logs = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw, top_draw, left_draw in draws.tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(logs[0] + (logs[1] - logs[0]) * ratio_draw)
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = math.floor(top_draw * (height - crop_height + 1))
            left = math.floor(left_draw * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width, crop_height = width, height
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@dataclass(frozen=True)
class _Draws:
    """Uniform numbers in [0, 1) for one window; every use has its own place."""

    start: float
    flip: float
    crop: Float64
    """(10, 4)"""
    gaps: Float64
    """(T - 1,)"""


def _uniform_numbers(policy: SamplingPolicy, key: str, window: int) -> _Draws:
    """The numbers of one window, from the hash of (seed, key, window)."""
    name = f"{policy.seed}\0{window}\0{key}".encode()
    digest = hashlib.blake2b(name, digest_size=16, person=b"deltatok window").digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little"))
    raw = bits.random_raw(2 + 4 * CROP_TRIES + policy.num_frames - 1)
    # 53 random bits, as every float64 generator
    numbers = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    crop_end = 2 + 4 * CROP_TRIES
    return _Draws(
        start=float(numbers[0]),
        flip=float(numbers[1]),
        crop=numbers[2:crop_end].reshape(CROP_TRIES, 4),
        gaps=numbers[crop_end:],
    )


def _uniform_rows(policy: SamplingPolicy, timestamps_s: Float64) -> Int64:
    fps = policy.fps or 0.0
    if timestamps_s[-1] * fps > MAX_REPEATS * len(timestamps_s):
        raise ClipError(
            f"shows {len(timestamps_s)} frames over {timestamps_s[-1]:.4g} s, too few for "
            f"{fps:g} a second",
            stage="sample",
        )
    rows = uniform_windows(timestamps_s, fps=fps, num_frames=policy.num_frames)
    if len(rows) == 0:
        raise ClipError(
            f"shows {len(timestamps_s)} frames over {timestamps_s[-1]:.3f} s; a window of "
            f"{policy.num_frames} frames at {fps:g} a second needs "
            f"{(policy.num_frames - 1) / fps:.3f} s",
            stage="sample",
        )
    return rows


def _window(
    row: Int64, timestamps_s: Float64, *, crop: tuple[int, int, int, int], flipped: bool
) -> WindowDraw:
    return WindowDraw(
        frame_index=tuple(row.tolist()),
        timestamps_s=tuple(timestamps_s[row].tolist()),
        crop=crop,
        flipped=flipped,
    )
