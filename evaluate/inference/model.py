"""The Python interface: a trained world model, from pixels to possible futures.

    from deltatok.evaluate import DeltaWorld

    world = DeltaWorld.from_pretrained("runs/quickstart/world-model")
    futures = world.predict("clip.mp4", horizon_s=0.6, num_samples=20, seed=0)
    futures.save_grid("futures.png")

Letters: C frames seen, S samples, H steps, N patch tokens of a frame, D channels.
"""

from functools import partial
from pathlib import Path

import torch
from numpy.typing import ArrayLike

from ..extract.backbone import Autocast, Backbone
from ..shards.errors import UsageError
from ..train.config import Device, Precision
from ..train.devices import precision_name
from .footage import Glance, Video, look
from .futures import Futures
from .parts import Parts, load_parts
from .pick_device import pick_device
from .stream import WorldState, step_times

__all__ = ["DeltaWorld", "Futures", "WorldState"]


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
        frame_size: int | None = None,
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
            frame_size: side of the square that frames are resized to; by default the training's.
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
        place = pick_device(device)
        autocast: Autocast = "float32"
        if precision_name(precision, place) == "bfloat16":
            autocast = "bfloat16"
        parts = load_parts(
            Path(folder),
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
        self.parts.save(Path(folder))

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
