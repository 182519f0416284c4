"""The video decoders: PyAV, and two fast ones that are believed only as far as they can be checked.

**PyAV** reads every frame in order, skips bad packets and honours edit lists. It is the slowest,
and right on every file that can be decoded at all, because what is stored is what it showed: times
and pixels come from the same decoded frame.

**decord** is fast, and silently wrong in known ways: a seek can land on another frame, a frame that
cannot be decoded is replaced by a copy of its neighbour, an edit list is ignored. So it reads only
supported files, in order, with every repaired frame an error, to the end, so that a frame lost on
the way is missed there; and its first frame must be the one that PyAV shows.

**torchcodec** (optional) seeks to the frames that windows use, which pays on long videos. It seeks
by a scan of the whole file (`seek_mode="exact"`), and is believed only for supported files, where
the time of every frame it gives is the time of the packet asked for, and where its first frame is
the one that PyAV shows. It does not see damage to frames that no window uses; the others do, and
then count frames anew. The tests compare its frames with an in-order decode for every container and
codec it is let near.

Whatever a fast decoder stumbles over, PyAV reads instead.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Set
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Literal

import numpy as np
from av.video.reformatter import VideoReformatter

from ...shards.errors import ClipError
from ...shards.sampling import WindowDraw
from .container import (
    DecoderFailed,
    FileIndex,
    Float64,
    UInt8,
    VideoFile,
    describe,
    frames_of,
    open_video,
    read_packets,
    require_supported,
    shown_times,
    to_rgb,
)

DECORD_CODECS = frozenset({"h264", "hevc", "vp9"})
"""It is too old for AV1."""

DECORD_NO_REPAIRS = 1e-9
"""decord's fault_tol: it raises above this share of frames replaced by copies, so at the first."""

DECORD_TIME_TOLERANCE_S = 1e-4
"""decord's times are float32; its frames must be the packets we know, not equal to the bit."""

DECORD_MAX_SLICE_BYTES = 256 * 2**20
"""decord takes a slice of a file only whole, in memory, and copies it; a larger one is PyAV's."""

TORCHCODEC_CODECS = frozenset({"h264", "hevc", "vp9", "libdav1d", "av1"})

TORCHCODEC_TIME_TOLERANCE_S = 1e-6
"""Its times are float64 like the container's; both count from the first frame."""

DecoderName = Literal["decord", "torchcodec", "pyav", "frames"]
Step = DecoderName | Literal["download"]
"""What a decoding process does with a clip."""
"""frames: images read with Pillow."""

Draw = Callable[[Float64, int, int], list[WindowDraw]]
"""Windows of a clip from its times (seconds, float64 (N,)) and its shown height and width.
Raises ClipError where there are none."""

DrawnFrames = tuple[list[WindowDraw], dict[int, UInt8]]
"""The windows of a clip, and RGB of the frames they use by index: uint8 (H, W, 3), all one size."""


def frames_used(windows: Iterable[WindowDraw]) -> Set[int]:
    """The indices of all frames that some window uses, in the order of their first use."""
    return dict.fromkeys(frame for window in windows for frame in window.frame_index).keys()


def decode_with_pyav(
    video: VideoFile, *, index: FileIndex, draw: Draw, threads: int
) -> DrawnFrames:
    """The windows of the file and their frames.

    One pass keeps the frames that windows drawn from the packets' times need. Where the frames
    shown turn out to be others (a damaged packet, an AVI), the windows are drawn again from what
    was shown, and a second pass keeps those.

    Raises:
        ClipError: nothing can be decoded, the timestamps or the frame size make no sense, or no
            window can be drawn.
    """
    height, width = index.first_frame.shape[:2]
    wanted: Set[int] = set()
    with suppress(ClipError):  # a guess, checked below: that every packet shows one frame
        wanted = frames_used(draw(index.times_s, height, width))
    for _ in range(2):
        times_s, kept = _decode_all(video, wanted, slots_s=index.slots_s, threads=threads)
        windows = draw(times_s, height, width)
        wanted = frames_used(windows)
        if wanted <= kept.keys():
            return windows, {frame: kept[frame] for frame in wanted}
    raise ClipError("shows other frames each time it is decoded", stage="decode")


def _decode_all(
    video: VideoFile, wanted: Set[int], *, slots_s: Float64 | None, threads: int
) -> tuple[Float64, dict[int, UInt8]]:
    """Seconds of every shown frame, float64 (N,), and RGB of the wanted ones."""
    pts: list[int | None] = []
    kept: dict[int, UInt8] = {}
    shape: tuple[int, int] | None = None
    reformatter = VideoReformatter()
    with open_video(video, threads=threads) as (container, stream):
        for packet in read_packets(container, stream, errors=[]):
            for frame in frames_of(packet, stream, errors=[]):
                shape = shape or (frame.height, frame.width)
                if (frame.height, frame.width) != shape:
                    raise ClipError(
                        f"changes its size at frame {len(pts)}: from {shape[1]}x{shape[0]} to "
                        f"{frame.width}x{frame.height}",
                        stage="decode",
                    )
                if len(pts) in wanted:
                    kept[len(pts)] = to_rgb(frame, reformatter)
                pts.append(frame.pts)
        return shown_times(pts, stream, slots_s=slots_s), kept


