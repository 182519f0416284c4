"""The storage dtypes of patch tokens, and conversions from and to float32.

NumPy has no bfloat16: its upper 16 bits of a float32 are stored as uint16. int8 needs scales
beside it, see `int8`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("|i1"),
}
"""Logical dtype -> dtype of the stored array."""

FLOAT16_MAX = 65504.0
BFLOAT16_MAX = float.fromhex("0x1.fep127")


def to_bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 -> the bits of the nearest bfloat16, ties to even; any shape. NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(
        16
    )
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def to_stored(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """float32 or float16 values -> as stored in float16 or bfloat16; float16 must be in range
    already. What is stored so already, bits included, stays as it is."""
    if values.dtype == STORED_DTYPES[dtype]:
        return values
    if dtype == "bfloat16":
        return to_bfloat16_bits(values.astype(np.float32, copy=False))
    return values.astype(STORED_DTYPES[dtype], copy=False)


def from_stored(
    stored: NDArray[Any], dtype: str, *, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Stored float16 or bfloat16 tokens -> float32, exactly; into `out`, of the same shape, where
    given."""
    values = np.empty(stored.shape, dtype=np.float32) if out is None else out
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        np.copyto(bits, stored)
        bits <<= np.uint32(16)
    else:
        np.copyto(values, stored)
    return values
