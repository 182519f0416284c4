"""The labelled targets of an evaluation cache, and their labels, read from the data set's folder.

    targets = read_targets("cache/vspw_val")            # clip key -> Target
    label = load_label(targets[key], "/data/VSPW")      # uint8 (H, W) or float32 (H, W) metres
    first, second = windows_of_clips(cache)[key]        # its two crops

Labels are never resized. FORMAT.md "Evaluation caches".
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..cache import PATCHES, compare, read_cache_info
from ..errors import DeltatokError, UsageError
from ..files import local_path
from ..npy import map_npy
from ..patches.reader import PatchShards
from ..plan import PLAN, Plan
from .geometry import Cut
from .labels import PlanTarget, apply_rule, leads_out

MAX_LABEL_PIXELS = 2**26
"""8192 x 8192: more is no label, but a file made to fill the memory (a guess)."""

_FORMATS = ("PNG", "BMP", "TIFF")
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, OverflowError, EOFError)
"""What Pillow raises for files that are no images of their kind."""


@dataclass(frozen=True, kw_only=True)
class Target(PlanTarget):
    """A labelled frame: the last of the windows of one clip."""

    key: str
    """The clip's key: sequence/frame."""
    split: str | None


def read_targets(cache_folder: Path | str) -> dict[str, Target]:
    """The targets of an evaluation cache by clip key, in plan order; those in quarantine too, which
    have no windows.

    Raises CacheMismatch for any other cache, DamagedShard for a plan that cannot be read.
    """
    info = read_cache_info(cache_folder, format=PATCHES)
    compare(
        info.identity,
        {"sampling": {"policy": "evaluation"}},
        what_got=str(cache_folder),
        what_wanted="an evaluation cache (deltatok-extract --dataset)",
        fields=["sampling.policy"],
        advice="extract one with --dataset",
    )
    plan = Plan.open(cache_folder, sha256=info.files.get(PLAN, {}).get("sha256"))
    return {
        entry.key: Target(key=entry.key, split=entry.split, **vars(entry.target))
        for entry in plan
        if entry.target is not None
    }


def load_label(target: Target, root: Path | str) -> NDArray[np.uint8] | NDArray[np.float32]:
    """The label after the data set's rule: classes uint8 (H, W), 255 = ignore, or metres float32
    (H, W), 0 = none; (H, W) is target.label_size.

    root: the data set's folder. Raises UsageError for a file that is not there, leads out of the
    folder, is no label, or has another size than when the cache was made.
    """
    path = label_path(target, local_path(root))
    stored = _read(path, target)
    try:
        label = apply_rule(stored, target.rule)
    except DeltatokError as error:
        raise UsageError(f"{path}: {error}") from error
    if label.shape != target.label_size:
        raise UsageError(
            f"{path}: the label has {label.shape[0]} x {label.shape[1]} pixels, the cache was made "
            f"with one of {target.label_size[0]} x {target.label_size[1]}: give the --labels of "
            "the same data set, or extract again"
        )
    return label


def windows_of_clips(cache: PatchShards) -> dict[str, list[int]]:
    """Clip key -> the numbers of its windows, the left or top crop first."""
    corners = cache.crop[:, :2]
    order = np.lexsort((corners[:, 1], corners[:, 0]))
    windows: dict[str, list[int]] = {}
    for window in order.tolist():
        windows.setdefault(cache.keys[int(cache.clip_index[window])], []).append(window)
    return windows


def last_frames(cache: PatchShards, num_frames: int | None = None) -> dict[str, int]:
    """Clip key -> the highest frame index in its windows, of which the first `num_frames` count."""
    last = np.zeros(len(cache.keys), dtype=np.int64)
    frames = cache.frame_index(np.arange(cache.num_windows))[:, :num_frames]
    np.maximum.at(last, cache.clip_index, frames.max(axis=1))
    return dict(zip(cache.keys, last.tolist(), strict=True))


def cut_of_crops(crops: NDArray[np.float32]) -> Cut:
    """The cut that a target's windows come from.

    crops: float32 (1 or 2, 4), top, left, height, width in source pixels, the first one first.
    """
    if len(crops) == 1:
        return Cut(wide=None, overlap=False)
    wide = bool(crops[1, 1] > crops[0, 1])
    axis = 1 if wide else 0
    return Cut(wide=wide, overlap=bool(crops[0, axis] + crops[0, axis + 2] > crops[1, axis]))


def label_path(target: Target, root: Path) -> Path:
    """Where the label is; UsageError if it is not there or leads out of the folder."""
    if not root.is_dir():
        raise UsageError(f"--labels {root}: no such folder: give the data set's folder")
    path = (root / target.label).resolve()
    if leads_out(root, target.label):
        raise UsageError(
            f"{root / target.label}: leads out of the data set's folder: give the --labels folder "
            "that really holds it"
        )
    if not path.is_file():
        raise UsageError(
            f"{root / target.label}: no such label ({target.key}): give --labels the folder that "
            "was --root when the cache was made"
        )
    return path


def _read(path: Path, target: Target) -> NDArray[Any]:
    if path.suffix == ".npy":
        return _read_npy(path, target)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > MAX_LABEL_PIXELS:
                raise UsageError(
                    f"{path}: {image.width} x {image.height} pixels, more than {MAX_LABEL_PIXELS}: "
                    "no label"
                )
            stored: NDArray[Any] = np.asarray(image)
    except UsageError:
        raise
    except (Image.DecompressionBombError, *_PILLOW_ERRORS) as error:
        raise UsageError(f"{path}: no label that can be read ({error}): restore it") from error
    return _checked(path, stored)


def _read_npy(path: Path, target: Target) -> NDArray[Any]:
    try:
        stored = map_npy(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as an array ({error}): restore it") from error
    frame = target.rule.frame
    if frame is not None:
        if stored.ndim != 3 or frame >= len(stored):
            raise UsageError(f"{path}: {stored.shape}, wanted (frames, H, W) with frame {frame}")
        stored = stored[frame]
    return _checked(path, np.array(stored))


def _checked(path: Path, stored: NDArray[Any]) -> NDArray[Any]:
    if stored.dtype == np.bool_:
        return stored.astype(np.uint8)
    if stored.ndim != 2 or stored.dtype.kind not in "iu":
        raise UsageError(
            f"{path}: {stored.dtype} {stored.shape}, wanted one whole number a pixel (grey or "
            "palette): coloured pictures of labels are no labels"
        )
    return stored
