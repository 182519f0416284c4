"""The frames of a target of a data set that are stored as images, whose names are known.

Called by decoders.py inside a decoding process.
"""

import numpy as np

from .clips import TargetFrames
from .frames_decoder import FrameImages, read_pixels
from .packets import UInt8
from .pyav_decoder import Draw
from .sampling import WindowDraw
from .unusable import UnusableClip


def decode_images(
    images: FrameImages, source: TargetFrames, *, draw: Draw
) -> tuple[list[WindowDraw], dict[int, UInt8]]:
    """The windows of the target, and RGB of its frames by number: uint8 (H, W, 3).

    Raises:
        UnusableClip: a frame cannot be read or has another size than the target.
    """
    frames = {
        number: read_pixels(name, images.read(name))
        for number, name in zip(source.numbers, source.names, strict=True)
    }
    height, width, _ = frames[source.numbers[-1]].shape
    for name, pixels in zip(source.names, frames.values(), strict=True):
        if pixels.shape[:2] != (height, width):
            raise UnusableClip(
                f"changes its size: {name} has {pixels.shape[1]}x{pixels.shape[0]} pixels, the "
                f"target {width}x{height}",
                stage="decode",
            )
    return draw(np.zeros(0), height, width), frames
