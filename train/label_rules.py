"""Stored label values -> classes or metres, by the rules of the data sets. NumPy only.

Letters: H, W pixels. Checked by tests/parity (08_eval). Called by targets.py and evaluate/.
"""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..shards.crops import kb_region
from ..shards.errors import UsageError
from ..shards.plan_target import LabelRule

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
