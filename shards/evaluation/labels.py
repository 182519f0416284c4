"""Labels: what a plan says of them, by which rules stored values become classes or metres, and the
label files of whole clips. NumPy only. Letters: H, W pixels.

Labels stay with their data set. The plan of an evaluation cache refers to them, by paths relative
to the data set's folder (`targets` reads them):

    {"label": "gtFine/val/ulm/ulm_000001_000019_gtFine_labelIds.png", "label_size": [1024, 2048],
     "kind": "segmentation", "sequence": "ulm_000001", "rule": {"name": "cityscapes"}}

Those of a uniform cache's clips lie in a folder of their own, named by the clips' keys:

    LABELS/CLIP_KEY.npy    uint8 (frames, H, W), class of each pixel, 255 = ignore
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import CacheMismatch, DamagedShard, UsageError
from ..files import local_path
from ..npy import map_npy
from ..schema import shown
from .geometry import kb_region

Kind = Literal["segmentation", "depth"]
RuleName = Literal["stored", "binary", "vspw", "cityscapes", "depth", "kitti"]

MAX_LABEL_SIDE = 2**16
"""Pixels; more is no label (a guess)."""


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """How the stored values of a label become classes or metres."""

    name: RuleName = "stored"
    """stored: class numbers as they are; binary: 0 and the rest; vspw, cityscapes: the tables of
    these data sets; depth: whole steps of a metre; kitti: depth with KITTI's crop and mask."""
    ignore: tuple[int, ...] = ()
    """Stored values that count nowhere (stored: 255 too; depth: 0 too)."""
    steps_per_m: float | None = None
    """Stored steps in one metre (depth)."""
    frame: int | None = None
    """Which frame of a label file of many, a .npy of (frames, H, W)."""


@dataclass(frozen=True, kw_only=True)
class PlanTarget:
    """The labelled frame that ends a clip's windows."""

    label: str
    """Its label file, a posix path relative to the data set's folder."""
    label_size: tuple[int, int]
    """Height and width in pixels of what the rule makes of it."""
    kind: Kind
    sequence: str
    """The video or drive it is a frame of."""
    rule: LabelRule = field(default_factory=LabelRule)
    frames: tuple[str, ...] = ()
    """Its window's images in order, or the one video they are in, posix paths as `label`'s; for
    pictures. Empty where they are not known."""


def target_to_json(target: PlanTarget) -> dict[str, Any]:
    """Its fields; of the rule only what is set."""
    rule: dict[str, Any] = {"name": target.rule.name}
    if target.rule.ignore:
        rule["ignore"] = list(target.rule.ignore)
    for name in ("steps_per_m", "frame"):
        if getattr(target.rule, name) is not None:
            rule[name] = getattr(target.rule, name)
    fields = {
        "label": target.label,
        "label_size": list(target.label_size),
        "kind": target.kind,
        "sequence": target.sequence,
        "rule": rule,
    }
    return fields | {"frames": list(target.frames)} if target.frames else fields


def check_target(target: PlanTarget, *, where: str) -> None:
    """DamagedShard for a target whose label or frames lead out of the data set, or that has numbers
    that cannot be."""
    for name, path in (("label", target.label), *(("a frame", frame) for frame in target.frames)):
        if not is_inside(path):
            raise DamagedShard(
                f"{where}: {name} is {shown(path)}, wanted a path inside the data set"
            )
    if not all(1 <= side <= MAX_LABEL_SIDE for side in target.label_size):
        raise DamagedShard(
            f"{where}: label_size is {shown(target.label_size)}, wanted height and width"
        )
    steps = target.rule.steps_per_m
    if steps is not None and not steps > 0:
        raise DamagedShard(f"{where}: rule.steps_per_m is {shown(steps)}, wanted a number above 0")


def check_same_target(where: str, stored: PlanTarget | None, asked: PlanTarget | None) -> None:
    """CacheMismatch, naming the field, unless the two are the same."""
    if stored == asked:
        return
    known, wanted = ({} if t is None else target_to_json(t) for t in (stored, asked))
    name = next(name for name in {**known, **wanted} if known.get(name) != wanted.get(name))
    raise CacheMismatch(
        f"{where}: target.{name} is {shown(known.get(name))} in the plan of this cache, now "
        f"{shown(wanted.get(name))}: give the same options and labels as before, or another folder"
    )


def is_inside(path: str) -> bool:
    """Whether a posix path is relative, is plain, and has no `..` in it."""
    parts = path.split("/")
    plain = all(part not in ("", ".", "..") for part in parts)
    return plain and "\\" not in path and "\0" not in path and ":" not in parts[0]


def leads_out(root: Path, path: str) -> bool:
    """Whether links lead from `path`, relative to the folder `root`, out of it.

    The folders at the top of `root` may be links themselves, since data sets are put together from
    several downloads so (KITTI's drives and depth, Cityscapes' frames and labels); what lies below
    one must stay in it.
    """
    found, (top, *rest) = (root / path).resolve(), path.split("/")
    homes = [root.resolve(), *([(root / top).resolve()] if rest else [])]
    return not any(found.is_relative_to(home) for home in homes)


Scalar = TypeVar("Scalar", bound=np.generic)

IGNORE = 255
"""Label value that counts nowhere."""
NO_DEPTH = 0.0
"""Depth value that counts nowhere."""
MIN_DEPTH_M, MAX_DEPTH_M = 1e-3, 80.0
GARG_CROP = (0.40810811, 0.99189189, 0.03594771, 0.96405229)
"""First and last row, first and last column of Garg's window, as fractions of height and width."""
PNG_DEPTH_STEPS = 256.0
"""KITTI depth images hold metres times this, as uint16."""

