"""What a head is trained on: the labels of whole frames, or of the crops of an evaluation cache.

`ClipFrameLabels`: every frame of a uniform cache, by the label file of its clip. `TargetLabels`:
a sample is a crop of a target's frame; as in evaluation, its prediction is enlarged and cut to its
half of the label. Labels are never resized.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...shards.errors import DamagedShard, UsageError
from ...shards.evaluation.labels import IGNORE, NO_DEPTH, ClipLabels, Kind
from ...shards.evaluation.targets import (
    Target,
    cut_of_crops,
    label_path,
    last_frames,
    load_label,
    read_targets,
    windows_of_clips,
)
from ...shards.patches.reader import PatchShards
from ..data.order import Indices, spread
from .crops import cut_labels, upsample_half


class ClipFrameLabels:
    """The labels of every window of a uniform cache; opened once, read from the mapped files.

    Raises UsageError as `ClipLabels`, and for labels of other frames than the cache's: one with a
    crop or a flip, or of another size.
    """

    def __init__(self, folder: str, shards: PatchShards, *, num_classes: int) -> None:
        self.kind: Kind = "segmentation"
        self.num_classes = num_classes
        self._clip_index = shards.clip_index
        self._frame_index = shards.frame_index(np.arange(shards.num_windows))
        self._num_frames = self._frame_index.shape[1]
        self._keys = shards.keys
        self._labels = ClipLabels(folder, last_frames=last_frames(shards), num_classes=num_classes)
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
        return self._labels.size(self._keys[self._clip_index[window]])

    def read(self, windows: Indices, frames: Indices) -> NDArray[np.uint8]:
        """Labels uint8 (B, H, W) of frame `frames[i]` of window `windows[i]`; smaller ones than the
        largest are filled up with IGNORE, below and to the right."""
        rows = []
        for window, frame in zip(windows, frames, strict=True):
            key = self._keys[self._clip_index[window]]
            rows.append(self._labels.frame(key, int(self._frame_index[window, frame])))
        return filled_up(rows, IGNORE)

    def _check_windows(self, shards: PatchShards) -> None:
        sizes = np.array([self._labels.size(key) for key in self._keys], dtype=np.int64)
        sizes = sizes.reshape(-1, 2)[self._clip_index]
        whole = np.pad(sizes, ((0, 0), (2, 0)))  # top, left, height, width
        wrong = shards.flipped | (shards.crop != whole).any(axis=1)
        if wrong.any():
            window = int(wrong.argmax())
            raise UsageError(
                f"window {window} of clip {self._keys[self._clip_index[window]]!r}: crop "
                f"{shards.crop[window].tolist()} (top, left, height, width), flipped "
                f"{bool(shards.flipped[window])}; its labels are of whole frames of "
                f"{tuple(sizes[window].tolist())} pixels: extract with --sampling uniform, "
                "from the videos that the labels belong to"
            )


CLASSES = {"vspw": 124, "cityscapes": 19, "binary": 2}
"""Of the label rules that fix their number."""

MAX_KEPT_BYTES = 2**31
"""Of labels that are kept once they are read: decoding a large PNG takes longer than a step."""

LOOKED_AT = 64
"""Labels read to see that some pixel is labelled."""


class TargetLabels:
    """The labels of every window; files are read when they are first asked for.

    Raises UsageError for labels that are missing, of two kinds, without any labelled pixel, or of
    another number of classes, DamagedShard for windows without a target.
    """

    def __init__(self, folder: str, shards: PatchShards, *, num_classes: int | None) -> None:
        self._root = Path(folder)
        targets = read_targets(shards.folder)
        windows = windows_of_clips(shards)
        if not windows:
            raise UsageError(f"{shards.folder}: has no windows: see its quarantine.jsonl")
        if unknown := sorted(windows.keys() - targets.keys()):
            raise DamagedShard(
                f"{shards.folder}: clip {unknown[0]!r} has windows and no target in its plan: "
                "make the cache again"
            )
        self._targets: dict[int, Target] = {}
        self._second: dict[int, bool] = {}
        self._cuts = {key: cut_of_crops(shards.crop[numbers]) for key, numbers in windows.items()}
        for key, numbers in windows.items():
            label_path(targets[key], self._root)
            for place, window in enumerate(numbers):
                self._targets[window] = targets[key]
                self._second[window] = place == 1
        kinds = {target.kind for target in self._targets.values()}
        if len(kinds) > 1:
            raise UsageError(f"{shards.folder}: labels of {' and '.join(sorted(kinds))}: one only")
        self.kind = kinds.pop()
        self._num_frames = shards.shape[0]
        self._kept: dict[str, NDArray[np.uint8] | NDArray[np.float32]] = {}
        self._kept_bytes = 0
        self.num_classes = 0 if self.kind == "depth" else self._classes(num_classes)
        self._check_some_label()

    @property
    def videos(self) -> tuple[list[str], Indices]:
        """Names of sequences, and int64 (W,): which of them a window is of."""
        names = sorted({target.sequence for target in self._targets.values()})
        place = {name: number for number, name in enumerate(names)}
        order = sorted(self._targets)
        return names, np.array([place[self._targets[w].sequence] for w in order], dtype=np.int64)

    def samples(self, windows: Indices) -> Indices:
        """Numbers window * T + frame of the labelled frames, the last of each window."""
        return windows * self._num_frames + self._num_frames - 1

    def size(self, window: int) -> tuple[int, int]:
        """Height and width of the half of the label."""
        target = self._targets[window]
        cut = self._cuts[target.key]
        height, width = target.label_size
        if cut.wide is None:
            return height, width
        return (height, width - width // 2) if cut.wide else (height - height // 2, width)

    def read(self, windows: Indices, frames: Indices) -> NDArray[np.uint8] | NDArray[np.float32]:
        """Halves (B, H, W), uint8 classes or float32 metres; smaller ones than the largest are
        filled up with IGNORE or NO_DEPTH, below and to the right."""
        halves = [self._half(int(window)) for window in windows]
        return filled_up(halves, NO_DEPTH if self.kind == "depth" else IGNORE)

    def enlarge(self, prediction: Tensor, window: int) -> Tensor:
        """A head's output (1, C, h, w) of a crop, at the size of its half: (1, C, H, W)."""
        cut = self._cuts[self._targets[window].key]
        return upsample_half(prediction, cut, second=self._second[window], size=self.size(window))

    def _classes(self, given: int | None) -> int:
        rules = {target.rule.name for target in self._targets.values()}
        known = {CLASSES[rule] for rule in rules if rule in CLASSES}
        if given is None and len(known) != 1:
            raise UsageError(
                "num_classes: not given, and the cache does not tell how many classes its labels "
                "have: give --num-classes"
            )
        if given is not None and known and known != {given}:
            raise UsageError(
                f"num_classes {given}: the labels of this cache ({', '.join(sorted(rules))}) have "
                f"{', '.join(map(str, sorted(known)))} classes: leave it out, or give that"
            )
        return known.pop() if given is None else given

    def _check_some_label(self) -> None:
        windows = np.array(sorted(self._targets), dtype=np.int64)
        none = NO_DEPTH if self.kind == "depth" else IGNORE
        for window in spread(windows, LOOKED_AT).tolist():
            if (self._label(self._targets[window]) != none).any():
                return
        raise UsageError(
            f"--labels {self._root}: no labelled pixel in {min(len(windows), LOOKED_AT)} of "
            f"{len(windows)} labels: are they the right ones?"
        )

    def _half(self, window: int) -> NDArray[np.uint8] | NDArray[np.float32]:
        target = self._targets[window]
        label = torch.from_numpy(self._label(target))[None]
        halves = cut_labels(label, self._cuts[target.key])
        half: NDArray[np.uint8] | NDArray[np.float32] = halves[int(self._second[window])].numpy()
        return half

    def _label(self, target: Target) -> NDArray[np.uint8] | NDArray[np.float32]:
        if target.key in self._kept:
            return self._kept[target.key]
        label = load_label(target, self._root)
        if self.kind == "segmentation":
            wrong = (label >= self.num_classes) & (label != IGNORE)
            if wrong.any():
                raise UsageError(
                    f"{target.label} has class {label[wrong].max()}: wanted 0 to "
                    f"{self.num_classes - 1}, or {IGNORE} for ignore; set num_classes, or extract "
                    "with --ignore"
                )
        if self._kept_bytes + label.nbytes <= MAX_KEPT_BYTES:
            self._kept[target.key] = label
            self._kept_bytes += label.nbytes
        return label


LabelSource = ClipFrameLabels | TargetLabels


def filled_up(labels: Sequence[NDArray[Any]], value: float) -> NDArray[Any]:
    """One array (B, H, W) of labels (h, w), `value` below and to the right of smaller ones."""
    largest = np.array([label.shape for label in labels]).max(0)
    filled = np.full((len(labels), *largest), value, dtype=labels[0].dtype)
    for row, label in zip(filled, labels, strict=True):
        row[: label.shape[0], : label.shape[1]] = label
    return filled
