"""One clip in, its windows and the frames they use out; which decoder, and when to use the other.

Runs inside a child process (`child.py`), because a decoder can hang, crash or leak. A window is
drawn from the times of the frames the clip shows, so all decoders give the same windows. To add a
decoder: a function like those in FAST_DECODERS, and its name in `DecoderName`.

A clip as its plan names it -> what a decoder reads, with proof that it is still that clip.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from ...shards.errors import UnusableClip, UsageError
from ..config import DecoderChoice
from ..datasets.windows import EvaluationPolicy, Policy
from ..sampling import WindowDraw, draw_windows
from ..sources.clip import (
    FrameFolder,
    Source,
    Stamp,
    TargetFrames,
    TarMember,
    Unreadable,
    ZipFolder,
    list_frames,
)
from ..sources.tars import FileSlice
from ..sources.zips import MAX_FRAME_BYTES, BadZip, ZipImages, ZipParts
from .backends import Draw, decode_with_decord, decode_with_pyav, decode_with_torchcodec
from .container import DecoderFailed, Float64, UInt8, VideoFile, describe, read_index
from .images import FrameImages, decode_frames, decode_images


class FolderImages:
    """Image files below a folder, by name: its frames, or those named."""

    def __init__(self, folder: Path, names: Sequence[str] | None = None) -> None:
        """OSError where it cannot be read, or one of `names` is not there."""
        self._folder = folder
        if names is None:
            self._sizes = dict(list_frames(folder))
        else:
            self._sizes = {name: (folder / name).stat().st_size for name in names}

    @property
    def names(self) -> list[str]:
        return list(self._sizes)

    @property
    def size_bytes(self) -> int:
        """Of all together."""
        return sum(self._sizes.values())

    def read(self, name: str) -> bytes:
        if self._sizes[name] > MAX_FRAME_BYTES:
            raise UnusableClip(f"{name}: {self._sizes[name]} bytes, no frame", stage="decode")
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise UnusableClip(f"{name}: {describe(error)}", stage="decode") from error


@contextmanager
def opened_clip(
    path: Path, source: Source | None, *, size_bytes: int | None = None
) -> Iterator[VideoFile | FrameImages]:
    """What to decode. Held against its size when it is opened and again when it is left.

    Raises:
        UnusableClip: it cannot be opened, or is not what it was when it was planned.
    """
    if isinstance(source, Unreadable):
        raise UnusableClip(source.reason, stage="open")
    try:
        if isinstance(source, ZipFolder):
            with ZipParts(path) as parts:
                _check_stamp(path, parts.stamp, source.stamp)
                images = ZipImages(parts, source)
                _check_size(images.size_bytes, size_bytes)
                yield images
        elif isinstance(source, FrameFolder):
            folder = FolderImages(path)
            _check_size(folder.size_bytes, size_bytes)
            yield folder
            _check_size(FolderImages(path).size_bytes, folder.size_bytes)
        elif isinstance(source, TargetFrames) and source.names:
            listed = FolderImages(path, source.names)
            _check_size(listed.size_bytes, size_bytes)
            yield listed
            _check_size(FolderImages(path, source.names).size_bytes, size_bytes)
        elif isinstance(source, TarMember):
            _check_stamp(path, _stamp(path), source.stamp)
            yield FileSlice(path, source.offset, size_bytes or 0)
            _check_stamp(path, _stamp(path), source.stamp)
        else:
            before = _stamp(path) if path.exists() else None
            if before is not None:
                _check_size(before[0], size_bytes)
            yield path
            if before is not None:
                _check_stamp(path, _stamp(path), before)
    except (OSError, BadZip, UsageError) as error:
        raise UnusableClip(f"cannot be opened: {describe(error)}", stage="open") from error


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _check_size(got: int, planned: int | None) -> None:
    if planned is not None and got != planned:
        raise UnusableClip(
            f"was changed: had {planned} bytes when it was found, now {got}", stage="open"
        )


def _check_stamp(path: Path, got: Stamp, wanted: Stamp) -> None:
    if got != wanted:
        size = f"had {wanted[0]} bytes, now {got[0]}" if got[0] != wanted[0] else "written to"
        raise UnusableClip(f"{path.name} was changed since it was opened: {size}", stage="open")


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
