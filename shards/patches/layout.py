"""What is in a patch-token shard: names, dtypes, axes and units of its arrays.

    NNNNNN.zarr.zip             Zarr v3 group in an uncompressed zip, members in this order
      zarr.json                 attributes: keys, logical_dtype, licence, ...
      tokens/zarr.json          metadata: shape (W, T, N, D), inner chunks (1, 1, N, D)
      timestamps_s/, frame_index/, crop/, flipped/, clip/
                                zarr.json, and one chunk each: the numbers + crc32c
      channel_scale/            int8 only: (D,), zarr.json and one chunk
      token_scale/              int8 only, laid out as the tokens: (W, T, N), inner chunks (1, 1, N)
      tokens/c/0/0/0/0          the one Zarr shard: W * T chunks, each N * D numbers + crc32c,
                                then the index: W * T pairs (offset, bytes) of uint64 + crc32c

And the storage dtypes of tokens, with conversions from and to float32. NumPy has no bfloat16: its
upper 16 bits of a float32 are stored as uint16. int8 needs scales beside it, see `int8`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUFFIX = ".zarr.zip"
"""Of the file of a patch-token shard."""

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


@dataclass(frozen=True)
class ArraySpec:
    """One of the small arrays beside the tokens."""

    dtype: np.dtype[Any]
    axes: tuple[str, ...]
    attributes: dict[str, Any]


TOKEN_AXES = ("window", "frame", "patch", "channel")

CHANNEL_SCALE_SPEC = ArraySpec(
    np.dtype("<f4"),
    ("channel",),
    {"unit": "1", "description": "value = tokens * token_scale * channel_scale; all shards' alike"},
)

TOKEN_SCALE_SPEC = ArraySpec(
    np.dtype("<f2"),
    ("window", "frame", "patch"),
    {"unit": "1", "description": "value = tokens * token_scale * channel_scale"},
)

TOKEN_ATTRIBUTES = {
    "description": "patch tokens after the backbone's final norm, without class and register "
    "tokens, row by row from the top left",
    "unit": "1",
}

WINDOW_ARRAYS: dict[str, ArraySpec] = {
    "timestamps_s": ArraySpec(
        np.dtype("<f4"),
        ("window", "frame"),
        {"unit": "s", "description": "presentation time since the clip's first shown frame"},
    ),
    "frame_index": ArraySpec(
        np.dtype("<i4"),
        ("window", "frame"),
        {"unit": "1", "description": "index of the frame in presentation order"},
    ),
    "crop": ArraySpec(
        np.dtype("<f4"),
        ("window", "edge"),
        {"unit": "px", "description": "top, left, height, width in source pixels"},
    ),
    "flipped": ArraySpec(
        np.dtype("bool"),
        ("window",),
        {"unit": "1", "description": "whether the crop was mirrored left to right"},
    ),
    "clip": ArraySpec(
        np.dtype("<i4"),
        ("window",),
        {"unit": "1", "description": "index into the attribute `keys` of the group"},
    ),
}

NUM_CROP_EDGES = 4


def only_chunk(name: str, num_axes: int) -> str:
    """The member that is the one chunk, or the one Zarr shard, of an array."""
    return "/".join((name, "c", *("0" for _ in range(num_axes))))


TOKENS_CHUNK = only_chunk("tokens", len(TOKEN_AXES))
TOKEN_SCALE_CHUNK = only_chunk("token_scale", len(TOKEN_SCALE_SPEC.axes))


def member_names(dtype: str) -> list[str]:
    """The members of a shard of this logical dtype, in their order."""
    whole = {name: len(spec.axes) for name, spec in WINDOW_ARRAYS.items()}
    sharded = {}
    if dtype == "int8":
        whole["channel_scale"] = len(CHANNEL_SCALE_SPEC.axes)
        sharded["token_scale"] = len(TOKEN_SCALE_SPEC.axes)
    sharded["tokens"] = len(TOKEN_AXES)
    return [
        "zarr.json",
        *(f"{name}/zarr.json" for name in reversed(sharded)),
        *(
            member
            for name, num_axes in whole.items()
            for member in (f"{name}/zarr.json", only_chunk(name, num_axes))
        ),
        *(only_chunk(name, num_axes) for name, num_axes in sharded.items()),
    ]


def array_shapes(num_windows: int, num_frames: int) -> dict[str, tuple[int, ...]]:
    """The shape of every array of `WINDOW_ARRAYS`."""
    sizes = {"window": num_windows, "frame": num_frames, "edge": NUM_CROP_EDGES}
    return {name: tuple(sizes[axis] for axis in spec.axes) for name, spec in WINDOW_ARRAYS.items()}
