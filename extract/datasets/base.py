"""A labelled data set -> the targets to extract: what its loaders give, and how that becomes clips.

A loader (dataset_vspw.py, ...) knows a layout, and names of every target the frames and the label.
Whether the files are there and fit together is looked at here, in the same way for all: a target
that is incomplete goes to quarantine by name, and a data set without any good one is refused.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..shards.crops import KB_CROP
from ..shards.errors import UsageError
from ..shards.plan_target import Kind, LabelRule, PlanTarget, is_inside, leads_out
from .clips import Clip, Source, TargetFrames, Unreadable
from .label_headers import BadLabel, file_size, image_size, label_size

_LOGGER = logging.getLogger(__name__)

MAX_SIZE_DIFFERENCE = 1
"""Pixels by which a label may differ from its frame; DAVIS 2017 has such labels."""
NAMES_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class DatasetTarget:
    """A labelled frame and the frames before it; paths are posix, relative to the data set."""

    sequence: str
    name: str
    """Of the target's frame, without suffix."""
    frames: tuple[str, ...]
    """Image files in order, the target last; or one video."""
    numbers: tuple[int, ...]
    """Of the frames in the sequence, from 0."""
    label: str
    problem: str | None = None
    """Why there is no such target, where the loader knows."""
    frame: int | None = None
    """Which frame of `label`, a .npy of many."""

    @property
    def key(self) -> str:
        """Of the clip in the cache."""
        return f"{self.sequence}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a loader gives."""

    name: str
    fps: float
    stride: int
    """Frames from one frame of a window to the next."""
    targets: Sequence[DatasetTarget]
    kind: Kind
    rule: LabelRule
    region: Literal["whole", "kb"] = "whole"
    left_out: dict[str, int] = field(default_factory=dict)
    """Why -> how many labelled frames are no targets, by the protocol."""
    is_video: bool = False
    """`frames` names a video."""


def window_numbers(last: int, *, num_frames: int, stride: int) -> tuple[int, ...]:
    """The numbers of a window's frames that ends with frame `last`; the first may be negative."""
    return tuple(last - stride * step for step in reversed(range(num_frames)))


def clips_of_dataset(dataset: Dataset, root: Path, *, split: str) -> list[Clip]:
    """The targets as clips, sorted by key; those that cannot be used are marked so.

    Raises UsageError where there is no target, or none that can be used.
    """
    for reason, count in dataset.left_out.items():
        _LOGGER.info("%s: %d labelled frames left out: %s", dataset.name, count, reason)
    if not dataset.targets:
        reasons = "; ".join(f"{count} {why}" for why, count in dataset.left_out.items())
        raise UsageError(
            f"{root}: no labelled frame of {dataset.name} has its {split} window "
            f"({reasons or 'none found'}): docs/evaluation.md has the layouts"
        )
    clips = [_clip(dataset, target, root, split=split) for target in dataset.targets]
    bad = [clip for clip in clips if isinstance(clip.source, Unreadable)]
    if len(bad) == len(clips):
        first = bad[0].source
        assert isinstance(first, Unreadable)
        raise UsageError(
            f"{root}: none of the {len(clips)} targets of {dataset.name} can be used, first "
            f"{bad[0].key}: {first.reason}"
        )
    _LOGGER.info("%s: %d targets, %d of them incomplete", dataset.name, len(clips), len(bad))
    return sorted(clips, key=lambda clip: clip.key)


def need_layout(root: Path, *paths: str, wanted: str) -> None:
    """Raises UsageError that says what was expected and what is there unless all `paths` are."""
    if not root.is_dir():
        raise UsageError(f"--root {root}: no such folder; wanted {wanted}")
    for path in paths:
        if not (root / path).exists():
            names = sorted(child.name for child in root.iterdir())
            found = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
            raise UsageError(
                f"--root {root}: has no {path}; wanted {wanted}; found {found or 'nothing'}"
            )


def read_lines(path: Path, *, what: str) -> list[str]:
    """The lines of a list that are not empty, stripped; UsageError if it cannot be read or has
    none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); wanted {what}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"{path}: is empty; wanted {what}")
    return lines


def _clip(dataset: Dataset, target: DatasetTarget, root: Path, *, split: str) -> Clip:
    path = root / target.frames[-1] if dataset.is_video else root
    names = () if dataset.is_video else target.frames
    source: Source = TargetFrames(target.numbers, names)
    size, planned, problem = 0, None, target.problem
    if problem is None:
        try:
            size = sum(file_size(root, name) for name in target.frames)
            file_size(root, target.label)
            planned = _planned(dataset, target, root)
        except OSError as error:
            problem = _described(error, root)
        except BadLabel as error:
            problem = str(error)
    if problem is not None:
        size, source = 0, Unreadable(problem)
    return Clip(
        key=target.key, path=path, size_bytes=size, source=source, split=split, target=planned
    )


def _described(error: OSError, root: Path) -> str:
    """In words that are the same wherever the data set lies."""
    path = Path(str(error.filename or root))
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    if isinstance(error, FileNotFoundError):
        return f"{name} is missing"
    return f"{name} cannot be read: {error.strerror or type(error).__name__}"


def _planned(dataset: Dataset, target: DatasetTarget, root: Path) -> PlanTarget:
    """What the plan says of the target; BadLabel, OSError where its files do not fit."""
    if not is_inside(target.label):
        raise BadLabel(f"{target.label!r} cannot be stored as a path: rename it")
    if leads_out(root, target.label):
        raise BadLabel(
            f"{target.label} is a link that leads out of {root}: labels must lie in it (its top "
            "folders may be links)"
        )
    stored = label_size(root, target.label, frame=target.frame)
    if not dataset.is_video:
        frame = image_size(root, target.frames[-1])
        if any(abs(a - b) > MAX_SIZE_DIFFERENCE for a, b in zip(frame, stored, strict=True)):
            raise BadLabel(
                f"{target.label} has {stored[0]} x {stored[1]} pixels, its frame "
                f"{target.frames[-1]} {frame[0]} x {frame[1]}: labels are never resized"
            )
    rule = dataset.rule
    if target.frame is not None:
        rule = LabelRule(name=rule.name, ignore=rule.ignore, frame=target.frame)
    return PlanTarget(
        label=target.label,
        label_size=KB_CROP if dataset.region == "kb" else stored,
        frames=target.frames if all(map(is_inside, target.frames)) else (),
        kind=dataset.kind,
        sequence=target.sequence,
        rule=rule,
    )
