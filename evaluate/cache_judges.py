"""What a patch cache is judged by, against a reference of the same windows: one class a judge.

Each takes every window once, `ours` and `theirs` float32 (B, T, N, D) on one device, and gives its
metrics for both sides at the end. Called by `cache_fidelity.py`.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..shards.errors import DeltatokError
from ..shards.patches import PatchShards
from ..train.losses import smooth_l1
from ..train.models.deltatok import DeltaTok
from ..train.models.heads import SegmentationHead
from .labels import LabelFolder
from .protocol import MeanIoU
from .score import class_map

Pair = tuple[float | None, float | None]
"""A metric of the cache that is judged and of its reference."""


class Judge(Protocol):
    """One way to look at the two caches."""

    def add(self, numbers: NDArray[np.int64], ours: Tensor, theirs: Tensor) -> None:
        """Takes in windows; `numbers`: theirs in the reference cache, int64 (B,)."""

    def results(self) -> dict[str, Pair]:
        """Metric -> its values, of everything so far."""


@dataclass
class TokenErrors:
    """How far the tokens are off."""

    error: float = 0.0
    """Sums of squares."""
    size: float = 0.0
    change: float = 0.0
    num_frames: int = 0
    num_changes: int = 0
    cosines: list[float] = field(default_factory=list)
    smallest: float = 1.0

    def add(self, _: NDArray[np.int64], ours: Tensor, theirs: Tensor) -> None:
        def square(values: Tensor) -> Tensor:
            return values.square().sum(dim=-1).cpu().double()

        error, size = square(ours - theirs), square(theirs)
        norms = (square(ours) * size).sqrt()
        products = (ours * theirs).sum(dim=-1).cpu().double()
        # Two zero tokens point the same way, a zero and another one do not.
        cosine = torch.where(norms > 0, products / norms, (error == 0).double()).clamp(-1, 1)
        self.error += float(error.sum())
        self.size += float(size.sum())
        self.change += float(square(theirs[:, 1:] - theirs[:, :-1]).sum())
        self.num_frames += error.shape[0] * error.shape[1]
        self.num_changes += error.shape[0] * (error.shape[1] - 1)
        self.cosines += cosine.mean(dim=(1, 2)).tolist()
        self.smallest = min(self.smallest, float(cosine.min()))

    def results(self) -> dict[str, Pair]:
        relative = _root_ratio(self.error, self.size)
        change = self.change / self.num_changes if self.num_changes else 0.0
        against_change = _root_ratio(self.error / self.num_frames, change)
        return {
            "relative_error": (relative, 0.0),
            "cosine_mean": (math.fsum(self.cosines) / len(self.cosines), 1.0),
            "cosine_min": (self.smallest, 1.0),
            "error_over_change": (against_change, None if against_change is None else 0.0),
        }


class Reconstruction:
    """The tokenizer's loss: consecutive frames of a cache encoded and decoded, then held against
    the current frame of the reference."""

    def __init__(self, tokenizer: DeltaTok, *, grid: tuple[int, int], bfloat16: bool) -> None:
        self._tokenizer, self._grid, self._bfloat16 = tokenizer, grid, bfloat16
        self._losses: tuple[list[float], list[float]] = ([], [])

    def add(self, numbers: NDArray[np.int64], ours: Tensor, theirs: Tensor) -> None:
        truth = theirs[:, 1:].flatten(0, 1)
        for x, losses in zip((ours, theirs), self._losses, strict=True):
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
                previous, current = x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)
                z = self._tokenizer.encode(previous, current, grid=self._grid)
                decoded = self._tokenizer.decode(z, previous, grid=self._grid)
            loss = smooth_l1(decoded.float(), truth).mean(dim=(1, 2)).reshape(len(numbers), -1)
            losses += loss.mean(dim=1).tolist()

    def results(self) -> dict[str, Pair]:
        ours, theirs = (math.fsum(losses) / len(losses) for losses in self._losses)
        if not (math.isfinite(ours) and math.isfinite(theirs)):
            raise DeltatokError(
                "the tokenizer's reconstruction is not finite: evaluate with --autocast float32"
            )
        return {"reconstruction_loss": (ours, theirs)}


class Segmentation:
    """The head's mIoU over all frames."""

    def __init__(self, head: SegmentationHead, labels: LabelFolder, cache: PatchShards) -> None:
        self._head, self._labels, self._cache = head, labels, cache
        self._keys, self._clips = cache.keys, cache.clip_index.tolist()
        num_classes = head.config.num_classes
        self._metrics = (MeanIoU(num_classes=num_classes), MeanIoU(num_classes=num_classes))

    def add(self, numbers: NDArray[np.int64], ours: Tensor, theirs: Tensor) -> None:
        frames = self._cache.frame_index(numbers).tolist()
        for row, (number, indices) in enumerate(zip(numbers.tolist(), frames, strict=True)):
            for frame, index in enumerate(indices):
                label = self._labels.frame(self._keys[self._clips[number]], index)
                size = (label.shape[0], label.shape[1])
                for x, metric in zip((ours, theirs), self._metrics, strict=True):
                    grid = self._cache.grid
                    classes = class_map(self._head, x[row, frame], grid=grid, size=size)
                    metric.update(classes[None], torch.from_numpy(label)[None].to(classes))

    def results(self) -> dict[str, Pair]:
        ours, theirs = (float(metric.compute()) for metric in self._metrics)
        return {"miou": (ours, theirs)}


def _root_ratio(top: float, bottom: float) -> float | None:
    """The root of top / bottom; None where there is nothing to divide by."""
    return math.sqrt(top / bottom) if bottom > 0 else (0.0 if top == 0 else None)
