"""KITTI, Eigen's test frames: drives at 10 frames a second, LiDAR depth of many sweeps.

    ROOT/DATE/DRIVE/image_02/data/NNNNNNNNNN.png                               frames (raw data)
    ROOT/val or train/DRIVE/proj_depth/groundtruth/image_02/NNNNNNNNNN.png     uint16, 1/256 m

DATE is like 2011_09_26, DRIVE like 2011_09_26_drive_0002_sync. The list (--split-file) is the
published one in either of its forms, a frame a line:

    2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png DEPTH.png 721.5377
    2011_09_26/2011_09_26_drive_0002_sync 0000000069 l

In the first, DEPTH is `None` for a frame without depth, and may be left out. As released: targets
are those with depth, from frame 19 on, the frames of a window 2 apart (0.2 s); with num_frames 1
every frame can be one. Where the list names a depth image that is not there, the target is
incomplete; where it names none, a frame without one is just no target. Lines that end with r, of
the right camera, are left out.
"""

import re
from collections import Counter
from pathlib import Path

from ...shards.errors import UsageError
from ...shards.evaluation.labels import LabelRule
from .base import Dataset, DatasetConfig, DatasetTarget, need_layout, read_lines, window_numbers

FPS = 10.0
STRIDE = 2
"""Frames: 0.2 s."""
FIRST_TARGET = 19
"""As the release: it leaves out what a longer context could not precede."""
DEPTH_FOLDERS = ("val", "train")
LAYOUT = (
    "DATE/DRIVE/image_02/data/*.png (raw data) and val/ and train/, each with "
    "DRIVE/proj_depth/groundtruth/image_02/*.png (annotated depth maps)"
)
LINES = '"DATE/DRIVE/image_02/data/FRAME.png [DEPTH ...]" or "DATE/DRIVE FRAME l"'

_DRIVE = r"(?P<date>[0-9]{4}_[0-9]{2}_[0-9]{2})/(?P<drive>(?P=date)_drive_[0-9]{4}_sync)"
_LINES = (
    re.compile(_DRIVE + r"/image_02/data/(?P<frame>[0-9]{1,10})\.(?:png|jpg)( (?P<depth>\S+).*)?"),
    re.compile(_DRIVE + r" (?P<frame>[0-9]{1,10}) (?P<side>[lr])"),
)


def load_kitti(config: DatasetConfig) -> Dataset:
    """The targets of the list; UsageError for another layout, or a list of another form."""
    root = Path(config.root)
    if config.split_file is None:
        raise UsageError(
            "split_file: not given, dataset kitti needs the list of frames (Eigen's test split, "
            f"published with most depth estimators), lines {LINES}: give --split-file FILE"
        )
    need_layout(root, wanted=LAYOUT)
    depth_roots = [name for name in DEPTH_FOLDERS if (root / name).is_dir()]
    if not depth_roots:
        need_layout(root, "val", wanted=LAYOUT)
    listed = Path(config.split_file)
    targets, left_out = [], Counter[str]()
    for number, line in enumerate(read_lines(listed, what=f"lines {LINES}"), start=1):
        match = next((found for form in _LINES if (found := form.fullmatch(line))), None)
        if match is None:
            raise UsageError(f"{listed}: line {number} is {line[:120]!r}, wanted {LINES}")
        fields, frame = match.groupdict(), int(match["frame"])
        numbers = window_numbers(frame, num_frames=config.frames_a_window, stride=STRIDE)
        target = _target(root, match, numbers, depth_roots)
        # Some lists have the right camera's image where others have the depth.
        named = "proj_depth" in (fields.get("depth") or "")
        if fields.get("side") == "r":
            left_out["of the right camera"] += 1
        elif fields.get("depth") == "None" or not (named or (root / target.label).exists()):
            left_out["without depth"] += 1
        elif numbers[0] < 0 or (config.frames_a_window > 1 and frame < FIRST_TARGET):
            left_out[f"before frame {FIRST_TARGET} of their drive"] += 1
        else:
            targets.append(target)
    return Dataset(
        name="kitti",
        fps=FPS,
        stride=STRIDE,
        targets=targets,
        kind="depth",
        rule=LabelRule(name="kitti"),
        region="kb",
        left_out=dict(left_out),
    )


def _target(
    root: Path, match: re.Match[str], numbers: tuple[int, ...], depth_roots: list[str]
) -> DatasetTarget:
    drive, last = match["drive"], f"{numbers[-1]:010d}"
    images = f"{match['date']}/{drive}/image_02/data"
    folders = [f"{name}/{drive}/proj_depth/groundtruth/image_02" for name in depth_roots]
    there = [folder for folder in folders if (root / folder).is_dir()]
    return DatasetTarget(
        sequence=drive,
        name=last,
        frames=tuple(f"{images}/{number:010d}.png" for number in numbers),
        numbers=numbers,
        label=f"{(there or folders)[0]}/{last}.png",
        problem=None if there else f"no depth of drive {drive} in {' or '.join(depth_roots)}",
    )
