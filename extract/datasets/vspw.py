"""VSPW: videos at 15 frames a second, every frame labelled, every 20th a target.

    ROOT/val.txt, train.txt              a video's name a line
    ROOT/data/VIDEO/origin/*.jpg         frames
    ROOT/data/VIDEO/mask/*.png           uint8; 0 = none, 1 to 124 = classes 0 to 123, above = none

As released: the targets of a video are its frames 19, 39, ..., as sorted by name, the frames of a
window 3 apart. A frame of which only the label is there counts, so that one that was lost does not
move all after it.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ...shards.evaluation.labels import LabelRule
from .base import Dataset, DatasetConfig, DatasetTarget, need_layout, read_lines, window_numbers

FPS = 15.0
STRIDE = 3
"""Frames: 0.2 s."""
EVERY = 20
LAYOUT = "{split}.txt, data/VIDEO/origin/*.jpg and data/VIDEO/mask/*.png (VSPW as published)"


def load_vspw(config: DatasetConfig) -> Dataset:
    """Its targets; UsageError for another layout."""
    root, wanted = Path(config.root), LAYOUT.format(split=config.split)
    if config.split_file is None:
        need_layout(root, "data", f"{config.split}.txt", wanted=wanted)
        listed = root / f"{config.split}.txt"
    else:
        need_layout(root, "data", wanted=wanted)
        listed = Path(config.split_file)
    videos = list(dict.fromkeys(read_lines(listed, what="a video's name a line")))
    targets, left_out = [], Counter[str]()
    every = config.every or EVERY
    for video in videos:
        num_labels = len(_stems(root / "data" / video / "mask", ".png"))
        if 0 < num_labels < every:
            left_out[f"in videos of fewer than {every} frames"] += num_labels
        for target in _targets(root, video, config):
            if target.numbers[0] < 0:
                left_out["too near to the start of their video"] += 1
            else:
                targets.append(target)
    return Dataset(
        name="vspw",
        fps=FPS,
        stride=STRIDE,
        targets=targets,
        kind="segmentation",
        rule=LabelRule(name="vspw"),
        left_out=dict(left_out),
    )


def _targets(root: Path, video: str, config: DatasetConfig) -> Iterator[DatasetTarget]:
    folder = f"data/{video}"
    frames = _stems(root / folder / "origin", ".jpg")
    labels = _stems(root / folder / "mask", ".png")
    if not frames:
        yield DatasetTarget(
            sequence=video,
            name="missing",
            frames=(),
            numbers=(0,),
            label="",
            problem=f"{folder}/origin holds no frames (*.jpg)",
        )
        return
    names = sorted(frames | labels)
    every = config.every or EVERY
    for last in range(every - 1, len(names), every):
        numbers = window_numbers(last, num_frames=config.frames_a_window, stride=STRIDE)
        yield DatasetTarget(
            sequence=video,
            name=names[last],
            frames=tuple(f"{folder}/origin/{names[max(i, 0)]}.jpg" for i in numbers),
            numbers=numbers,
            label=f"{folder}/mask/{names[last]}.png",
        )


def _stems(folder: Path, suffix: str) -> set[str]:
    """Names without suffix; those that begin with a dot are no frames."""
    if not folder.is_dir():
        return set()
    names = (child.name for child in folder.iterdir())
    return {name[: -len(suffix)] for name in names if name.endswith(suffix) and name[0] != "."}
