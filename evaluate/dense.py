"""Labels held against what a head reads from features: mIoU, per-class IoU, depth RMSE.

A labelled frame was seen through one window (the whole frame) or two (square crops); each half of
its label is scored against the prediction of its crop. Everything is summed over the whole set.

Letters: B windows of a batch, P crops of a frame (1 or 2), N patch tokens, D channels, C classes.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..shards.errors import UsageError
from ..train.models.heads import DepthHead, SegmentationHead, feature_map
from .protocol import (
    IGNORE,
    NO_DEPTH,
    Cut,
    DepthRMSE,
    MeanIoU,
    cut_labels,
    upsample_predictions,
)
from .sequences import Record, Score, class_counts, squared_errors

Head = SegmentationHead | DepthHead
Label = NDArray[np.uint8] | NDArray[np.float32]
"""(H, W): classes with IGNORE, or metres with NO_DEPTH."""
WHOLE = Cut(wide=None, overlap=False)
"""How a frame is cut that one window shows."""


@dataclass(frozen=True, kw_only=True)
class LabelledFrame:
    """A target frame's label, and which windows of the batch see the frame."""

    sequence: str
    """What the frame belongs to: frames of one sequence are alike."""
    positions: tuple[int, ...]
    """Places in the batch, left or top crop first: P of them."""
    cut: Cut
    label: Label


class LabelScores:
    """The metrics of every row and horizon against the labels, of one head."""

    def __init__(self, head: Head, *, grid: tuple[int, int], record: Record) -> None:
        """`record`: takes what each frame adds to a score, by sequence."""
        self._head = head
        self._record = record
        self._grid = grid
        self._miou: dict[tuple[str, str], MeanIoU] = {}
        self._rmse: dict[tuple[str, str], DepthRMSE] = defaultdict(DepthRMSE)

    @property
    def metric(self) -> str:
        """`miou` or `rmse`."""
        return "miou" if isinstance(self._head, SegmentationHead) else "rmse"

    def add(
        self, horizon: str, rows: Mapping[str, Tensor], frames: Sequence[LabelledFrame]
    ) -> None:
        """Take in rows (B, H, N, D) by name, whose last step is that of the labelled frames."""
        for frame in frames:
            places = list(frame.positions)
            for name, row in rows.items():
                self._update((horizon, name), row[places, -1], frame)

    def values(self) -> dict[tuple[str, str], float]:
        """(Horizon, row name) -> mIoU (0-1) or RMSE (metres)."""
        metrics = self._miou if self.metric == "miou" else self._rmse
        return {key: float(metric.compute()) for key, metric in metrics.items()}

    def per_class(self) -> dict[tuple[str, str], list[float | None]]:
        """(Horizon, row name) -> IoU (0-1) of every class, None for one that occurs in neither
        labels nor predictions. {} of depth."""
        return {key: class_ious(metric.confusion()) for key, metric in self._miou.items()}

    def _update(self, key: tuple[str, str], tokens: Tensor, frame: LabelledFrame) -> None:
        label = torch.from_numpy(frame.label)[None].to(tokens.device)
        halves = cut_labels(label, frame.cut)
        size = (halves.shape[-2], halves.shape[-1])
        maps = read_maps(self._head, tokens, grid=self._grid, cut=frame.cut, size=size)
        score = Score(*key, self.metric)
        if isinstance(self._head, DepthHead):
            self._rmse[key].update(maps, halves)
            self._record(score, frame.sequence, *squared_errors(maps, halves))
            return
        num_classes = self._head.config.num_classes
        if key not in self._miou:
            self._miou[key] = MeanIoU(num_classes=num_classes)
        classes, label = maps.argmax(dim=1), halves.long()
        self._miou[key].update(classes, label)
        found = class_counts(classes, label, num_classes=num_classes)
        self._record(score, frame.sequence, *found)


def read_maps(
    head: Head, tokens: Tensor, *, grid: tuple[int, int], cut: Cut, size: tuple[int, int]
) -> Tensor:
    """Logits (P, C, *size) or metres (P, 1, *size) from features (P, N, D) of a frame's crops, at
    the size of the cut label. In float32 whatever the autocast: logits of bfloat16 tie often, and
    ties go to the first class."""
    with torch.autocast(tokens.device.type, enabled=False):
        return upsample_predictions(head(feature_map(tokens.float(), grid=grid)), cut, size=size)


def check_labels(frames: Iterable[LabelledFrame], head: Head) -> None:
    """Reads every label once, before any work: one that is of no use is found now, not after hours.

    Raises UsageError for such a label (whatever reads it does), and where no label has a single
    valid pixel.
    """
    depth = isinstance(head, DepthHead)
    num_valid = 0
    for frame in frames:
        valid = frame.label > NO_DEPTH if depth else frame.label != IGNORE
        num_valid += int(np.count_nonzero(valid))
    if not num_valid:
        nothing = (
            f"no pixel of any target frame has a depth (all {NO_DEPTH:g})"
            if depth
            else f"every pixel of every target frame is {IGNORE} (ignore)"
        )
        raise UsageError(f"labels: {nothing}; give the labels of these frames, or no --labels")


def class_ious(confusion: Tensor) -> list[float | None]:
    """IoU of every class of a confusion matrix (C, C); None where a class never occurs."""
    counts = confusion.cpu().double()
    both = counts.diagonal()
    either = counts.sum(0) + counts.sum(1) - both
    return [
        (shared / union) if union else None
        for shared, union in zip(both.tolist(), either.tolist(), strict=True)
    ]
