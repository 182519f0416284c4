"""Decoding with torchcodec (optional), which seeks to the frames that windows use.

Worth it on long videos, of which windows use few frames. It seeks by a scan of the whole file
(`seek_mode="exact"`), and is believed only where trust.py says so, where the time of every frame it
gives is the time of the packet asked for, and where its first frame is the one that PyAV shows.
The tests compare its frames with an in-order decode for every container and codec it is let near.
It does not see damage to frames that no window uses; the others do, and then count frames anew.
"""

import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from .packets import FileIndex, UInt8, VideoFile, describe
from .pyav_decoder import Draw
from .sampling import WindowDraw
from .trust import DecoderFailed, check_trusted

CODECS = frozenset({"h264", "hevc", "vp9", "libdav1d", "av1"})

TIME_TOLERANCE_S = 1e-6
"""Its times are float64 like the container's; both count from the first frame."""


def decode_with_torchcodec(
    video: VideoFile, *, index: FileIndex, draw: Draw, threads: int
) -> tuple[list[WindowDraw], dict[int, UInt8]]:
    """The windows of the file, and RGB of the frames they use by index: uint8 (H, W, 3).

    Raises:
        DecoderFailed: torchcodec is missing, cannot read the file, or disagrees with `index`.
        UnusableClip: no window can be drawn.
    """
    check_trusted(index, codecs=CODECS)
    try:
        with warnings.catch_warnings():  # it warns of codecs that are not built in
            warnings.simplefilter("ignore")
            from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or no FFmpeg beside it
        raise DecoderFailed(f"torchcodec cannot be imported: {describe(error)}") from error
    height, width = index.first_frame.shape[:2]
    windows = draw(index.times_s, height, width)
    wanted = sorted({0, *(frame for window in windows for frame in window.frame_index)})
    try:
        with nullcontext(video) if isinstance(video, Path) else video.open() as source:
            reader = VideoDecoder(
                source, dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="exact"
            )
            if len(reader) != index.num_packets:
                raise DecoderFailed(
                    f"torchcodec sees {len(reader)} frames, the container {index.num_packets}"
                )
            batch = reader.get_frames_at(wanted)
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise DecoderFailed(f"torchcodec: {describe(error)}") from error
    frames, times_s = batch.data.numpy(), batch.pts_seconds.numpy()
    if np.abs(times_s - times_s[0] - index.times_s[wanted]).max() > TIME_TOLERANCE_S:
        raise DecoderFailed("torchcodec gives frames of other times than asked for")
    if not np.array_equal(frames[0], index.first_frame):
        raise DecoderFailed("torchcodec shows another first frame")
    used = {frame for window in windows for frame in window.frame_index}
    return windows, {frame: frames[row] for row, frame in enumerate(wanted) if frame in used}
