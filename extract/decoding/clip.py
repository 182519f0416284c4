"""A clip as its plan names it -> its windows and the frames they use.

Opens the clip, with proof that it is still the one that was planned, and chooses the decoder. Runs
in a decoding process, because a decoder can hang, crash or leak. A window is drawn from the times
of the frames the clip shows, so all decoders give the same windows. To add a decoder: a function
in backends.FAST_DECODERS, and its name in `DecoderName`.
"""

import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from ...shards.errors import ClipError, UsageError
from ...shards.files import check_free, disk_errors
from ...shards.sampling import WindowDraw, draw_windows
from ...shards.stores.store import open_store
from ..config import DecoderChoice
from ..datasets.windows import EvaluationPolicy, Policy
from ..sources.archive import ArchiveFile, FileSlice
from ..sources.clip import (
    Clip,
    FrameFolder,
    Stamp,
    StoredVideo,
    TargetFrames,
    TarVideo,
    Unreadable,
    ZipFolder,
    ZipVideo,
    file_stamp,
)
from ..sources.zips import BadZip, ZipImages, opened_video
from .backends import (
    FAST_DECODERS,
    DecoderName,
    Draw,
    Step,
    decode_fast,
    decode_with_pyav,
    frames_used,
)
from .container import DecoderFailed, Float64, UInt8, VideoFile, describe, read_index
from .images import FolderImages, FrameImages, decode_frame_folder, decode_target_frames

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodedClip:
    """What one clip gave."""

    key: str
    decoder: DecoderName
    windows: list[WindowDraw]
    frames: dict[int, UInt8]
    """RGB of every frame that some window uses, by frame index: uint8 (H, W, 3), all one size; not
    to be written to."""

    def frames_of(self, window: WindowDraw) -> list[UInt8]:
        """The T frames of one of its windows, in order, before crop and flip."""
        return [self.frames[index] for index in window.frame_index]


def decode_clip(
    clip: Clip,
    *,
    policy: Policy,
    decoder: DecoderChoice = "auto",
    threads: int = 1,
    max_bytes: int = 2**32,
    starting: Callable[[Step], None] = lambda name: None,
) -> DecodedClip:
    """Draws the clip's windows and decodes their frames.

    Args:
        decoder: pyav after another one hung or crashed on this clip.
        threads: of the decoder.
        max_bytes: RGB bytes the windows' frames may have together.
        starting: called with the name of a decoder before it starts on the clip; with "download"
            at the beginning of one, and for every piece that comes.

    Raises:
        ClipError: with the reason; also where it has another size than when it was planned.
        DeltatokError: no fault of the clip's: its store cannot be reached, or the disk for
            temporary files is full.
    """

    def draw(times_s: Float64, height: int, width: int) -> list[WindowDraw]:
        windows = _windows(policy, clip, times_s, height, width)
        num_frames = len(frames_used(windows))
        if num_frames * height * width * 3 > max_bytes:
            raise ClipError(
                f"its windows use {num_frames} frames of {width}x{height}, "
                f"{num_frames * height * width * 3 / 1e9:.1f} GB at once, more than "
                f"{max_bytes / 1e9:.1f} GB: cut it into shorter clips",
                stage="sample",
            )
        return windows

    return decode_drawn(clip, draw=draw, decoder=decoder, threads=threads, starting=starting)


def _windows(
    policy: Policy, clip: Clip, times_s: Float64, height: int, width: int
) -> list[WindowDraw]:
    if not isinstance(policy, EvaluationPolicy):
        return draw_windows(policy, clip.key, times_s, height, width)
    source = clip.source
    assert isinstance(source, TargetFrames)
    if source.names:  # images tell no times: the data set's rate does
        times_s = np.arange(source.numbers[-1] + 1) / policy.fps
    return policy.draw(source.numbers, times_s, height, width)


def decode_drawn(
    clip: Clip,
    *,
    draw: Draw,
    decoder: DecoderChoice = "auto",
    threads: int = 1,
    starting: Callable[[Step], None] = lambda name: None,
) -> DecodedClip:
    """As `decode_clip`, with windows from anywhere."""
    with opened_clip(clip, starting=starting) as opened:
        if not isinstance(opened, VideoFile):
            starting("frames")
            if isinstance(clip.source, TargetFrames):
                drawn = decode_target_frames(opened, clip.source, draw=draw)
            else:
                drawn = decode_frame_folder(opened, draw=draw)
            return DecodedClip(clip.key, "frames", *drawn)
        starting("pyav")  # which reads the container for all of them
        index = read_index(opened)
        name = _first_installed() if decoder == "auto" else decoder
        if name in FAST_DECODERS:
            starting(name)
            try:
                drawn = decode_fast(name, opened, index=index, draw=draw, threads=threads)
                return DecodedClip(clip.key, name, *drawn)
            except DecoderFailed as error:
                logger.info("%s: %s; decoding it with PyAV", opened, error)
            starting("pyav")
        drawn = decode_with_pyav(opened, index=index, draw=draw, threads=threads)
        return DecodedClip(clip.key, "pyav", *drawn)


