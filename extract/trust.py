"""Which files the fast decoders may read: those whose frames they can be held to.

decord and torchcodec are compared with the container (packets.py) frame by frame. That only works
where one packet is one shown frame and every packet has its own time. All other files are PyAV's.
Called by decord_decoder.py and torchcodec_decoder.py.
"""

from collections.abc import Set

from .packets import FileIndex

CONTAINERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p"})
"""Where every decoder converts to the same RGB."""


class DecoderFailed(Exception):
    """This decoder cannot be used for this file; the text says why."""


def check_trusted(index: FileIndex, *, codecs: Set[str]) -> None:
    """Raises DecoderFailed for a file that a fast decoder cannot be held to.

    Args:
        codecs: FFmpeg's names of those the decoder is trusted with. One packet must be one frame in
            them (VP8 hides frames; MPEG-4 packs two frames in a packet).
    """
    if index.container not in CONTAINERS:
        raise DecoderFailed(f"container {index.container}")
    if index.codec not in codecs:
        raise DecoderFailed(f"codec {index.codec}")
    if index.pixel_format not in PIXEL_FORMATS:
        raise DecoderFailed(f"pixel format {index.pixel_format}")
    if index.interlaced:
        raise DecoderFailed("interlaced")
    if not index.regular:
        raise DecoderFailed("packets hidden, damaged, without times or before the first key frame")
