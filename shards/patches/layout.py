"""What is in a patch-token shard: names, dtypes, axes and units of its arrays.

    NNNNNN.zarr/                Zarr v3 group; attributes: keys, logical_dtype, licence, ...
      zarr.json
      tokens/zarr.json          metadata: shape (W, T, N, D), inner chunks (1, 1, N, D)
      tokens/c/0/0/0/0          the one Zarr shard: W * T chunks, each N * D numbers + crc32c,
                                then the index: W * T pairs (offset, bytes) of uint64 + crc32c
      token_scale/              int8 only, laid out as the tokens: (W, T, N), inner chunks (1, 1, N)
      channel_scale/            int8 only: (D,), one chunk
      timestamps_s/, frame_index/, crop/, flipped/, clip/
                                one chunk each: the numbers + crc32c

Shared by the writer (`patch_writer`) and the reader (`zarr_map`, `patches`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


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


def only_chunk(num_axes: int) -> tuple[str, ...]:
    """Path of the one chunk, or the one Zarr shard, below an array."""
    return ("c", *("0" for _ in range(num_axes)))


def array_shapes(num_windows: int, num_frames: int) -> dict[str, tuple[int, ...]]:
    """The shape of every array of `WINDOW_ARRAYS`."""
    sizes = {"window": num_windows, "frame": num_frames, "edge": NUM_CROP_EDGES}
    return {name: tuple(sizes[axis] for axis in spec.axes) for name, spec in WINDOW_ARRAYS.items()}
