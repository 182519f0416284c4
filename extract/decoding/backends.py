"""Decoding with decord, in one pass from the first frame to the last, never seeking.

decord is fast, and silently wrong in known ways: a seek can land on another frame, a frame that
cannot be decoded is replaced by a copy of its neighbour, an edit list is ignored. So it reads only
files it can be held to (trust.py), in order, with every repaired frame an error, to the
end, so that a frame lost on the way is missed there; and its first frame must be the one that
PyAV shows. Whatever it stumbles over, PyAV reads instead.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np

from .packets import FileIndex, UInt8, VideoFile, describe
from .pyav_decoder import Draw
from .sampling import WindowDraw
from .trust import DecoderFailed, check_trusted

CODECS = frozenset({"h264", "hevc", "vp9"})
"""It is too old for AV1."""

NO_REPAIRS = 1e-9
"""decord's fault_tol: it raises above this share of frames replaced by copies, so at the first."""

TIME_TOLERANCE_S = 1e-4
"""decord's times are float32; its frames must be the packets we know, not equal to the bit."""


MAX_SLICE_BYTES = 256 * 2**20
"""decord takes a video in a tar only whole, in memory, and copies it; a larger one is PyAV's."""


def decode_with_decord(
    path: VideoFile, *, index: FileIndex, draw: Draw, threads: int
) -> tuple[list[WindowDraw], dict[int, UInt8]]:
    """The windows of the file, and RGB of the frames they use by index: uint8 (H, W, 3).

    Raises:
        DecoderFailed: decord is missing, cannot read the file, or disagrees with `index`.
        UnusableClip: no window can be drawn.
    """
    check_trusted(index, codecs=CODECS)
    try:
        from decord import DECORDError, VideoReader
        from decord._ffi.base import DECORDLimitReachedError
    except (ImportError, OSError) as error:  # no wheel for this machine, or a library is missing
        raise DecoderFailed(f"decord cannot be imported: {describe(error)}") from error
    try:
        reader = VideoReader(_decord_input(path), num_threads=threads, fault_tol=NO_REPAIRS)
        _check_times(reader, index)
        height, width = index.first_frame.shape[:2]
        windows = draw(index.times_s, height, width)
        wanted = {frame for window in windows for frame in window.frame_index}
        return windows, _read_in_order(reader, wanted, index)
    except (DECORDError, DECORDLimitReachedError, RuntimeError, UnicodeError, OSError) as error:
        raise DecoderFailed(f"decord: {describe(error)}") from error
    except StopIteration as error:
        raise DecoderFailed("decord: fewer frames than packets") from error


def _decord_input(video: VideoFile) -> str | io.BytesIO:
    if isinstance(video, Path):
        return str(video)
    if video.size > MAX_SLICE_BYTES:
        raise DecoderFailed(f"{video.size} bytes in a tar, too many to hold in memory")
    return io.BytesIO(video.read())


def _check_times(reader: Any, index: FileIndex) -> None:
    num_frames = len(reader)
    times_s = reader.get_frame_timestamp(range(num_frames))[:, 0].astype(np.float64)
    if num_frames != index.num_packets or not np.isfinite(times_s).all() or times_s[0] < 0:
        raise DecoderFailed(f"decord sees {num_frames} frames, the container {index.num_packets}")
    tolerance_s = TIME_TOLERANCE_S + 1e-6 * float(index.times_s[-1])
    if np.abs(times_s - times_s[0] - index.times_s).max() > tolerance_s:
        raise DecoderFailed("decord sees other timestamps than the container")


def _read_in_order(reader: Any, wanted: set[int], index: FileIndex) -> dict[int, UInt8]:
    """RGB of the wanted frames; passes through every frame of the file."""
    # skip_frames decodes without converting to RGB, but seeks where a key frame lies in what it
    # skips: so the frame before every key frame is read, not skipped.
    before_keys = {int(key) - 1 for key in reader.get_key_indices() if key > 0}
    kept: dict[int, UInt8] = {}
    position = 0
    for frame in sorted(wanted | before_keys | {0, index.num_packets - 1}):
        if frame > position:
            reader.skip_frames(frame - position)
        pixels: UInt8 = reader.next().asnumpy()
        if frame == 0 and not np.array_equal(pixels, index.first_frame):
            raise DecoderFailed("decord shows another first frame")
        if frame in wanted:
            kept[frame] = pixels
        position = frame + 1
    return kept
