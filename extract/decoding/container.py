"""What a video file says of itself before it is decoded: its packets' times and its first frame.

Windows are drawn from these times. By them it is also decided whether a fast decoder may read the
file, and its first frame is held against the one that PyAV shows here.
"""

from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from ...shards.errors import ClipError
from ...shards.files import open_file
from ..sources.archive import FileSlice

VideoFile = Path | FileSlice
"""A file, or a video inside an archive."""

UInt8 = NDArray[np.uint8]
Float64 = NDArray[np.float64]

MAX_REORDER = 16
"""Frames by which a packet may come before or after its place in presentation order: the most
that H.264 and HEVC allow. A packet further off has a damaged time."""

MAX_MEAN_GAP_S = 60.0
"""Frames further apart than this on average are damaged timestamps, not a video (a guess; the
garbage seen in real files lies at 1e17 s)."""

FAST_CONTAINERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
"""Where one packet is one shown frame and every packet has its own time, mostly: fast decoders are
held to the container frame by frame. All other files are PyAV's."""
FAST_PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p"})
"""Where every decoder converts to the same RGB."""

PLAYLISTS = frozenset({"concat", "dash", "hls", "imf", "webm_dash_manifest"})
"""FFmpeg's formats that are lists of other files: what a clip shows must lie in the clip."""

SLICE_BUFFER_BYTES = 2**18
"""Read at once from a video in an archive: every read goes through Python (a guess)."""


@dataclass(frozen=True)
class FileIndex:
    """The best video stream of a file, as its container describes it."""

    container: str
    """FFmpeg's names of the format, e.g. `mov,mp4,m4a,3gp,3g2,mj2`."""
    codec: str
    pixel_format: str
    interlaced: bool
    """As the first frame is."""
    regular: bool
    """Every packet has its own time near its place and none is hidden, the first one is a key
    frame and is the first frame shown, and the file was read to its end without an error."""
    num_packets: int
    times_s: Float64
    """float64 (packets that are not hidden,), seconds since the first of them, sorted: the times
    of the shown frames if no packet turns out to be damaged."""
    slots_s: Float64 | None
    """AVI only: float64 (packets,), seconds since the first, when the packets' turns come."""
    first_frame: UInt8
    """uint8 (H, W, 3) RGB, rotated as it is shown."""


