"""What `deltatok-extract --dataset` is told: which data set, where it lies, what is a target."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from ..shards.errors import UsageError
from .config import ExtractConfig
from .run_config import RunConfig, check, positive

DatasetName = Literal["vspw", "cityscapes", "kitti", "sequences", "little-world"]

NUM_FRAMES = {"val": 7, "train": 1}
"""4 context frames and 3 future ones to forecast; the labelled frame alone to fit heads."""

_ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    "split_file": ("vspw", "kitti"),
    "every": ("vspw", "sequences"),
    "name": ("sequences",),
    "images": ("sequences",),
    "labels": ("sequences",),
    "kind": ("sequences",),
    "fps": ("sequences",),
    "stride_s": ("sequences",),
    "ignore": ("sequences",),
    "binary": ("sequences",),
    "steps_per_m": ("sequences",),
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
        known = get_args(DatasetName)
        check("dataset", self.dataset, self.dataset in known, f"one of {', '.join(known)}")
        check("root", self.root, bool(self.root), "the data set's folder")
        check("split", self.split, self.split in NUM_FRAMES, "val or train")
        frames, every = self.num_frames, self.every
        check("num_frames", frames, frames is None or frames >= 1, "1 or more")
        check("every", every, every is None or every >= 1, "1 or more")
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
