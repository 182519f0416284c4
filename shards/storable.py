"""Values that a storage dtype cannot hold: found while a shard is encoded, counted, refused.

Tokens come as computed (float32, float16) or as already converted on the device: bfloat16 bits in
uint16, int8 codes. T frames, N patches, D channels.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .dtypes import BFLOAT16_MAX, FLOAT16_MAX
from .errors import DeltatokError
from .int8 import MAX_NORMALISED, UNSTORABLE

_LIMITS = {"float16": FLOAT16_MAX, "bfloat16": BFLOAT16_MAX}
_BFLOAT16_EXPONENT = np.uint16(0x7F80)
_ADVICE = {
    "float16": "run the backbone in float32, or store bfloat16",
    "bfloat16": "run the backbone in float32",
    "int8": "run the backbone in float32, or store bfloat16",
}


def is_storable(window: NDArray[Any], *, dtype: str) -> bool:
    """Whether `dtype` holds every value of `window` (T, N, D); int8: of its codes."""
    if window.dtype == np.uint16:
        return not ((window & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any()
    if window.dtype == np.int8:
        return bool(window.min() != UNSTORABLE)
    # A NaN makes a comparison false. As Python's floats: no limit is rounded to float16.
    return -_LIMITS[dtype] <= float(window.min()) and float(window.max()) <= _LIMITS[dtype]


def count(
    window: NDArray[Any], dtype: str, channel_scale: NDArray[np.float32] | None
) -> tuple[int, int]:
    """How many values are not finite, and how many beyond the range of `dtype`.

    What the device converted tells only part: float16 infinity is a value beyond its range (those
    that were infinite before are NaN), an infinity in bfloat16 bits is not finite, and a code
    UNSTORABLE is counted as beyond the range.
    """
    if window.dtype == np.uint16:
        bad = (window & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT
        return int(np.count_nonzero(bad)), 0
    if window.dtype == np.int8:
        return 0, int(np.count_nonzero(window == UNSTORABLE))
    if window.dtype == np.float16 and dtype == "float16":
        return int(np.count_nonzero(np.isnan(window))), int(np.count_nonzero(np.isinf(window)))
    finite = np.isfinite(window)
    with np.errstate(invalid="ignore", over="ignore"):
        if channel_scale is None:
            large = finite & (np.abs(window) > _LIMITS[dtype])
        else:
            large = finite & (np.abs(window / channel_scale) > MAX_NORMALISED)
    return window.size - int(np.count_nonzero(finite)), int(np.count_nonzero(large))


def refuse(
    tokens: NDArray[Any],
    *,
    dtype: str,
    clips: Sequence[str],
    channel_scale: NDArray[np.float32] | None = None,
) -> NoReturn:
    """Raises DeltatokError with the counts of a whole shard (W, T, N, D), and the first clip.

    `clips`: the clip of every window. Called when a window was found that is not storable.
    """
    counts = [count(window, dtype, channel_scale) for window in tokens]
    touched = sorted({clip for clip, bad in zip(clips, counts, strict=True) if any(bad)})
    if not touched:
        raise DeltatokError("token scales of int8 codes that are not finite: quantise them again")
    num_not_finite, num_large = (sum(column) for column in zip(*counts, strict=True))
    others = f" and {len(touched) - 1} more" if len(touched) > 1 else ""
    range_of = f" (+-{_LIMITS[dtype]:g})" if dtype in _LIMITS else " with the scales of this cache"
    raise DeltatokError(
        f"clip {touched[0]!r}{others}: {num_not_finite} of the shard's {tokens.size} token values "
        f"are not finite and {num_large} beyond the range of {dtype}{range_of}: {_ADVICE[dtype]}"
    )
