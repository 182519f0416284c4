"""Single frames of videos, for the pictures of a report only.

Decoded by extract/'s own rules, so that a frame's index means what it means in the cache.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..extract.packets import read_index
from ..extract.pyav_decoder import decode_with_pyav
from ..extract.sampling import WindowDraw
from ..extract.sources import find_clips
from ..extract.unusable import UnusableClip

logger = logging.getLogger(__name__)


def clip_paths(videos: Sequence[str]) -> dict[str, Path]:
    """Clip key -> file, by the same rule that named the clips of the cache."""
    return {clip.key: clip.path for clip in find_clips(videos)}


def read_frames(path: Path, indices: Sequence[int]) -> list[NDArray[np.uint8]] | None:
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
        _, frames = decode_with_pyav(path, index=read_index(path), draw=draw, threads=1)
    except UnusableClip as error:
        logger.warning("%s: its pictures have no frames: %s", path, error)
        return None
    return [frames[index] for index in indices]
