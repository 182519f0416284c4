"""The Python interface: a trained world model, from pixels to possible futures.

    from deltatok.evaluate import DeltaWorld

    world = DeltaWorld.from_pretrained("runs/quickstart/world-model")
    futures = world.predict("clip.mp4", horizon_s=0.6, num_samples=20, seed=0)
    futures.save_grid("futures.png")

A sequence of delta tokens starts with black -> its first frame. So that old frames can be dropped
without being encoded again, each frame that is seen leaves two tokens: from black (in case it
becomes the first) and from the frame before it.

Letters: C frames seen, S samples, H steps, N patch tokens of a frame, D channels.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ...extract.backbone import Autocast, Backbone
from ...extract.pixels import resize_bilinear
from ...shards.errors import UsageError
from ...shards.evaluation.geometry import FrameSize, frame_shape
from ...shards.files import local_path
from ...shards.running.devices import DEVICES, choose_device, precision_name
from ...train.config import Device, Precision
from ...train.data.order import generator
from .footage import Glance, Video, check_frames, frame_planes, look
from .futures import Futures
from .parts import Parts, load_parts

__all__ = ["DeltaWorld", "Futures", "WorldState"]


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
        seen = resize_bilinear(frame_planes(picture), frame_shape(parts.frame_size))
        with parts.inference_mode():
            features = parts.backbone.tokens(seen)
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
        with parts.inference_mode():
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


class DeltaWorld:
    """A world model with all that it needs to start from pixels: backbone, tokenizer and, where
    there is one, a head. Frames are seen whole, resized to the square that it was trained at."""

    def __init__(self, parts: Parts, *, num_context: int, samples_at_once: int) -> None:
        self.parts = parts
        self.num_context = num_context
        self._samples_at_once = samples_at_once

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        tokenizer: str | Path | None = None,
        backbone: str | Path | None = None,
        head: str | Path | None = None,
        frame_size: FrameSize | None = None,
        num_context: int = 4,
        samples_at_once: int = 8,
        device: Device = "auto",
        precision: Precision = "auto",
    ) -> "DeltaWorld":
        """The world model of a folder, ready to predict.

        `folder` is a run of `deltatok-train world`, the folder of a pipeline that has one, or what
        `save_pretrained` wrote. Tokenizer and backbone are found among the folders beside it by the
        weights it was trained with; pass them where they lie elsewhere.

        Args:
            tokenizer: folder of the tokenizer.
            backbone: folder or hub id of the backbone.
            head: folder of a segmentation, depth or RGB head; by default the only one beside it
                that was trained on this backbone, if there is one.
            frame_size: what frames are resized to, the side of a square or (height, width); by
                default the training's.
            num_context: frames a forecast starts from, at most (paper: 4).
            samples_at_once: samples decoded together; memory depends on it.

        Raises:
            UsageError: no world model there; tokenizer or backbone neither given nor found.
            CacheMismatch: a part that the world was not trained with; names both fingerprints.
        """
        if num_context < 1 or samples_at_once < 1:
            raise UsageError(
                f"num_context {num_context}, samples_at_once {samples_at_once}: wanted 1 or more"
            )
        place = choose_device(device, automatic=DEVICES)
        autocast = cast(Autocast, precision_name(precision, place))
        parts = load_parts(
            local_path(folder),
            tokenizer=tokenizer,
            backbone=backbone,
            head=head,
            frame_size=frame_size,
            load_backbone=partial(Backbone.load, device=place, autocast=autocast),
        )
        return cls(parts, num_context=num_context, samples_at_once=samples_at_once)

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy world model, tokenizer, head and backbone into one folder for `from_pretrained`,
        which can be moved. A backbone that came from the hub is named there, not copied."""
        self.parts.save(local_path(folder))

    def predict(
        self,
        video: Video,
        *,
        times_s: ArrayLike | None = None,
        fps: float | None = None,
        horizon_s: float = 0.6,
        num_samples: int = 20,
        seed: int = 0,
        step_s: float = 0.2,
        at_s: float | None = None,
    ) -> Futures:
        """Possible futures of a video.

        Of the video, up to `num_context` frames are seen, `step_s` apart, the last one at `at_s`.

        Args:
            video: a video file, a folder of frames named `*_<seconds>.jpg`, or frames uint8
                (T, H, W, 3), RGB, with either `times_s` (T seconds) or `fps`.
            horizon_s: how far to look ahead, seconds.
            num_samples: S; 1 of a model with a learned query.
            seed: of the samples' noise; the same seed gives the same futures.
            step_s: seconds of a step, about: a whole number of equal steps makes the horizon.
            at_s: where the future begins, seconds from the video's first frame; by default its
                end. What the video shows after it is kept for pictures (`Futures.came`).

        Raises:
            UsageError: no such video, frames of another type or shape, times that make no sense.
            DeltatokError: a video that cannot be decoded; says why.
        """
        steps, exact_s = step_times(horizon_s, step_s)
        glance = Glance(num_context=self.num_context, step_s=exact_s, num_steps=steps, at_s=at_s)
        footage = look(video, glance, times_s=times_s, fps=fps)
        state = self.stream()
        for frame, time_s in zip(footage.seen, footage.times_s, strict=True):
            state.add(frame, time_s)
        return state.predict(
            horizon_s=horizon_s,
            num_samples=num_samples,
            seed=seed,
            step_s=step_s,
            came=footage.after,
        )

    def stream(self) -> WorldState:
        """A state that takes one frame at a time, without any frame yet."""
        return WorldState(
            self.parts, num_context=self.num_context, samples_at_once=self._samples_at_once
        )

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.parts.backbone.device
