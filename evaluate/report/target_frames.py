"""The frames of an evaluation cache, for pictures: read from the data set, cut as they were.
The plan of the cache says which files they are.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...extract.sources.clip import VIDEO_SUFFIXES, Clip, TargetFrames
from ...shards.evaluation.targets import Target
from .pictures import Tile
from .videos import read_frames

logger = logging.getLogger(__name__)


def frames_of_crop(
    target: Target, root: Path, numbers: Sequence[int], crop: NDArray[np.float32]
) -> tuple[Tile, ...]:
    """What a window shows, uint8 (H, W, 3) at the size of the source; none, with a warning, where
    the data set does not give it.

    numbers: of the window's frames in their sequence; crop: top, left, height, width, pixels.
    """
    is_video = len(target.frames) == 1 and Path(target.frames[0]).suffix.lower() in VIDEO_SUFFIXES
    if not is_video and len(target.frames) != len(numbers):
        return ()
    try:
        size = sum((root / name).stat().st_size for name in target.frames)
    except OSError as error:
        logger.warning("%s: its pictures have no frames: %s", target.key, error)
        return ()
    clip = Clip(
        key=target.key,
        path=root / target.frames[0] if is_video else root,
        size_bytes=size,
        source=TargetFrames(tuple(numbers), () if is_video else target.frames),
    )
    found = read_frames(clip, numbers) or []
    top, left, height, width = (float(side) for side in crop)
    rows = slice(round(top), round(top + height))
    columns = slice(round(left), round(left + width))
    return tuple(frame[rows, columns] for frame in found)
