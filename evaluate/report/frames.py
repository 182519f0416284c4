"""Single frames of videos and data sets, for the pictures of a report only.

Decoded by extract/'s own rules, so that a frame's index means what it means in the cache.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...extract.decoding.clip import decode_drawn
from ...extract.sources.clip import VIDEO_SUFFIXES, Clip, TargetFrames
from ...extract.sources.find import find_clips
from ...shards.errors import ClipError
from ...shards.evaluation.targets import Target
from ...shards.sampling import WindowDraw
from .pictures import Tile

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
        frames = decode_drawn(clip, draw=draw, decoder="pyav").frames
    except ClipError as error:
        logger.warning("%s: its pictures have no frames: %s", clip.key, error)
        return None
    return [frames[index] for index in indices]


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
