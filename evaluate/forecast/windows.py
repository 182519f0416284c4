"""Which windows of a cache belong together, what their labels are, what their noise is drawn for.

A uniform cache: every window shows a whole frame, labels lie in LABELS/CLIP_KEY.npy. An evaluation
cache (deltatok-extract --dataset): a clip's windows are the square crops of one labelled target,
labels lie in the data set's own folder.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...shards.cache import CacheInfo
from ...shards.errors import DamagedShard, UsageError
from ...shards.evaluation.geometry import Cut
from ...shards.evaluation.labels import IGNORE, NO_DEPTH, ClipLabels
from ...shards.evaluation.targets import (
    Target,
    cut_of_crops,
    last_frames,
    load_label,
    read_targets,
    windows_of_clips,
)
from ...shards.patches.reader import PatchShards
from ...train.models.heads import DepthHead, SegmentationHead
from ..report.pictures import Tile
from .config import ForecastConfig
from .rollout import NoiseName
from .scores import WHOLE, Head, Label, LabelledFrame

logger = logging.getLogger(__name__)

NUM_CLASSES = {"vspw": 124, "cityscapes": 19, "binary": 2}
"""Classes of the data sets whose label rule fixes them."""


class UniformWindows:
    """Windows of whole frames at a fixed rate, each a target of its own."""

    def __init__(
        self, config: ForecastConfig, cache: PatchShards, labels: ClipLabels | None
    ) -> None:
        self._config = config
        self._cache = cache
        self._labels = labels

    def batches(self) -> list[list[int]]:
        """Every window once, in the order of the cache."""
        size = self._config.batch_windows
        numbers = list(range(len(self._cache)))
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def names(self, indices: list[int]) -> list[NoiseName]:
        """What each window's noise is drawn for."""
        return [(index,) for index in indices]

    def sequence(self, index: int) -> str:
        """What a window belongs to: windows of one sequence are alike, and resampled together."""
        return self._cache.keys[int(self._cache.clip_index[index])]

    def crop(self, index: int) -> tuple[Cut, bool]:
        """How the window's frames are cut, and whether it shows the second of their crops."""
        return WHOLE, False

    def future_names(self, index: int) -> list[str]:
        """What the file of a window's known futures may be called, without its suffix."""
        return [self.sequence(index)]

    def labelled(self, indices: list[int], frame: int = -1) -> list[LabelledFrame]:
        """The labels of the target frames of a batch, or of number `frame` of those that take part;
        none without labels."""
        if self._labels is None:
            return []
        frames = self._cache.frame_index(indices)[:, : self._config.num_frames]
        targets = frames[:, frame].tolist()
        keys = list(map(self.sequence, indices))
        labels = map(self._labels.frame, keys, targets)
        return [
            LabelledFrame(sequence=key, positions=(position,), cut=WHOLE, label=label)
            for position, (key, label) in enumerate(zip(keys, labels, strict=True))
        ]

    def shown_frames(self, index: int) -> tuple[Tile, ...]:
        """What a window shows, for pictures; none here: --videos has them."""
        return ()

    def shown_labels(self, index: int) -> tuple[Label, ...]:
        """Labels of a window for pictures: of all frames, of the target alone, or none; each
        covers what the window shows."""
        if self._labels is None:
            return ()
        frames = self._cache.frame_index([index])[0, : self._config.num_frames].tolist()
        return tuple(self._labels.frame(self.sequence(index), frame) for frame in frames)


