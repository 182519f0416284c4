"""Decoding with PyAV: every frame in order, bad packets skipped, edit lists honoured.

Slower than decord and right on every file that can be decoded at all, because what is stored is
what it showed: times and pixels come from the same decoded frame.
"""

from collections.abc import Callable

from av.video.reformatter import VideoReformatter

from .packets import (
    FileIndex,
    Float64,
    UInt8,
    VideoFile,
    frames_of,
    open_video,
    read_packets,
    shown_times,
    to_rgb,
)
from .sampling import WindowDraw
from .unusable import UnusableClip

Draw = Callable[[Float64, int, int], list[WindowDraw]]
"""Windows of a clip from its times (seconds, float64 (N,)) and its shown height and width.
Raises UnusableClip where there are none."""


def decode_with_pyav(
    path: VideoFile, *, index: FileIndex, draw: Draw, threads: int
) -> tuple[list[WindowDraw], dict[int, UInt8]]:
    """The windows of the file, and RGB of the frames they use by index: uint8 (H, W, 3).

    One pass keeps the frames that windows drawn from the packets' times need. Where the frames
    shown turn out to be others (a damaged packet, an AVI), the windows are drawn again from what
    was shown, and a second pass keeps those.

    Raises:
        UnusableClip: nothing can be decoded, the timestamps or the frame size make no sense, or no
            window can be drawn.
    """
    height, width = index.first_frame.shape[:2]
    wanted = _expected_frames(index, draw)
    for _ in range(2):
        times_s, kept = _decode_all(path, wanted, slots_s=index.slots_s, threads=threads)
        windows = draw(times_s, height, width)
        wanted = {frame for window in windows for frame in window.frame_index}
        if wanted <= kept.keys():
            return windows, {frame: kept[frame] for frame in wanted}
    raise UnusableClip("shows other frames each time it is decoded", stage="decode")


def _expected_frames(index: FileIndex, draw: Draw) -> set[int]:
    """The frames that will be needed if every packet shows one frame; a guess, checked later."""
    height, width = index.first_frame.shape[:2]
    try:
        windows = draw(index.times_s, height, width)
    except UnusableClip:
        return set()
    return {frame for window in windows for frame in window.frame_index}


def _decode_all(
    path: VideoFile, wanted: set[int], *, slots_s: Float64 | None, threads: int
) -> tuple[Float64, dict[int, UInt8]]:
    """Seconds of every shown frame, float64 (N,), and RGB of the wanted ones."""
    pts: list[int | None] = []
    kept: dict[int, UInt8] = {}
    shape: tuple[int, int] | None = None
    reformatter = VideoReformatter()
    with open_video(path, threads=threads) as (container, stream):
        for packet in read_packets(container, stream, errors=[]):
            for frame in frames_of(packet, stream, errors=[]):
                shape = shape or (frame.height, frame.width)
                if (frame.height, frame.width) != shape:
                    raise UnusableClip(
                        f"changes its size at frame {len(pts)}: from {shape[1]}x{shape[0]} to "
                        f"{frame.width}x{frame.height}",
                        stage="decode",
                    )
                if len(pts) in wanted:
                    kept[len(pts)] = to_rgb(frame, reformatter)
                pts.append(frame.pts)
        return shown_times(pts, stream, slots_s=slots_s), kept