def decode_fast(
    name: DecoderName, video: VideoFile, *, index: FileIndex, draw: Draw, threads: int
) -> DrawnFrames:
    """The windows of the file and their frames, by one of FAST_DECODERS.

    Raises:
        DecoderFailed: it is missing, cannot read the file, or disagrees with `index`.
        ClipError: no window can be drawn.
    """
    codecs, read = FAST_DECODERS[name]
    require_supported(index, codecs=codecs)
    windows = draw(index.times_s, *index.first_frame.shape[:2])
    used = frames_used(windows)
    try:
        frames = read(video, used | {0}, index=index, threads=threads)
    # ImportError, OSError: no wheel for this machine, or a library beside it is missing
    except (ImportError, OSError, RuntimeError, ValueError, IndexError) as error:
        raise DecoderFailed(f"{name}: {describe(error)}") from error
    if not np.array_equal(frames[0], index.first_frame):
        raise DecoderFailed(f"{name} shows another first frame")
    return windows, {frame: frames[frame] for frame in used}


def _read_with_decord(
    video: VideoFile, wanted: Set[int], *, index: FileIndex, threads: int
) -> dict[int, UInt8]:
    """RGB of the wanted frames; passes through every frame of the file."""
    from decord import DECORDError, VideoReader
    from decord._ffi.base import DECORDLimitReachedError

    if not isinstance(video, Path) and video.size > DECORD_MAX_SLICE_BYTES:
        raise DecoderFailed(f"{video.size} bytes in an archive, too many to hold in memory")
    source = str(video) if isinstance(video, Path) else io.BytesIO(video.read())
    try:
        reader = VideoReader(source, num_threads=threads, fault_tol=DECORD_NO_REPAIRS)
        num_frames = len(reader)
        times_s = reader.get_frame_timestamp(range(num_frames))[:, 0].astype(np.float64)
        if num_frames != index.num_packets or not np.isfinite(times_s).all() or times_s[0] < 0:
            raise DecoderFailed(
                f"decord sees {num_frames} frames, the container {index.num_packets}"
            )
        tolerance_s = DECORD_TIME_TOLERANCE_S + 1e-6 * float(index.times_s[-1])
        if np.abs(times_s - times_s[0] - index.times_s).max() > tolerance_s:
            raise DecoderFailed("decord sees other timestamps than the container")
        # skip_frames decodes without converting to RGB, but seeks where a key frame lies in what it
        # skips: so the frame before every key frame is read, not skipped.
        before_keys = {int(key) - 1 for key in reader.get_key_indices() if key > 0}
        kept: dict[int, UInt8] = {}
        position = 0
        for frame in sorted(wanted | before_keys | {num_frames - 1}):
            if frame > position:
                reader.skip_frames(frame - position)
            pixels: UInt8 = reader.next().asnumpy()
            if frame in wanted:
                kept[frame] = pixels
            position = frame + 1
        return kept
    except (DECORDError, DECORDLimitReachedError) as error:
        raise DecoderFailed(f"decord: {describe(error)}") from error
    except StopIteration as error:
        raise DecoderFailed("decord: fewer frames than packets") from error


def _read_with_torchcodec(
    video: VideoFile, wanted: Set[int], *, index: FileIndex, threads: int
) -> dict[int, UInt8]:
    """RGB of the wanted frames; seeks to each."""
    with warnings.catch_warnings():  # it warns of codecs that are not built in
        warnings.simplefilter("ignore")
        from torchcodec.decoders import VideoDecoder

    rows = sorted(wanted)
    with nullcontext(video) if isinstance(video, Path) else video.open() as source:
        reader = VideoDecoder(
            source, dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="exact"
        )
        if len(reader) != index.num_packets:
            raise DecoderFailed(
                f"torchcodec sees {len(reader)} frames, the container {index.num_packets}"
            )
        batch = reader.get_frames_at(rows)
    times_s = batch.pts_seconds.numpy()
    if np.abs(times_s - times_s[0] - index.times_s[rows]).max() > TORCHCODEC_TIME_TOLERANCE_S:
        raise DecoderFailed("torchcodec gives frames of other times than asked for")
    return dict(zip(rows, batch.data.numpy(), strict=True))


FAST_DECODERS: dict[DecoderName, tuple[Set[str], Callable[..., dict[int, UInt8]]]] = {
    "decord": (DECORD_CODECS, _read_with_decord),
    "torchcodec": (TORCHCODEC_CODECS, _read_with_torchcodec),
}
"""The codecs that each may read, and what gives RGB of wanted frames, uint8 (H, W, 3) by index."""
