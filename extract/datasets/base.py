"""A labelled data set -> the targets to extract: what its loaders give, and how that becomes clips.

A loader (vspw.py, ...) knows a layout, and names of every target the frames and the label.
Whether the files are there and fit together is looked at here, in the same way for all: a target
that is incomplete goes to quarantine by name, and a data set without any good one is refused.
Sizes are read from the files' headers.

`DatasetConfig` is what `deltatok-extract --dataset` takes: which data set, where it lies, what is a
target.
"""

import logging
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from ...shards.errors import UsageError
from ...shards.evaluation.geometry import KB_CROP
from ...shards.evaluation.labels import Kind, LabelRule, PlanTarget, is_inside, leads_out
from ...shards.files import read_text
from ...shards.npy import map_npy
from ..config import ExtractConfig, RunConfig, check, check_count, positive
from ..decoding.images import EXIF_ORIENTATION, PILLOW_ERRORS
from ..sources.clip import Clip, ClipSource, TargetFrames, Unreadable

DatasetName = Literal["vspw", "cityscapes", "kitti", "sequences", "little-world"]

NUM_FRAMES = {"val": 7, "train": 1}
"""4 context frames and 3 future ones to forecast; the labelled frame alone to fit heads."""

_ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    "split_file": ("vspw", "kitti"),
    "every": ("vspw", "sequences"),
    **dict.fromkeys(
        ("name", "images", "labels", "kind", "fps", "stride_s", "ignore", "binary", "steps_per_m"),
        ("sequences",),
    ),
}
"""The data sets that read an option; to all others it would mean nothing."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(RunConfig):
    """A labelled data set in, an evaluation cache out."""

    dataset: DatasetName
    """vspw, cityscapes, kitti (Eigen's split), little-world, or sequences: folders of frames and
    their labels, told by --images and --labels."""
    root: str
    """Folder of the data set, in the layout it is published in."""
    split: Literal["val", "train"] = "val"
    """val: targets to evaluate on, 7 frames each; train: to fit heads on, the labelled frame."""
    split_file: str | None = None
    """vspw: list of videos, instead of ROOT/val.txt. kitti: the list of Eigen's test frames, which
    must be given; lines "DATE/DRIVE/image_02/data/FRAME.png DEPTH ..." or "DATE/DRIVE FRAME l"."""
    name: str | None = None
    """sequences: what the data set is called, in reports and in the cache's identity
    [sequences]."""
    images: str | None = None
    """sequences: pattern of the frames below ROOT, like "JPEGImages/480p/*/*.jpg"; what the last *
    stands for is the frame's name, what the others stand for its sequence."""
    labels: str | None = None
    """sequences: pattern of the labels, with as many *: "Annotations/480p/*/*.png"; PNG."""
    kind: Literal["segmentation", "depth"] | None = None
    """sequences: what the labels are [segmentation]."""
    fps: float | None = None
    """sequences: frames a second of the frames in the folders."""
    stride_s: float | None = None
    """sequences: seconds between two frames of a window [0.2], to the nearest whole frame."""
    every: int | None = None
    """Only every so many-th frame of a sequence may be a target, the first being frame N - 1
    [vspw: 20, sequences: 1]."""
    ignore: tuple[int, ...] = ()
    """sequences: stored values that count nowhere, beside 255 in classes and 0 in depth."""
    binary: bool = False
    """sequences: masks of 0 and anything else (255, object numbers) become classes 0 and 1."""
    steps_per_m: float | None = None
    """sequences, depth: stored steps in a metre; 1000 for millimetres."""
    num_frames: int | None = None
    """Frames of a window, the target being the last [7 with split val, 1 with train]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("root", self.root, bool(self.root), "the data set's folder")
        check_count("num_frames", self.num_frames)
        check_count("every", self.every)
        for name in ("fps", "stride_s", "steps_per_m"):
            value = getattr(self, name)
            check(name, value, value is None or positive(value), "a number above 0")
        valid = all(value >= 0 for value in self.ignore)
        check("ignore", self.ignore, valid, "stored values, 0 or more")
        self._check_options()
        if self.dataset == "sequences":
            self._check_sequences()

    @property
    def frames_a_window(self) -> int:
        """`num_frames`, or what suits the split."""
        return NUM_FRAMES[self.split] if self.num_frames is None else self.num_frames

    def to_extraction(self) -> ExtractConfig:
        """The same run as run_extraction wants it; its sampling is not used."""
        run = {field.name: getattr(self, field.name) for field in fields(RunConfig)}
        two_squares: dict[str, Any] = {"num_windows": 2, "num_frames": self.frames_a_window}
        return ExtractConfig(videos=(self.root,), **two_squares, **run)

    def _check_options(self) -> None:
        for name, datasets in _ONLY_FOR.items():
            given = getattr(self, name)
            if given not in (None, (), False) and self.dataset not in datasets:
                raise UsageError(
                    f"{name}: got {given!r} with dataset {self.dataset}, which does not read it "
                    f"(only {', '.join(datasets)}): leave it out"
                )

    def _check_sequences(self) -> None:
        for name in ("images", "labels", "fps"):
            if getattr(self, name) is None:
                raise UsageError(
                    f"{name}: not given, dataset sequences cannot do without: give e.g. "
                    '--images "images/*/*.png" --labels "labels/*/*.png" --fps 15'
                )
        if self.kind == "depth" and self.steps_per_m is None:
            raise UsageError("steps_per_m: not given, depth needs it: 1000 for millimetres")
        if self.kind != "depth" and self.steps_per_m is not None:
            raise UsageError("steps_per_m: only for depth: add --kind depth, or leave it out")
        if self.kind == "depth" and self.binary:
            raise UsageError("binary: is for masks, not for depth: leave it out")


LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
"""Pillow's names of one whole number a pixel."""


class BadLabel(ValueError):
    """A label that cannot be used, or its frame; says which and why."""


def file_size(root: Path, name: str) -> int:
    """Bytes; FileNotFoundError if it is not there, BadLabel if it is a folder, a pipe or the like,
    which would be waited for."""
    status = (root / name).stat()
    if not stat.S_ISREG(status.st_mode):
        raise BadLabel(f"{name} is no file")
    return status.st_size


def image_size(root: Path, name: str) -> tuple[int, int]:
    """Height and width of a frame as it is shown, from its header alone: asking a PNG for metadata
    that it does not begin with would decode it. BadLabel if it is no image."""
    with _image_header(root, name, formats=("JPEG", "PNG")) as image:
        told = image.format == "JPEG" or "exif" in image.info
        turned = told and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
        width, height = image.size
    return (width, height) if turned else (height, width)


def label_size(root: Path, name: str, *, frame: int | None) -> tuple[int, int]:
    """Height and width of a label; BadLabel if it cannot be read."""
    if frame is None:
        with _image_header(root, name, formats=("PNG", "BMP", "TIFF")) as image:
            mode, (width, height) = image.mode, image.size
        if mode not in LABEL_MODES:
            raise BadLabel(f"{name} is an image of mode {mode}, wanted one whole number a pixel")
        return height, width
    try:
        shape = map_npy(root / name).shape
    except (OSError, ValueError) as error:
        raise BadLabel(f"{name} is no array that can be read: {error}") from error
    if len(shape) != 3 or shape[0] <= frame:
        raise BadLabel(f"{name} has shape {shape}, wanted (frames, H, W) with frame {frame}")
    return int(shape[1]), int(shape[2])


@contextmanager
def _image_header(root: Path, name: str, *, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    try:
        with Image.open(root / name, formats=formats) as image:
            yield image
    except UnidentifiedImageError as error:  # whose text names the whole path
        raise BadLabel(f"{name} is no image that can be read: no {', '.join(formats)}") from error
    except PILLOW_ERRORS as error:
        raise BadLabel(f"{name} is no image that can be read: {error}") from error


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
        text = read_text(path, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); wanted {what}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"{path}: is empty; wanted {what}")
    return lines


def _clip(dataset: Dataset, target: DatasetTarget, root: Path, *, split: str) -> Clip:
    path = root / target.frames[-1] if dataset.is_video else root
    names = () if dataset.is_video else target.frames
    source: ClipSource = TargetFrames(target.numbers, names)
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
