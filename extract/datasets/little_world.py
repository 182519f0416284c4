"""The little world of `deltatok-pipeline quickstart`: one target a clip.

    ROOT/world.json                  its settings: fps and tick_s are read
    ROOT/val/NNNN.mp4                clips to evaluate on;    split train: ROOT/head
    ROOT/labels/val/NNNN.mp4.npy     uint8 (frames, H, W), of every frame

A window begins with the clip, its frames are one tick apart.
"""

import json
from pathlib import Path

from ...shards.errors import UsageError
from ...shards.evaluation.labels import LabelRule
from ...shards.files import read_text
from ..config import positive
from .base import Dataset, DatasetConfig, DatasetTarget, need_layout

FOLDERS = {"val": "val", "train": "head"}


def load_little_world(config: DatasetConfig) -> Dataset:
    """Its targets; UsageError for another layout."""
    root, folder = Path(config.root), FOLDERS[config.split]
    wanted = f"world.json, {folder}/*.mp4 and labels/{folder}/*.mp4.npy (deltatok-pipeline)"
    need_layout(root, "world.json", folder, f"labels/{folder}", wanted=wanted)
    fps, stride = _clock(root / "world.json")
    numbers = tuple(range(0, stride * config.frames_a_window, stride))
    targets = [
        DatasetTarget(
            sequence=clip.stem,
            name=f"{numbers[-1]:06d}",
            frames=(f"{folder}/{clip.name}",),
            numbers=numbers,
            label=f"labels/{folder}/{clip.name}.npy",
            frame=numbers[-1],
        )
        for clip in sorted((root / folder).glob("*.mp4"))
    ]
    return Dataset(
        name="little-world",
        fps=fps,
        stride=stride,
        targets=targets,
        kind="segmentation",
        rule=LabelRule(),
        is_video=True,
    )


def _clock(path: Path) -> tuple[float, int]:
    """Frames a second, and frames a tick."""
    try:
        settings = json.loads(read_text(path))["settings"]
        fps, tick_s = float(settings["fps"]), float(settings["tick_s"])
        if not (positive(fps) and positive(tick_s)):
            raise ValueError(f"fps {fps}, tick_s {tick_s}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not the file of a little world ({error!r}): make it again"
        ) from error
    return fps, max(1, round(fps * tick_s))
