"""The labels of an evaluation cache, as a head is trained on them: each crop has its half.

A sample is a crop of a target's frame. As in evaluation, its prediction is enlarged and cut to its
half of the label, which is never resized. Used by head.py.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..shards.errors import DamagedShard, UsageError
from ..shards.patches import PatchShards
from .cuts import cut_labels, upsample_half
from .label_rules import IGNORE, NO_DEPTH
from .order import Indices, evenly
from .targets import (
    Target,
    cut_of_crops,
    label_path,
    load_label,
    read_targets,
    windows_of_clips,
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
                f"{shards.folder}: clip {unknown[0]!r} has windows and no target in plan.jsonl: "
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
        sizes = np.array([half.shape for half in halves])
        depth = self.kind == "depth"
        filled = np.full(
            (len(halves), *sizes.max(0)),
            NO_DEPTH if depth else IGNORE,
            dtype=np.float32 if depth else np.uint8,
        )
        for row, half in zip(filled, halves, strict=True):
            row[: half.shape[0], : half.shape[1]] = half
        return filled

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
        for window in evenly(windows, LOOKED_AT).tolist():
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
