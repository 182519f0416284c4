"""One shard's clips, decoded, through pixels and backbone, to the rows its writer takes.

Called by making.py for one shard after the other.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..shards.plan import PlanEntry
from ..shards.records import Quarantined
from .backbone import Backbone
from .features import WindowFeatures
from .pixels import window_pixels
from .pool import DecodedClip
from .progress import Progress, StageClock
from .sampling import WindowDraw
from .stop import StopRequest
from .writer import ShardRows

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardMaker:
    """What the shards of a run have in common."""

    backbone: Backbone
    features: WindowFeatures
    frame_size: int
    num_frames: int
    decoded: Iterator[DecodedClip | Quarantined]
    """The clips of all shards to make, in order."""
    stop: StopRequest
    clock: StageClock
    progress: Progress

    def make(self, entries: Sequence[PlanEntry]) -> ShardRows:
        """The rows of the shard with these clips, the next ones of `decoded`.

        Raises Stopped when a stop is asked for: the shard is abandoned, nothing of it is stored.
        """
        windows = _Windows()
        for entry in entries:
            with self.clock.at("decode"), self.stop.at_once():
                clip = next(self.decoded)
            if isinstance(clip, Quarantined):
                assert clip.clip == entry.key
                _LOGGER.warning("quarantined %s (%s): %s", clip.clip, clip.stage, clip.reason)
                windows.quarantined.append(clip)
                self.progress.add_clip(num_frames=0)
            else:
                assert clip.key == entry.key
                windows.add(clip)
                self._run(clip)
        with self.clock.at("backbone"):
            values = self.features.finish()
        return windows.to_rows(values, num_frames=self.num_frames)

    def _run(self, clip: DecodedClip) -> None:
        for window in clip.windows:
            self.stop.check()
            with self.clock.at("pixels"):
                pixels = window_pixels(
                    window.frames,
                    window.draw,
                    frame_size=self.frame_size,
                    device=self.backbone.device,
                )
            with self.clock.at("backbone"):
                self.features.add(pixels)
        self.progress.add_clip(num_frames=len(clip.windows) * self.num_frames)


@dataclass
class _Windows:
    """What is known of a shard's windows beside their features; grows clip by clip."""

    draws: list[WindowDraw] = field(default_factory=list)
    clips: list[int] = field(default_factory=list)
    decoders: dict[str, str] = field(default_factory=dict)
    quarantined: list[Quarantined] = field(default_factory=list)

    def add(self, clip: DecodedClip) -> None:
        self.clips += [len(self.decoders)] * len(clip.windows)
        self.decoders[clip.key] = clip.decoder
        self.draws += [window.draw for window in clip.windows]

    def to_rows(self, values: NDArray[Any], *, num_frames: int) -> ShardRows:
        times = [draw.timestamps_s for draw in self.draws]
        frames = [draw.frame_index for draw in self.draws]
        crops = [draw.crop for draw in self.draws]
        return ShardRows(
            values=values,
            timestamps_s=np.array(times, dtype=np.float32).reshape(-1, num_frames),
            frame_index=np.array(frames, dtype=np.int32).reshape(-1, num_frames),
            crop=np.array(crops, dtype=np.float32).reshape(-1, 4),
            flipped=np.array([draw.flipped for draw in self.draws], dtype=np.bool_),
            clip=np.array(self.clips, dtype=np.int32),
            keys=list(self.decoders),
            decoders=self.decoders,
            quarantined=self.quarantined,
        )
