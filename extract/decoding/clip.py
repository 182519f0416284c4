"""One clip in, its windows and the frames they use out; which decoder, and when to use the other.

Runs inside a child process (`child.py`), because a decoder can hang, crash or leak. A window is
drawn from the times of the frames the clip shows, so all decoders give the same windows. To add a
decoder: a function like those in FAST_DECODERS, and its name in `DecoderName`.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from ..shards.errors import UsageError
from .clips import Source, TargetFrames
from .config import DecoderChoice
from .decord_decoder import decode_with_decord
from .evaluation import EvaluationPolicy, Policy
from .frames_decoder import decode_frames
from .opened_clip import opened_clip
from .packets import Float64, UInt8, VideoFile, read_index
from .pyav_decoder import Draw, decode_with_pyav
from .sampling import WindowDraw, draw_windows
from .target_decoder import decode_images
from .torchcodec_decoder import decode_with_torchcodec
from .trust import DecoderFailed
from .unusable import UnusableClip

logger = logging.getLogger(__name__)

DecoderName = Literal["decord", "torchcodec", "pyav", "frames"]
"""frames: images read with Pillow."""

FAST_DECODERS: dict[DecoderName, Callable[..., tuple[list[WindowDraw], dict[int, UInt8]]]] = {
    "decord": decode_with_decord,
    "torchcodec": decode_with_torchcodec,
}


@dataclass(frozen=True)
class DecodedFrames:
    """What one clip gave."""

    decoder: DecoderName
    windows: list[WindowDraw]
    frames: dict[int, UInt8]
    """RGB of every frame that some window uses, by frame index: uint8 (H, W, 3), all one size."""


def decode_clip(
    path: Path,
    *,
    key: str,
    policy: Policy,
    source: Source | None = None,
    size_bytes: int | None = None,
    decoder: DecoderChoice = "auto",
    threads: int = 1,
    max_bytes: int = 2**32,
    starting: Callable[[DecoderName], None] = lambda name: None,
) -> DecodedFrames:
    """Draws the clip's windows and decodes their frames.

    Args:
        source: where in `path` the clip lies; None: it is the video.
        size_bytes: what the clip had when it was planned; another size is another clip.
        decoder: pyav after another one hung or crashed on this clip.
        threads: of the decoder.
        max_bytes: RGB bytes the windows' frames may have together.
        starting: called with the name of a decoder before it starts on the clip.

    Raises:
        UnusableClip: with the reason.
    """

    def draw(times_s: Float64, height: int, width: int) -> list[WindowDraw]:
        windows = _windows(policy, key, source, times_s, height, width)
        num_frames = len({frame for window in windows for frame in window.frame_index})
        if num_frames * height * width * 3 > max_bytes:
            raise UnusableClip(
                f"its windows use {num_frames} frames of {width}x{height}, "
                f"{num_frames * height * width * 3 / 1e9:.1f} GB at once, more than "
                f"{max_bytes / 1e9:.1f} GB: cut it into shorter clips",
                stage="sample",
            )
        return windows

    return decode_drawn(
        path,
        draw=draw,
        source=source,
        size_bytes=size_bytes,
        decoder=decoder,
        threads=threads,
        starting=starting,
    )


def _windows(
    policy: Policy, key: str, source: Source | None, times_s: Float64, height: int, width: int
) -> list[WindowDraw]:
    if not isinstance(policy, EvaluationPolicy):
        return draw_windows(policy, key, times_s, height, width)
    assert isinstance(source, TargetFrames)
    if source.names:  # images tell no times: the data set's rate does
        times_s = np.arange(source.numbers[-1] + 1) / policy.fps
    return policy.draw(source.numbers, times_s, height, width)


def decode_drawn(
    path: Path,
    *,
    draw: Draw,
    source: Source | None = None,
    size_bytes: int | None = None,
    decoder: DecoderChoice = "auto",
    threads: int = 1,
    starting: Callable[[DecoderName], None] = lambda name: None,
) -> DecodedFrames:
    """As `decode_clip`, with windows from anywhere."""
    with opened_clip(path, source, size_bytes=size_bytes) as clip:
        if isinstance(clip, VideoFile):
            return _decode_video(
                clip, draw=draw, decoder=decoder, threads=threads, starting=starting
            )
        starting("frames")
        if isinstance(source, TargetFrames):
            windows, frames = decode_images(clip, source, draw=draw)
            return DecodedFrames("frames", windows, frames)
        windows, frames = decode_frames(clip, draw=draw)
        return DecodedFrames("frames", windows, frames)


def _decode_video(
    video: VideoFile,
    *,
    draw: Draw,
    decoder: DecoderChoice,
    threads: int,
    starting: Callable[[DecoderName], None],
) -> DecodedFrames:
    starting("pyav")  # which reads the container for both
    index = read_index(video)
    name = _first_installed() if decoder == "auto" else decoder
    if name in FAST_DECODERS:
        starting(name)
        try:
            windows, frames = FAST_DECODERS[name](video, index=index, draw=draw, threads=threads)
            return DecodedFrames(name, windows, frames)
        except DecoderFailed as error:
            logger.info("%s: %s; decoding it with PyAV", video, error)
        starting("pyav")
    windows, frames = decode_with_pyav(video, index=index, draw=draw, threads=threads)
    return DecodedFrames("pyav", windows, frames)


def check_installed(choice: DecoderChoice) -> None:
    """Raises UsageError if the decoder asked for is not there."""
    if choice in FAST_DECODERS and importlib.util.find_spec(choice) is None:
        raise UsageError(
            f"decoder: got {choice}, which is not installed: run `pip install {choice}` "
            "(torchcodec also needs FFmpeg's libraries), or leave --decoder out"
        )


@cache
def _first_installed() -> DecoderName:
    for name in FAST_DECODERS:
        if importlib.util.find_spec(name) is not None:
            return name
    return "pyav"