@contextmanager
def opened_clip(
    clip: Clip, *, starting: Callable[[Step], None] = lambda name: None
) -> Iterator[VideoFile | FrameImages]:
    """What to decode. Held against its size when it is opened and again when it is left. Raises as
    `decode_clip`."""
    with ExitStack() as stack:
        if isinstance(clip.source, StoredVideo):
            path = stack.enter_context(_downloaded(clip, clip.source, starting=starting))
            clip = replace(clip, path=path, source=None)
        yield stack.enter_context(_opened(clip))


@contextmanager
def _downloaded(
    clip: Clip, source: StoredVideo, *, starting: Callable[[Step], None]
) -> Iterator[Path]:
    """The path, in this process, of a copy without a name: nothing of it outlives a kill. (Where
    there is no /proc it has a name, because a path in /dev/fd shares the position of the file.)"""
    starting("download")
    folder = Path(tempfile.gettempdir())
    has_proc = Path("/proc/self/fd").is_dir()
    temporary = tempfile.TemporaryFile if has_proc else tempfile.NamedTemporaryFile
    check_free(folder, clip.size_bytes, what=f"the copy of {source.address} (TMPDIR)")
    with ExitStack() as stack:
        with disk_errors(folder):
            file = stack.enter_context(temporary(dir=folder))
        try:
            for chunk in open_store(source.store).stream(source.name, stamp=source.stamp):
                with disk_errors(folder):
                    file.write(chunk)
                    file.flush()
                starting("download")
        except FileNotFoundError as error:
            raise ClipError(
                f"{source.address}: is not there, or was replaced since it was found", stage="open"
            ) from error
        yield Path("/proc/self/fd", str(file.name))  # the name is the descriptor, or a path


@contextmanager
def _opened(clip: Clip) -> Iterator[VideoFile | FrameImages]:
    path, source = clip.path, clip.source
    if isinstance(source, Unreadable):
        raise ClipError(source.reason, stage="open")
    try:
        if isinstance(source, ZipFolder | ZipVideo):
            with ArchiveFile(path) as archive:
                _check_stamp(path, archive.stamp, source.stamp)
                if isinstance(source, ZipVideo):
                    with opened_video(path, archive, source) as video:
                        _check_size(video.size, clip.size_bytes)
                        yield video
                else:
                    images = ZipImages(archive, source)
                    _check_size(images.size_bytes, clip.size_bytes)
                    yield images
            with ArchiveFile(path) as archive:
                _check_stamp(path, archive.stamp, source.stamp)
        elif isinstance(source, FrameFolder) or (isinstance(source, TargetFrames) and source.names):
            names = source.names if isinstance(source, TargetFrames) else None
            folder = FolderImages(path, names)
            _check_size(folder.size_bytes, clip.size_bytes)
            yield folder
            _check_size(FolderImages(path, names).size_bytes, folder.size_bytes)
        elif isinstance(source, TarVideo):
            _check_stamp(path, file_stamp(path), source.stamp)
            yield FileSlice(path, source.offset, clip.size_bytes)
            _check_stamp(path, file_stamp(path), source.stamp)
        else:
            before = file_stamp(path) if path.exists() else None
            if before is not None:
                _check_size(before[0], clip.size_bytes)
            yield path
            if before is not None:
                _check_stamp(path, file_stamp(path), before)
    except (OSError, BadZip, UsageError) as error:
        raise ClipError(f"cannot be opened: {describe(error)}", stage="open") from error


def _check_size(got: int, planned: int) -> None:
    if got != planned:
        raise ClipError(
            f"was changed: had {planned} bytes when it was found, now {got}", stage="open"
        )


def _check_stamp(path: Path, got: Stamp, wanted: Stamp) -> None:
    if got != wanted:
        size = f"had {wanted[0]} bytes, now {got[0]}" if got[0] != wanted[0] else "written to"
        raise ClipError(f"{path.name} was changed since it was opened: {size}", stage="open")


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
