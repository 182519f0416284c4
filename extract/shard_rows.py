"""One shard's clips, decoded, through pixels and backbone, to the rows its writer takes."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..shards.plan import PlanEntry
from ..shards.records import Quarantined
from ..shards.windows import ShardRows
from .features import StagedClip, WindowFeatures
from .progress import Progress, StageClock
from .sampling import WindowDraw
from .stop import StopRequest

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardMaker:
    """What the shards of a run have in common."""

    features: WindowFeatures
    num_frames: int
    clips: Iterator[StagedClip | Quarantined]
    """The clips of all shards to make, in order."""
    stop: StopRequest
    clock: StageClock
    progress: Progress

    def make(self, entries: Sequence[PlanEntry]) -> Callable[[], ShardRows]:
        """The rows of the shard with these clips, the next ones of `clips`.

        They are to be asked for once, by the thread that writes them: it waits for the device then,
        and this one can go on to the next shard.
        Raises Stopped when a stop is asked for: the shard is abandoned, nothing of it is stored.
        """
        windows = _Windows()
        for entry in entries:
            with self.clock.at("decode"), self.stop.at_once():
                clip = next(self.clips)
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
            values = self.features.finish_later()
        return lambda: windows.to_rows(values(), num_frames=self.num_frames)

    def _run(self, clip: StagedClip) -> None:
        while clip.pixels:
            self.stop.check()
            with self.clock.at("pixels"):
                pixels = clip.pixels.popleft()()  # and its decoded frames are let go of
            with self.clock.at("backbone"):
                self.features.add(pixels)
        self.progress.add_clip(num_frames=len(clip.draws) * self.num_frames)


@dataclass
class _Windows:
    """What is known of a shard's windows beside their features; grows clip by clip."""

    draws: list[WindowDraw] = field(default_factory=list)
    clips: list[int] = field(default_factory=list)
    decoders: dict[str, str] = field(default_factory=dict)
    quarantined: list[Quarantined] = field(default_factory=list)

    def add(self, clip: StagedClip) -> None:
        self.clips += [len(self.decoders)] * len(clip.draws)
        self.decoders[clip.key] = clip.decoder
        self.draws += clip.draws

    def to_rows(self, values: NDArray[Any], *, num_frames: int) -> ShardRows:
        times = [draw.timestamps_s for draw in self.draws]
        frames = [draw.frame_index for draw in self.draws]
        crops = [draw.source_crop for draw in self.draws]
        return ShardRows(
            tokens=values,
            timestamps_s=np.array(times, dtype=np.float32).reshape(-1, num_frames),
            frame_index=np.array(frames, dtype=np.int32).reshape(-1, num_frames),
            crop=np.array(crops, dtype=np.float32).reshape(-1, 4),
            flipped=np.array([draw.flipped for draw in self.draws], dtype=np.bool_),
            clip=np.array(self.clips, dtype=np.int32),
            keys=list(self.decoders),
            decoders=self.decoders,
            quarantined=self.quarantined,
        )