@contextmanager
def open_video(
    video: VideoFile, *, threads: int = 1
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its best video stream (FFmpeg's choice, which is also decord's).

    Raises:
        ClipError: the file cannot be opened, or holds no video.
    """
    with ExitStack() as opened:
        try:
            # Metadata in another encoding than UTF-8 must not stop us; no file may name another.
            if isinstance(video, Path):
                open_file(video).close()  # a pipe would be waited for
                container = av.open(
                    str(video), metadata_errors="ignore", options={"protocol_whitelist": "file"}
                )
            else:
                container = av.open(
                    opened.enter_context(video.open()),
                    mode="r",
                    metadata_errors="ignore",
                    options={"protocol_whitelist": "none"},
                    buffer_size=SLICE_BUFFER_BYTES,
                )
        except (OSError, av.error.FFmpegError, UnicodeError) as error:
            raise ClipError(
                f"cannot be opened: {_why_not_opened(video, error)}", stage="open"
            ) from error
        opened.enter_context(container)
        if container.format.name in PLAYLISTS:
            raise ClipError(
                f"is no video but a playlist of others ({container.format.name})", stage="open"
            )
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise ClipError("holds no video stream", stage="open")
        try:
            stream.codec_context.thread_count = threads
        except (av.error.FFmpegError, AttributeError) as error:
            raise ClipError(f"no decoder: {describe(error)}", stage="open") from error
        yield container, stream


def _why_not_opened(video: VideoFile, error: BaseException) -> str:
    size = video.size if isinstance(video, FileSlice) else None
    if isinstance(video, Path) and video.is_file():
        size = video.stat().st_size
    return "the file is empty" if size == 0 else describe(error)


def read_packets(
    container: InputContainer, stream: VideoStream, *, errors: list[str]
) -> "Iterator[Packet[VideoStream] | None]":
    """All packets of the stream and the flush that ends them (where the file ends in damage: None).

    What is wrong with the file is appended to `errors`.
    """
    try:
        yield from container.demux(stream)
    except av.error.FFmpegError as error:
        errors.append(describe(error))
        yield None


def frames_of(
    packet: "Packet[VideoStream] | None", stream: VideoStream, *, errors: list[str]
) -> list[VideoFrame]:
    """The frames that become ready with this packet; none, as in players, if it is damaged."""
    try:
        frames = packet.decode() if packet is not None else stream.codec_context.decode(None)
    except av.error.FFmpegError as error:
        errors.append(describe(error))
        return []
    return [frame for frame in frames if isinstance(frame, VideoFrame)]


def read_index(video: VideoFile) -> FileIndex:
    """Reads all packet headers and decodes up to the first frame.

    Raises:
        ClipError: the file cannot be opened, or not one frame of it can be decoded.
    """
    packets: list[_Header] = []
    errors: list[str] = []
    first: VideoFrame | None = None
    with open_video(video) as (container, stream):
        for packet in read_packets(container, stream, errors=errors):
            if packet is not None and packet.size:
                packets.append(
                    _Header(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard)
                )
            if first is None:
                first = next(iter(frames_of(packet, stream, errors=errors)), None)
        if first is None:
            reason = f": {errors[0]}" if errors else ""
            raise ClipError(
                f"none of its {len(packets)} packets gives a frame{reason}", stage="decode"
            )
        times = sorted(head.pts for head in packets if head.pts is not None and not head.hidden)
        slots = [head.dts for head in packets if head.dts is not None]
        is_avi = container.format.name == "avi"
        return FileIndex(
            container=container.format.name,
            codec=stream.codec_context.name,
            pixel_format=first.format.name,
            interlaced=bool(first.interlaced_frame),
            regular=not errors and _is_regular(packets, first),
            num_packets=len(packets),
            times_s=seconds(times, stream.time_base),
            slots_s=seconds(slots, stream.time_base) if is_avi else None,
            first_frame=to_rgb(first, VideoReformatter()),
        )


@dataclass(frozen=True)
class _Header:
    """What a packet says before it is decoded."""

    pts: int | None
    dts: int | None
    key_frame: bool
    hidden: bool


def _is_regular(packets: list[_Header], first: VideoFrame) -> bool:
    """See FileIndex.regular."""
    pts = [head.pts for head in packets if head.pts is not None]
    if len(set(pts)) < len(packets) or any(head.hidden for head in packets):
        return False
    order = np.argsort(np.array(pts, np.int64))
    near = bool((np.abs(order - np.arange(len(order))) <= MAX_REORDER).all())
    return near and packets[0].key_frame and pts[0] == min(pts) == first.pts


def shown_times(pts: list[int | None], stream: VideoStream, *, slots_s: Float64 | None) -> Float64:
    """float64 (N,): seconds since the first frame, of frames in the order they are shown.

    AVI stores no presentation times, and where there are B-frames FFmpeg's guesses are wrong and
    even go backward. There the frames simply take the packets' turns, `slots_s`, one by one.

    Raises:
        ClipError: there are no times, or they go backward or make no sense.
    """
    known = [value for value in pts if value is not None]
    steps = np.diff(np.array(known, np.int64))
    backward = int(np.argmax(steps < 0)) if (steps < 0).any() else None
    guessed = backward is not None or len(known) < len(pts) or stream.codec_context.has_b_frames
    if guessed and slots_s is not None and len(slots_s) >= len(pts):
        return slots_s[: len(pts)]
    if len(known) < len(pts):
        raise ClipError(f"frame {pts.index(None)} has no timestamp", stage="decode")
    times_s = seconds(known, stream.time_base)
    if backward is not None:
        raise ClipError(
            f"timestamps go backward: frame {backward} at {times_s[backward]:.3f} s, "
            f"the next one at {times_s[backward + 1]:.3f} s",
            stage="decode",
        )
    if len(times_s) and times_s[-1] > MAX_MEAN_GAP_S * len(times_s):
        raise ClipError(
            f"timestamps make no sense: {len(times_s)} frames over {times_s[-1]:.4g} s",
            stage="decode",
        )
    return times_s


def seconds(pts: list[int], time_base: Fraction | None) -> Float64:
    """float64 (N,): seconds since the first of `pts`, exact up to one float64 rounding."""
    if not pts or time_base is None:
        return np.zeros(0)
    since_first = (np.array(pts, np.int64) - pts[0]).astype(np.float64)
    return since_first * float(time_base.numerator) / float(time_base.denominator)


def to_rgb(frame: VideoFrame, reformatter: VideoReformatter) -> UInt8:
    """uint8 (H, W, 3) RGB, rotated as it is shown (by whole quarters, as players do)."""
    rgb = reformatter.reformat(frame, format="rgb24").to_ndarray()
    quarters, rest = divmod(frame.rotation, 90)
    return np.ascontiguousarray(np.rot90(rgb, quarters if rest == 0 else 0))


def describe(error: BaseException) -> str:
    """One line on what a library said, without the path."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]


class DecoderFailed(Exception):
    """This decoder cannot be used for this file; the text says why."""


def require_supported(index: FileIndex, *, codecs: Set[str]) -> None:
    """Raises DecoderFailed for a file that a fast decoder cannot be held to.

    Args:
        codecs: FFmpeg's names of those the decoder may read. One packet must be one frame in them
            (VP8 hides frames; MPEG-4 packs two frames in a packet).
    """
    if index.container not in FAST_CONTAINERS:
        raise DecoderFailed(f"container {index.container}")
    if index.codec not in codecs:
        raise DecoderFailed(f"codec {index.codec}")
    if index.pixel_format not in FAST_PIXEL_FORMATS:
        raise DecoderFailed(f"pixel format {index.pixel_format}")
    if index.interlaced:
        raise DecoderFailed("interlaced")
    if not index.regular:
        raise DecoderFailed("packets hidden, damaged, without times or before the first key frame")
