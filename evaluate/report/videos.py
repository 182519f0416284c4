"""Single frames of videos, for the pictures of a report only.

Decoded by extract/'s own rules, so that a frame's index means what it means in the cache.
"""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...extract.decoding.clip import decode_drawn
from ...extract.sampling import WindowDraw
from ...extract.sources.clip import Clip
from ...extract.sources.find import find_clips
from ...shards.errors import UnusableClip

logger = logging.getLogger(__name__)


def clips_by_key(videos: Sequence[str]) -> dict[str, Clip]:
    """Clip key -> clip, by the same rule that named the clips of the cache."""
    return {clip.key: clip for clip in find_clips(videos)}


def read_frames(clip: Clip, indices: Sequence[int]) -> list[NDArray[np.uint8]] | None:
    """Frames uint8 (H, W, 3), RGB, by index in presentation order, as shown (rotation applied).

    None, with a warning, where the file does not give them: a report without one picture's frames
    is still a report.
    """

    def draw(_times_s: NDArray[np.float64], height: int, width: int) -> list[WindowDraw]:
        window = WindowDraw(
            frame_index=tuple(indices),
            timestamps_s=(0.0,) * len(indices),
            crop=(0, 0, height, width),
            flipped=False,
        )
        return [window]

    try:
        frames = decode_drawn(
            clip.path,
            draw=draw,
            source=clip.source,
            size_bytes=clip.size_bytes,
            decoder="pyav",
        ).frames
    except UnusableClip as error:
        logger.warning("%s: its pictures have no frames: %s", clip.key, error)
        return None
    return [frames[index] for index in indices]
