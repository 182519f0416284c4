"""The blocks of windows in a delta-token tar: which members belong together, and their contents.

BBBBBB.timestamps.npy   float32 (n, T)
BBBBBB.tokens.npy       float16 (n, T, D)
BBBBBB.windows.json     a list of n objects: clip, frames, crop, flipped
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checked import Fields, is_number, shown
from .errors import DamagedShard
from .npy import MAX_PREFIX_BYTES, NpyHeader, parse_npy, read_npy
from .opening import ADVICE
from .strict_json import MAX_JSON_BYTES, parse_json
from .tar_map import MEMBER_NAME, TarMember, read_members

_PARTS = ("timestamps.npy", "tokens.npy", "windows.json")
MAX_INT32 = 2**31 - 1
"""The largest frame index, and beyond any edge of a crop."""
_FLOAT16 = np.dtype("<f2")
_FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One sample of a delta-token tar."""

    num_windows: int
    tokens_offset: int
    """Byte of the tar at which the first window's tokens start; the others follow."""
    tokens: TarMember
    timestamps: TarMember
    windows: TarMember


def read_blocks(path: Path, *, num_frames: int, hidden_size: int) -> list[Block]:
    """The blocks of a tar in order; DamagedShard unless all are whole and of these sizes."""
    samples: dict[int, dict[str, TarMember]] = {}
    for member in read_members(path):
        match = MEMBER_NAME.fullmatch(member.name)
        if match is None:
            raise AssertionError("read_members lets no other name pass")
        samples.setdefault(int(match[1]), {})[match[2]] = member
    if list(samples) != list(range(len(samples))):
        raise DamagedShard(f"{path}: its blocks are not numbered from 0 on in order: {ADVICE}")
    blocks = []
    for number, parts in samples.items():
        where = f"{path}: block {number:06d}"
        if tuple(sorted(parts)) != _PARTS:
            raise DamagedShard(f"{where}: has {sorted(parts)}, wanted {list(_PARTS)}: {ADVICE}")
        tokens = _header(path, parts["tokens.npy"], dtype=_FLOAT16, num_axes=3)
        timestamps = _header(path, parts["timestamps.npy"], dtype=_FLOAT32, num_axes=2)
        num_windows = tokens.shape[0]
        if (
            num_windows == 0
            or tokens.shape[1:] != (num_frames, hidden_size)
            or timestamps.shape != (num_windows, num_frames)
        ):
            raise DamagedShard(
                f"{where}: tokens {tokens.shape} and timestamps {timestamps.shape}, wanted "
                f"(n, {num_frames}, {hidden_size}) and (n, {num_frames}) as in cache.json: "
                f"{ADVICE}"
            )
        blocks.append(
            Block(
                num_windows=num_windows,
                tokens_offset=parts["tokens.npy"].offset + tokens.start,
                tokens=parts["tokens.npy"],
                timestamps=parts["timestamps.npy"],
                windows=parts["windows.json"],
            )
        )
    return blocks


def read_tokens(path: Path, block: Block) -> NDArray[np.float16]:
    """float16 (n, T, D), read and not mapped."""
    data = _read(path, block.tokens, limit=block.tokens.size)
    return read_npy(data, dtype=_FLOAT16, num_axes=3, where=f"{path}: {block.tokens.name}")


def read_timestamps(path: Path, block: Block) -> NDArray[np.float32]:
    """float32 (n, T), seconds from the window's first frame."""
    data = _read(path, block.timestamps, limit=block.timestamps.size)
    return read_npy(data, dtype=_FLOAT32, num_axes=2, where=f"{path}: {block.timestamps.name}")


def read_windows(path: Path, block: Block, *, num_frames: int) -> list[dict[str, Any]]:
    """Per window: clip (str), frames (list of T int), crop (list of 4 numbers), flipped (bool).

    Raises DamagedShard if the member says anything else.
    """
    where = f"{path}: {block.windows.name}"
    if block.windows.size > MAX_JSON_BYTES:
        raise DamagedShard(f"{where}: {block.windows.size} bytes of JSON: {ADVICE}")
    value = parse_json(_read(path, block.windows, limit=block.windows.size), where=where)
    if not isinstance(value, list) or len(value) != block.num_windows:
        raise DamagedShard(f"{where}: wanted a list of {block.num_windows} windows: {ADVICE}")
    windows = []
    for item in value:
        fields = Fields(item, where=where)
        frames, crop = fields.integers("frames", high=MAX_INT32), fields.sequence("crop")
        if len(frames) != num_frames or len(crop) != 4 or not all(map(_is_edge, crop)):
            raise DamagedShard(
                f"{where}: frames {shown(frames)} and crop {shown(crop)}, wanted {num_frames} "
                f"indices and 4 numbers: {ADVICE}"
            )
        windows.append(
            {
                "clip": fields.text("clip"),
                "frames": list(frames),
                "crop": crop,
                "flipped": fields.boolean("flipped"),
            }
        )
    return windows


def _is_edge(value: object) -> bool:
    return is_number(value) and abs(float(value)) <= MAX_INT32  # type: ignore[arg-type]


def _header(path: Path, member: TarMember, *, dtype: np.dtype[Any], num_axes: int) -> NpyHeader:
    return parse_npy(
        _read(path, member, limit=MAX_PREFIX_BYTES),
        size=member.size,
        dtype=dtype,
        num_axes=num_axes,
        where=f"{path}: {member.name}",
    )


def _read(path: Path, member: TarMember, *, limit: int) -> bytes:
    """The first `limit` bytes of a member."""
    wanted = min(limit, member.size)
    try:
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), wanted, member.offset)
    except OSError as error:
        raise DamagedShard(f"{path}: cannot be read ({error.strerror}): {ADVICE}") from error
    if len(data) != wanted:
        raise DamagedShard(f"{path}: {member.name} is cut off: {ADVICE}")
    return data
