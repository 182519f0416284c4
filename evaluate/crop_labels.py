"""The part of a label that one square crop of its frame shows. For pictures only: metrics cut
labels at the middle (protocol.py)."""

import numpy as np
from numpy.typing import NDArray

from .dense import Label


def label_of_crop(label: Label, crops: NDArray[np.float32], which: int) -> Label:
    """Label (H, W) of a whole frame -> (h, w), what crop number `which` shows.

    crops: float32 (P, 4) top, left, height, width in source pixels, together the whole frame.
    """
    corner = crops[:, :2].min(axis=0)
    extent = (crops[:, :2] + crops[:, 2:]).max(axis=0) - corner
    scale = np.array(label.shape) / extent
    first = np.rint((crops[which, :2] - corner) * scale).astype(int)
    last = np.rint((crops[which, :2] + crops[which, 2:] - corner) * scale).astype(int)
    part: Label = label[first[0] : last[0], first[1] : last[1]]
    return part
