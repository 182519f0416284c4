"""Cityscapes: snippets of 30 frames at 16 a second, of which the 20th is labelled.

    ROOT/gtFine/SPLIT/CITY/CITY_SEQ_FRAME_gtFine_labelIds.png              uint8 label ids
    ROOT/leftImg8bit_sequence/SPLIT/CITY/CITY_SEQ_FRAME_leftImg8bit.png    SEQ, FRAME: 6 digits

As released: the frames of a window are 3 apart (0.1875 s). For the labelled frames alone
(num_frames 1) leftImg8bit does instead of leftImg8bit_sequence.
"""

import re
from pathlib import Path

from ...shards.errors import UsageError
from ...shards.evaluation.labels import LabelRule
from .base import Dataset, DatasetConfig, DatasetTarget, need_layout, window_numbers

FPS = 16.0
STRIDE = 3
"""Frames: 0.1875 s."""
LABEL_NAME = re.compile(r"(?P<sequence>.+_[0-9]{6})_(?P<frame>[0-9]{6})_gtFine_labelIds\.png")


def load_cityscapes(config: DatasetConfig) -> Dataset:
    """Its targets; UsageError for another layout."""
    root, split = Path(config.root), config.split
    sequences = f"leftImg8bit_sequence/{split}"
    stills = f"leftImg8bit/{split}"
    wanted = (
        f"{sequences}/CITY/*_leftImg8bit.png and gtFine/{split}/CITY/*_gtFine_labelIds.png "
        "(Cityscapes as published)"
    )
    need_layout(root, f"gtFine/{split}", wanted=wanted)
    images = sequences
    if config.frames_a_window == 1 and not (root / sequences).is_dir():
        images = stills
        wanted = f"{sequences} or {stills}, and gtFine/{split}"
    need_layout(root, images, wanted=wanted)
    targets = []
    for label in sorted((root / "gtFine" / split).glob("*/*_gtFine_labelIds.png")):
        match = LABEL_NAME.fullmatch(label.name)
        if match is None:
            raise UsageError(
                f"{label}: its name is not CITY_SEQUENCE_FRAME_gtFine_labelIds.png with two "
                "numbers of 6 digits: restore the published names"
            )
        city, sequence = label.parent.name, match["sequence"]
        numbers = window_numbers(
            int(match["frame"]), num_frames=config.frames_a_window, stride=STRIDE
        )
        targets.append(
            DatasetTarget(
                sequence=sequence,
                name=f"{sequence}_{match['frame']}_leftImg8bit",
                frames=tuple(
                    f"{images}/{city}/{sequence}_{i:06d}_leftImg8bit.png" for i in numbers
                ),
                numbers=numbers,
                label=label.relative_to(root).as_posix(),
                problem="its window begins before frame 0" if numbers[0] < 0 else None,
            )
        )
    return Dataset(
        name="cityscapes",
        fps=FPS,
        stride=STRIDE,
        targets=targets,
        kind="segmentation",
        rule=LabelRule(name="cityscapes"),
    )
