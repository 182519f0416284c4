"""Known futures: everything that can come after the frames that were seen, with probabilities.

Any data set whose future is known (a simulator, a game) can supply them; the little world does.

    DIR/CLIP_KEY.npz     no pickle; F futures of one clip, those of one frame pair side by side
        context_frame    int32 (F,)        last frame seen, index in presentation order
        target_frame     int32 (F,)        the frame they are pictures of
        probability      float32 (F,)      of each future; those of one frame pair add up to 1
        classes          uint8 (F, H, W)   class map of the target frame, 255 = counts nowhere
        background       int32 ()          class that is not looked at, -1: none

Written by `write_futures`, read by `FutureFolder`; scored by `modes.py`.
"""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..shards.errors import UsageError
from ..shards.files import partial_path, publish

_DTYPES = {
    "context_frame": np.int32,
    "target_frame": np.int32,
    "probability": np.float32,
    "classes": np.uint8,
    "background": np.int32,
}
_NPZ_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    OverflowError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy and zipfile raise for damaged files; RuntimeError is that of encrypted members."""
_SUM_TOLERANCE = 1e-3
"""Probabilities are float32 and may have been written with few digits."""


@dataclass(frozen=True, kw_only=True)
class KnownFutures:
    """What can be at one target frame after one context."""

    probability: NDArray[np.float64]
    """(M,), adds up to 1."""
    classes: NDArray[np.uint8]
    """(M, H, W), 255 = counts nowhere."""
    background: int
    """Class that is not looked at, -1: none."""


def write_futures(
    folder: Path, key: str, futures: Mapping[tuple[int, int], KnownFutures], *, background: int
) -> None:
    """Write the futures of the clip `key`, by (last frame seen, target frame); same bytes for the
    same values."""
    path = folder / f"{key}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = [pair for pair, found in futures.items() for _ in found.probability]
    frames = np.array(pairs, np.int32).reshape(-1, 2)
    partial = partial_path(path)
    with partial.open("wb") as file:
        np.savez_compressed(
            file,
            context_frame=frames[:, 0],
            target_frame=frames[:, 1],
            probability=np.concatenate([f.probability for f in futures.values()], dtype=np.float32),
            classes=np.concatenate([f.classes for f in futures.values()]),
            background=np.array(background, np.int32),
        )
    publish(partial, path)


class FutureFolder:
    """Reads the futures of single windows; a clip's file is read when it is first asked for."""

    def __init__(self, folder: str) -> None:
        if not Path(folder).is_dir():
            raise UsageError(f"--futures {folder}: no such folder")
        self._folder = Path(folder)
        self._read: tuple[str, dict[str, NDArray[np.generic]]] = ("", {})

    def window(self, key: str, context_frame: int, target_frame: int) -> KnownFutures:
        """What can be at `target_frame` of clip `key` after `context_frame`, the last one seen.

        Raises:
            UsageError: no file, one of another layout, or no futures of these frames.
        """
        if self._read[0] != key:
            self._read = (key, _load(self._folder, key))
        arrays = self._read[1]
        pairs = np.stack([arrays["context_frame"], arrays["target_frame"]], axis=1)
        rows = (pairs == (context_frame, target_frame)).all(axis=1)
        if not rows.any():
            known = ", ".join(f"{a} -> {b}" for a, b in np.unique(pairs, axis=0).tolist())
            raise UsageError(
                f"clip {key}: no futures of frame {target_frame} after frame {context_frame}, only "
                f"{known or 'none'}; evaluate with the context and steps they were made for"
            )
        probability = np.asarray(arrays["probability"][rows], np.float64)
        is_one = abs(probability.sum() - 1) <= _SUM_TOLERANCE  # not of nan
        if not is_one or probability.min() < 0:
            raise UsageError(
                f"clip {key}: probabilities of the futures of frame {target_frame} after frame "
                f"{context_frame} add up to {probability.sum():.4g}, wanted 1 and none below 0"
            )
        return KnownFutures(
            probability=probability / probability.sum(),
            classes=np.asarray(arrays["classes"][rows], np.uint8),
            background=int(arrays["background"]),
        )


def _load(folder: Path, key: str) -> dict[str, NDArray[np.generic]]:
    path = folder / f"{key}.npz"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"clip {key}: its name leaves the folder of futures {folder}")
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in _DTYPES}
    except FileNotFoundError:
        raise UsageError(
            f"clip {key}: no futures, {path} does not exist; write it (see "
            "evaluate/known_futures.py) or leave --futures out"
        ) from None
    except KeyError as error:
        raise UsageError(f"clip {key}: {path} has no array {error}") from None
    except _NPZ_ERRORS as error:
        raise UsageError(f"clip {key}: {path} cannot be read as .npz ({error})") from None
    count = arrays["context_frame"].shape
    for name, array in arrays.items():
        dims = {"classes": 3, "background": 0}.get(name, 1)
        fits = array.dtype == _DTYPES[name] and array.ndim == dims
        if not fits or array.shape[:1] != count[:dims] or 0 in array.shape[1:]:
            raise UsageError(
                f"clip {key}: {name} of {path} is {array.dtype} {array.shape}; see "
                "evaluate/known_futures.py for what it has to be"
            )
    return arrays