_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label ids of the 19 evaluated classes, in class order (cityscapesScripts, labels.py)."""
_VSPW_NUM_CLASSES = 124


def apply_rule(stored: NDArray[Any], rule: LabelRule) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Classes uint8 (H, W), IGNORE where there is none, or metres float32 (H, W), NO_DEPTH.

    stored: integers (H, W). Raises UsageError for values that the rule cannot take.
    """
    if rule.name in ("depth", "kitti"):
        return _depth(stored, rule)
    if stored.size and not (stored.min() >= 0 and stored.max() <= 255):
        raise UsageError(
            f"stored values go from {stored.min()} to {stored.max()}, wanted classes 0 to 254 and "
            "255 for none: is this a depth image?"
        )
    classes: NDArray[np.uint8] = _table(rule)[stored]
    return classes


def cityscapes_table() -> NDArray[np.uint8]:
    """uint8 (256,): stored label id -> class 0..18, or IGNORE."""
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[list(_CITYSCAPES_IDS)] = np.arange(len(_CITYSCAPES_IDS))
    return table


def vspw_table() -> NDArray[np.uint8]:
    """uint8 (256,): stored label value -> class 0..123, or IGNORE (0 and above 124)."""
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[1 : _VSPW_NUM_CLASSES + 1] = np.arange(_VSPW_NUM_CLASSES)
    return table


def kb_crop(image: NDArray[Scalar]) -> NDArray[Scalar]:
    """The KITTI benchmark crop of an image (H, W, ...); DeltatokError for a smaller one."""
    top, left, height, width = kb_region(*image.shape[:2])
    return image[top : top + height, left : left + width]


def garg_mask(depth: NDArray[np.float32]) -> NDArray[np.bool_]:
    """bool (H, W): depth strictly between 1 mm and 80 m, inside Garg's window."""
    height, width = depth.shape
    top, bottom, left, right = GARG_CROP
    mask = np.zeros(depth.shape, dtype=np.bool_)
    mask[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = True
    inside: NDArray[np.bool_] = mask & (depth > np.float32(MIN_DEPTH_M)) & (depth < MAX_DEPTH_M)
    return inside


def depth_label(png: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Metres float32 (352, 1216), 0 where there is no value, from a KITTI depth image uint16."""
    depth = kb_crop(png).astype(np.float32) / np.float32(PNG_DEPTH_STEPS)
    return depth * garg_mask(depth)


def _table(rule: LabelRule) -> NDArray[np.uint8]:
    if rule.name == "vspw":
        return vspw_table()
    if rule.name == "cityscapes":
        return cityscapes_table()
    table = np.arange(256, dtype=np.uint8)
    if rule.name == "binary":  # masks are 0 and 1 or 0 and 255
        table[1:] = 1
    table[[value for value in rule.ignore if value < 256]] = IGNORE
    return table


def _depth(stored: NDArray[Any], rule: LabelRule) -> NDArray[np.float32]:
    if rule.name == "kitti":
        return depth_label(stored.astype(np.uint16))
    depth = stored.astype(np.float32) / np.float32(rule.steps_per_m or 1.0)
    depth[np.isin(stored, rule.ignore)] = NO_DEPTH
    return depth


class ClipLabels:
    """The label files of the clips of a uniform cache, indexed as its frame_index: by the frames'
    numbers in presentation order. Mapped, never resized; H and W need not be the video's."""

    def __init__(
        self, folder: Path | str, *, last_frames: Mapping[str, int], num_classes: int
    ) -> None:
        """last_frames: clip key -> the highest frame that will be read.

        Raises UsageError, naming the clip, for a key that leads out of the folder and for a file
        that is missing, of another layout, or of fewer frames.
        """
        folder = local_path(folder)
        if not folder.is_dir():
            raise UsageError(f"--labels {folder}: no such folder")
        self._num_classes = num_classes
        self._maps = {key: _map_labels(folder, key) for key in last_frames}
        for key, last in last_frames.items():
            if last >= len(self._maps[key]):
                raise UsageError(
                    f"clip {key}: its labels have {len(self._maps[key])} frames, the cache has its "
                    f"frame {last}: label every frame of the clip ({IGNORE} = ignore)"
                )

    def size(self, key: str) -> tuple[int, int]:
        """Height and width of a clip's labels."""
        _, height, width = self._maps[key].shape
        return height, width

    def frame(self, key: str, index: int) -> NDArray[np.uint8]:
        """The label of one frame, uint8 (H, W); UsageError for a class beyond `num_classes`."""
        label = np.array(self._maps[key][index])
        classes = label[label != IGNORE]
        if classes.size and classes.max() >= self._num_classes:
            raise UsageError(
                f"clip {key}: the label of frame {index} has class {classes.max()}: wanted 0 to "
                f"{self._num_classes - 1}, or {IGNORE} for ignore: set num_classes or give the "
                "head of these labels, or convert them"
            )
        return label


def _map_labels(folder: Path, key: str) -> NDArray[np.uint8]:
    path = folder / f"{key}.npy"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"clip {key}: its name leads out of the label folder {folder}")
    try:
        maps = map_npy(path)
    except FileNotFoundError:
        raise UsageError(
            f"clip {key}: no labels, {path} does not exist: write it, uint8 (frames, height, "
            f"width), {IGNORE} = ignore"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"clip {key}: {path} cannot be read as .npy ({error})") from error
    if maps.dtype != np.uint8 or maps.ndim != 3 or not maps.size:
        raise UsageError(
            f"clip {key}: {path} holds {maps.dtype} {maps.shape}, wanted uint8 (frames, height, "
            "width)"
        )
    return maps