class EvaluationWindows:
    """The crops of labelled targets, as `UniformWindows`; the target is the last frame of its
    windows."""

    def __init__(self, config: ForecastConfig, cache: PatchShards, head: Head | None) -> None:
        """Check cache, targets and head against one another.

        Raises:
            UsageError: windows of another length than context and horizon; a head of another kind
                or with another number of classes than the labels.
            DamagedShard: windows without a target, or more of them than a target has.
        """
        self._config = config
        self._cache = cache
        self._head = head
        self._targets = read_targets(config.patches)
        self._crops = windows_of_clips(cache)
        if cache.shape[0] != config.num_frames:
            raise UsageError(
                f"--patches {config.patches}: windows of {cache.shape[0]} frames that end at the "
                f"labelled one, but num_context + mid_steps = {config.num_frames}; set "
                "--num-context and --mid-steps so that they are as many"
            )
        for key, crops in self._crops.items():
            if key not in self._targets or len(crops) > 2:
                raise DamagedShard(
                    f"{config.patches}: clip {key} has {len(crops)} windows and "
                    f"{'a' if key in self._targets else 'no'} target, wanted a target seen in one "
                    "or two windows: extract it again"
                )
        if head is not None:
            for target in self._targets.values():
                _check_head(config, head, target)
        missing = cache.info.counts.get("quarantined", 0)
        if missing:
            logger.warning(
                "%s: %d of %d targets are in quarantine and not scored (quarantine.jsonl)",
                config.patches,
                missing,
                missing + len(self._crops),
            )

    def batches(self) -> list[list[int]]:
        """As many whole targets at once as batch_windows allows, one at least; as stored. The first
        (left or top) crop of a target comes first."""
        batches: list[list[int]] = []
        for crops in sorted(self._crops.values(), key=min):
            if batches and len(batches[-1]) + len(crops) <= self._config.batch_windows:
                batches[-1] += crops
            else:
                batches.append(list(crops))
        return batches

    def names(self, indices: list[int]) -> list[NoiseName]:
        """Target and crop, not the window's number: the same in every cache of the data set."""
        keys = [self._key(index) for index in indices]
        return [
            (key, self._crops[key].index(index)) for key, index in zip(keys, indices, strict=True)
        ]

    def sequence(self, index: int) -> str:
        return self._targets[self._key(index)].sequence

    def crop(self, index: int) -> tuple[Cut, bool]:
        crops = self._crops[self._key(index)]
        return cut_of_crops(self._cache.crop[crops]), crops.index(index) == 1

    def future_names(self, index: int) -> list[str]:
        """The target's key, its sequence's, and that of the video it is in, as an extraction of the
        videos' folder names it."""
        target = self._targets[self._key(index)]
        video = [name.split("/", 1)[-1] for name in target.frames if len(target.frames) == 1]
        return [target.key, target.sequence, *video]

    def labelled(self, indices: list[int]) -> list[LabelledFrame]:
        if self._config.labels is None:
            return []
        return [
            LabelledFrame(
                sequence=self._targets[key].sequence,
                positions=tuple(indices.index(window) for window in self._crops[key]),
                cut=cut_of_crops(self._cache.crop[self._crops[key]]),
                label=self._label(key),
            )
            for key in dict.fromkeys(map(self._key, indices))
        ]

    def shown_frames(self, index: int) -> tuple[Tile, ...]:
        if self._config.labels is None:
            return ()
        from ..report.frames import frames_of_crop  # with decoders, which nothing else needs

        numbers = self._cache.frame_index([index])[0].tolist()
        target, crop = self._targets[self._key(index)], self._cache.crop[index]
        return frames_of_crop(target, Path(self._config.labels), numbers, crop)

    def shown_labels(self, index: int) -> tuple[Label, ...]:
        if self._config.labels is None:
            return ()
        key = self._key(index)
        crops = self._cache.crop[self._crops[key]]
        return (label_of_crop(self._label(key), crops, self._crops[key].index(index)),)

    def _key(self, index: int) -> str:
        return self._cache.keys[int(self._cache.clip_index[index])]

    def _label(self, key: str) -> Label:
        target, config = self._targets[key], self._config
        label = load_label(target, str(config.labels))
        if isinstance(self._head, SegmentationHead):
            classes = label[label != IGNORE]
            num_classes = self._head.config.num_classes
            if classes.size and int(classes.max()) >= num_classes:
                raise UsageError(
                    f"target {key}: its label has class {int(classes.max())}, the head "
                    f"{config.head} knows 0 to {num_classes - 1} ({IGNORE} = ignore); give the "
                    "head of these labels"
                )
        elif config.depth_range_m is not None:
            low, high = config.depth_range_m
            label = np.where((label >= low) & (label <= high), label, np.float32(NO_DEPTH))
        return label


WindowArrangement = UniformWindows | EvaluationWindows
"""The windows of a cache in batches, with their labels."""


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


def is_evaluation(info: CacheInfo) -> bool:
    """Whether `deltatok-extract --dataset` made the cache."""
    sampling = info.identity.get("sampling")
    return isinstance(sampling, Mapping) and sampling.get("policy") == "evaluation"


def open_windows(
    config: ForecastConfig, cache: PatchShards, head: Head | None
) -> WindowArrangement:
    """The windows of a uniform or evaluation cache, checked against labels and head.

    Raises UsageError or CacheMismatch where they do not fit one another.
    """
    if config.depth_range_m is not None and not isinstance(head, DepthHead):
        raise UsageError("--depth-range-m: no depth --head is given, so that nothing is in metres")
    if is_evaluation(cache.info):
        return EvaluationWindows(config, cache, head)
    if config.labels is None or head is None:
        return UniformWindows(config, cache, None)
    if not isinstance(head, SegmentationHead):
        raise UsageError(
            f"--head {config.head}: a {type(head).__name__}, but the labels of a cache of sampling "
            "policy uniform are classes; give a SegmentationHead, or an evaluation cache "
            "(deltatok-extract --dataset) of labels in metres"
        )
    labels = ClipLabels(
        config.labels,
        last_frames=last_frames(cache, config.num_frames),
        num_classes=head.config.num_classes,
    )
    return UniformWindows(config, cache, labels)


def _check_head(config: ForecastConfig, head: Head, target: Target) -> None:
    wanted = SegmentationHead if target.kind == "segmentation" else DepthHead
    if not isinstance(head, wanted):
        raise UsageError(
            f"--head {config.head}: a {type(head).__name__}, but the label of target {target.key} "
            f"is of kind {target.kind}; give a {wanted.__name__}"
        )
    known = NUM_CLASSES.get(target.rule.name)
    if isinstance(head, SegmentationHead) and known not in (None, head.config.num_classes):
        raise UsageError(
            f"--head {config.head}: {head.config.num_classes} classes, the labels of target "
            f"{target.key} ({target.rule.name}) have {known}; give a head of this data set"
        )
