"""Label files of a patch-token cache: LABELS/CLIP_KEY.npy, uint8 (frames, H, W), 255 = ignore.

Indexed by the frames' numbers in presentation order, as frame_index of a uniform cache; of the
size of the source frames, never resized. Used by head.py.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..shards.errors import UsageError
from ..shards.npy import map_npy
from ..shards.patches import PatchShards
from ..shards.plan_target import Kind
from .label_rules import IGNORE
from .order import Indices


class LabelSource(Protocol):
    """What a head is trained on: Labels below, target_labels.TargetLabels."""

    kind: Kind
    num_classes: int
    """0 for depth."""

    @property
    def videos(self) -> tuple[list[str], Indices]:
        """Names, and int64 (W,): of which of them a window is; validation keeps whole ones."""

    def samples(self, windows: Indices) -> Indices:
        """Numbers window * T + frame of the labelled frames of these windows, int64."""

    def size(self, window: int) -> tuple[int, int]:
        """Height and width of a window's labels."""

    def read(self, windows: Indices, frames: Indices) -> NDArray[np.uint8] | NDArray[np.float32]:
        """Labels (B, H, W) of frame `frames[i]` of window `windows[i]`, filled up where smaller."""

    def enlarge(self, prediction: Tensor, window: int) -> Tensor:
        """A head's output (1, C, h, w) for a window, at the size of its labels."""


class Labels:
    """The labels of every window of a cache; opened once, read from the mapped files.

    Raises UsageError for a file that is missing, not such an array, too short, or that belongs to
    other frames than the cache's: one with a crop or a flip, or of another size.
    """

    def __init__(self, folder: str, shards: PatchShards, *, num_classes: int) -> None:
        self.kind: Kind = "segmentation"
        self.num_classes = num_classes
        self._clip_index = shards.clip_index
        self._frame_index = shards.frame_index(np.arange(shards.num_windows))
        self._num_frames = self._frame_index.shape[1]
        self._keys = shards.keys
        self._arrays = [_open(Path(folder), key) for key in self._keys]
        self._check_windows(shards)

    @property
    def videos(self) -> tuple[list[str], Indices]:
        """Keys of clips, and int64 (W,): of which of them a window is."""
        return self._keys, self._clip_index

    def samples(self, windows: Indices) -> Indices:
        """Every frame of these windows, as window * T + frame."""
        frames: Indices = windows[:, None] * self._num_frames + np.arange(self._num_frames)
        return frames.reshape(-1)

    def enlarge(self, prediction: Tensor, window: int) -> Tensor:
        """A head's output (1, C, h, w), at the size of the window's labels; bilinear."""
        return F.interpolate(prediction, size=self.size(window), mode="bilinear")

    def size(self, window: int) -> tuple[int, int]:
        """Height and width of the labels of a window's clip."""
        _, height, width = self._arrays[self._clip_index[window]].shape
        return int(height), int(width)

    def read(self, windows: Indices, frames: Indices) -> NDArray[np.uint8]:
        """Labels uint8 (B, H, W) of frame `frames[i]` of window `windows[i]`; smaller ones than the
        largest are filled up with IGNORE, below and to the right."""
        sizes = np.array([self.size(window) for window in windows])
        filled = np.full((len(windows), *sizes.max(0)), IGNORE, dtype=np.uint8)
        for target, window, frame in zip(filled, windows, frames, strict=True):
            clip = self._clip_index[window]
            labels = self._arrays[clip][self._frame_index[window, frame]]
            if ((labels >= self.num_classes) & (labels != IGNORE)).any():
                raise UsageError(
                    f"the labels of clip {self._keys[clip]!r} have class "
                    f"{labels[labels != IGNORE].max()}: wanted 0 to {self.num_classes - 1}, or "
                    f"{IGNORE} for ignore; set num_classes, or convert the labels"
                )
            target[: labels.shape[0], : labels.shape[1]] = labels
        return filled

    def _check_windows(self, shards: PatchShards) -> None:
        shapes = np.array([array.shape for array in self._arrays], dtype=np.int64).reshape(-1, 3)
        sizes = shapes[self._clip_index]
        whole = np.pad(sizes[:, 1:], ((0, 0), (2, 0)))  # top, left, height, width
        wrong = shards.flipped | (shards.crop != whole).any(axis=1)
        if wrong.any():
            window = int(wrong.argmax())
            raise UsageError(
                f"window {window} of clip {self._keys[self._clip_index[window]]!r}: crop "
                f"{shards.crop[window].tolist()} (top, left, height, width), flipped "
                f"{bool(shards.flipped[window])}; its labels are of whole frames of "
                f"{tuple(sizes[window, 1:].tolist())} pixels: extract with --sampling uniform, "
                "from the videos that the labels belong to"
            )
        short = self._frame_index.max(axis=1) >= sizes[:, 0]
        if short.any():
            window = int(short.argmax())
            raise UsageError(
                f"clip {self._keys[self._clip_index[window]]!r}: labels of {sizes[window, 0]} "
                f"frames, the cache has its frame {self._frame_index[window].max()}: give labels "
                f"for every frame ({IGNORE} where there are none)"
            )


def _open(folder: Path, key: str) -> NDArray[Any]:
    path = folder / f"{key}.npy"
    if not folder.is_dir() or not path.is_file():
        raise UsageError(
            f"{path}: no such label file; wanted one for every clip of the cache, named after its "
            "key"
        )
    try:
        array = map_npy(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as an array ({error}): write it again") from error
    if array.dtype != np.uint8 or array.ndim != 3 or not array.size:
        raise UsageError(
            f"{path}: {array.dtype} {array.shape}, wanted uint8 (frames, height, width)"
        )
    return array
