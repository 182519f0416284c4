"""What a world model has seen so far, one frame at a time: a feature map and the past tokens.

A sequence of delta tokens starts with black -> its first frame. So that old frames can be dropped
without being encoded again, each frame leaves two tokens: from black (in case it becomes the first)
and from the frame before it. Called by `api.py`, for whole videos too: what a stream gives is what
a video gives, bit for bit.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..extract.resize import resize_bilinear
from ..shards.errors import UsageError
from ..train.draws import generator
from .footage import check_frames, frame_planes
from .futures import Futures
from .parts import Parts


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """One frame that was seen."""

    time_s: float
    first: Tensor
    """(D,) its delta token from black."""
    delta: Tensor
    """(D,) its delta token from the frame before it."""


class WorldState:
    """Made by `DeltaWorld.stream`. Keeps the last frame's features and, of each of the last
    `num_context` frames, two tokens and (for pictures) its pixels."""

    def __init__(self, parts: Parts, *, num_context: int, samples_at_once: int) -> None:
        self._parts = parts
        self._seen: deque[_Seen] = deque(maxlen=num_context)
        self._last: Tensor | None = None
        self._pictures: deque[NDArray[np.uint8]] = deque(maxlen=num_context)
        self._samples_at_once = samples_at_once

    def __len__(self) -> int:
        """Frames that the next prediction starts from, at most `num_context`."""
        return len(self._seen)

    def add(self, frame: NDArray[np.uint8] | Tensor, time_s: float) -> None:
        """See one frame, uint8 (H, W, 3), RGB, at a time in seconds after all earlier ones.

        Times count from anywhere: only differences matter. The model was trained with 1/25 to 1/3 s
        between frames. UsageError for another shape or a time that does not go on.
        """
        picture = check_frames(frame[None])[0]
        if not math.isfinite(time_s):
            raise UsageError(f"time_s: got {time_s}, wanted seconds")
        if self._seen and not time_s > self._seen[-1].time_s:
            raise UsageError(
                f"time_s: got {time_s:g} after {self._seen[-1].time_s:g}; frames come in order of "
                "time, each after the one before"
            )
        if self._pictures and picture.shape != self._pictures[-1].shape:
            raise UsageError(
                f"frame: got {picture.shape[0]}x{picture.shape[1]} pixels after "
                f"{self._pictures[-1].shape[0]}x{self._pictures[-1].shape[1]}; frames of one video "
                "have one size: begin another stream"
            )
        parts, grid = self._parts, self._parts.grid
        side = parts.frame_size
        with parts.arithmetic():
            features = parts.backbone.tokens(resize_bilinear(frame_planes(picture), (side, side)))
            black = parts.black[None]
            first = parts.tokenizer.encode(black, features, grid=grid)[0].float()
            delta = first
            if self._last is not None:
                delta = parts.tokenizer.encode(self._last[None], features, grid=grid)[0].float()
        self._last = features[0]
        self._seen.append(_Seen(time_s=float(time_s), first=first, delta=delta))
        self._pictures.append(picture)

    def predict(
        self,
        *,
        horizon_s: float = 0.6,
        num_samples: int = 20,
        seed: int = 0,
        step_s: float = 0.2,
        came: NDArray[np.uint8] | Sequence[Any] = (),
    ) -> Futures:
        """Possible futures up to `horizon_s` after the last frame; see `DeltaWorld.predict`.

        The state stays as it is. came: frames (A, H, W, 3) that came then, for pictures only.
        """
        if self._last is None:
            raise UsageError("predict before any frame was seen: call add(frame, time_s) first")
        steps, step_s = step_times(horizon_s, step_s)
        if num_samples < 1:
            raise UsageError(f"num_samples: got {num_samples}, wanted at least 1")
        parts, device = self._parts, self._parts.backbone.device
        # Learned query: one future, whatever is asked for.
        noise = None
        if parts.world.config.use_bom:
            drawn = parts.world.draw_noise(
                steps, 1, num_samples, 1, generator=generator("predict", seed)
            )
            noise = drawn.to(device)
        seen = np.array([frame.time_s for frame in self._seen])
        ahead = seen[-1] + step_s * np.arange(1, steps + 1)
        times = torch.tensor(np.concatenate([seen, ahead]) - seen[0], dtype=torch.float32)
        tokens = [self._seen[0].first, *(frame.delta for frame in list(self._seen)[1:])]
        with parts.arithmetic():
            found = parts.world.rollout(
                torch.stack(tokens)[None],
                times[None].to(device),
                horizon=steps,
                num_samples=num_samples,
                noise=noise,
            )
        return Futures(
            tokens=found[0].float(),
            times_s=tuple((step_s * np.arange(1, steps + 1)).tolist()),
            seen_s=tuple((seen - seen[-1]).tolist()),
            seen=np.stack(list(self._pictures)),
            came=np.asarray(came, np.uint8),
            last=self._last,
            parts=parts,
            samples_at_once=self._samples_at_once,
        )


def step_times(horizon_s: float, step_s: float) -> tuple[int, float]:
    """Steps to a horizon, and the seconds of each: near to `step_s`, and hitting the horizon.
    UsageError unless both are above 0 and finite."""
    for name, value in (("horizon_s", horizon_s), ("step_s", step_s)):
        if not 0 < value < float("inf"):
            raise UsageError(f"{name}: got {value}, wanted seconds above 0")
    steps = max(1, round(horizon_s / step_s))
    return steps, horizon_s / steps
