"""Label maps of clips, from a folder laid out as the patch cache's clip keys.

    DIR/CLIP_KEY.npy    uint8 (frames, H, W), class of each pixel, 255 = ignore

`frames` is indexed by the frame's index in presentation order, as in the cache. H and W need not
be the video's: a uniform window shows the whole frame, so predictions are stretched to (H, W).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...shards.errors import UsageError
from ...shards.evaluation.labels import IGNORE
from ...shards.npy import map_npy


class LabelFolder:
    """Reads single label frames; every clip's file is checked when the folder is opened."""

    def __init__(self, folder: Path, *, last_frames: Mapping[str, int], num_classes: int) -> None:
        """Open `folder` for the clips in `last_frames`: key -> highest frame that will be read.

        Raises:
            UsageError: no such folder; a clip without a file, with one of another layout, or with
                fewer frames.
        """
        if not folder.is_dir():
            raise UsageError(f"--labels {folder}: no such folder")
        self._num_classes = num_classes
        self._maps = {key: _open(folder, key) for key in last_frames}
        for key, last in last_frames.items():
            if last >= len(self._maps[key]):
                raise UsageError(
                    f"clip {key}: its labels have {len(self._maps[key])} frames, the cache has "
                    f"frame {last}; label every frame of the clip (255 = ignore)"
                )

    def frame(self, key: str, frame_index: int) -> NDArray[np.uint8]:
        """The label of one frame, uint8 (H, W).

        Raises:
            UsageError: a class the head does not know.
        """
        label = np.array(self._maps[key][frame_index])
        classes = label[label != IGNORE]
        if classes.size and int(classes.max()) >= self._num_classes:
            raise UsageError(
                f"clip {key}: the label of frame {frame_index} has class {int(classes.max())}, "
                f"the head knows 0 to {self._num_classes - 1} (255 = ignore); give the head of "
                "these labels"
            )
        return label


def _open(folder: Path, key: str) -> NDArray[np.uint8]:
    path = folder / f"{key}.npy"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"clip {key}: its name leaves the label folder {folder}")
    try:
        maps = map_npy(path)
    except FileNotFoundError:
        raise UsageError(
            f"clip {key}: no labels, {path} does not exist; write it (uint8 frames, H, W; "
            "255 = ignore) or leave --labels and --head out"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"clip {key}: {path} cannot be read as .npy ({error})") from None
    if maps.dtype != np.uint8 or maps.ndim != 3 or not maps.size:
        raise UsageError(
            f"clip {key}: {path} holds {maps.dtype} {maps.shape}, wanted uint8 (frames, H, W)"
        )
    return maps
