"""Checks of what is in a shard: every frame, every value. For `verify_cache(deep=True)`."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cache import BLACK, PATCHES, CacheInfo
from .errors import DamagedShard
from .file_checks import ADVICE
from .int8 import UNSTORABLE, read_channel_scale
from .patch_table import check_attributes, logical_dtype, read_black, read_shard_table
from .records import DoneRecord, shard_path
from .stored_statistics import StoredStatistics
from .tar_blocks import Block, read_blocks, read_timestamps, read_tokens, read_windows
from .token_reader import TokenReader
from .zarr_map import read_attributes


def check_patches(folder: Path, info: CacheInfo, record: DoneRecord) -> None:
    """Reads every frame of a patch-token shard; raises at the first fault."""
    group = shard_path(folder, record.shard, ".zarr")
    check_attributes(group, record, info)
    _check_described(group, info, record)
    table = read_shard_table(group, record, info.shape.num_frames)
    check_windows(table["timestamps_s"], table["frame_index"], table["crop"], where=str(group))
    tokens = TokenReader(group, info, rows=record.rows)
    files, stored = tokens.open(), tokens.new_frames(1)
    values = np.empty(stored.shape, dtype=np.float32)
    statistics = StoredStatistics(info.shape.hidden_size)
    for window in range(record.rows):
        for index in range(info.shape.num_frames):
            tokens.read_values(files, window, [index], out=values, stored=stored)
            usable = np.isfinite(values).all()
            if stored.dtype == np.int8:
                usable = usable and stored.min() != UNSTORABLE
            if not usable:
                raise DamagedShard(
                    f"{tokens.path}: window {window}, frame {index} has values that are not "
                    f"finite: {ADVICE}"
                )
            statistics.add(values[0])
    statistics.check(record.statistics, where=str(shard_path(folder, record.shard, ".json")))


def check_deltas(folder: Path, info: CacheInfo, record: DoneRecord) -> None:
    """Reads every block of a delta-token shard; DamagedShard at the first fault."""
    path = shard_path(folder, record.shard, ".tar")
    shape = info.shape
    blocks = read_blocks(path, num_frames=shape.num_frames, hidden_size=shape.hidden_size)
    rows = sum(block.num_windows for block in blocks)
    if rows != record.rows:
        raise DamagedShard(f"{path}: {rows} windows, the done-record says {record.rows}: {ADVICE}")
    statistics = StoredStatistics(shape.hidden_size)
    for block in blocks:
        _check_block(path, block, info, record)
        statistics.add(read_tokens(path, block))
    statistics.check(record.statistics, where=str(shard_path(folder, record.shard, ".json")))


def check_black(folder: Path, info: CacheInfo) -> None:
    """Reads black.npy."""
    shape = info.shape
    black = read_black(folder / BLACK, info, (shape.num_tokens or 0, shape.hidden_size))
    _check_finite(black, f"{folder / BLACK}")


def check_scales(folder: Path, info: CacheInfo) -> None:
    """Reads channel_scale.npy, where the cache must have one."""
    if logical_dtype(info) == "int8":
        read_channel_scale(folder, info)


def check_windows(
    timestamps_s: NDArray[np.float32], frame_index: ArrayLike, crop: ArrayLike, *, where: str
) -> None:
    """Raises DamagedShard unless times (W, T) and frames (W, T) are 0 or more and never decrease
    within a window (a slow clip repeats frames), and crops (W, 4) are areas of a frame."""
    frames, crops = np.asarray(frame_index), np.asarray(crop, dtype=np.float64)
    _check_finite(timestamps_s, f"{where}: timestamps_s")
    _check_finite(crops, f"{where}: crop")
    for name, values in (("timestamps_s", timestamps_s), ("frame_index", frames)):
        for wrong, what in (
            ((values < 0).any(axis=1), "is negative"),
            ((np.diff(values, axis=1) < 0).any(axis=1), "decreases"),
        ):
            if wrong.any():
                window = int(np.flatnonzero(wrong)[0])
                raise DamagedShard(f"{where}: window {window}: {name} {what}: {ADVICE}")
    wrong = (crops[:, :2] < 0).any(axis=1) | (crops[:, 2:] <= 0).any(axis=1)
    if wrong.any():
        window = int(np.flatnonzero(wrong)[0])
        raise DamagedShard(
            f"{where}: window {window}: crop {crops[window].tolist()}, wanted top and left of 0 or "
            f"more, height and width above 0: {ADVICE}"
        )


def _check_described(group: Path, info: CacheInfo, record: DoneRecord) -> None:
    """What the shard says of itself and no reader needs."""
    attributes = read_attributes(group)
    wanted = {
        "format": PATCHES,
        "format_version": info.format_version,
        "licence": info.licence,
        "shard": record.shard,
        "grid": list(info.shape.grid or ()),
        "logical_dtype": logical_dtype(info),
    }
    for name, value in wanted.items():
        if attributes.get(name) != value:
            raise DamagedShard(
                f"{group}: its attribute {name} is {attributes.get(name)!r}, wanted {value!r}: "
                f"{ADVICE}"
            )


def _check_block(path: Path, block: Block, info: CacheInfo, record: DoneRecord) -> None:
    shape = info.shape
    where = f"{path}: {block.tokens.name}"
    _check_finite(read_tokens(path, block), where)
    windows = read_windows(path, block, num_frames=shape.num_frames)
    timestamps_s = read_timestamps(path, block)
    where = f"{path}: {block.windows.name}"
    check_windows(
        timestamps_s,
        [window["frames"] for window in windows],
        [window["crop"] for window in windows],
        where=where,
    )
    if (timestamps_s[:, 0] != 0).any():
        raise DamagedShard(f"{path}: {block.timestamps.name}: a window does not begin at 0 s")
    keys = set(record.keys)
    for window in windows:
        if window["clip"] not in keys:
            raise DamagedShard(
                f"{where}: clip {window['clip']!r} is not in the done-record: {ADVICE}"
            )


def _check_finite(values: NDArray[Any], where: str) -> None:
    if not np.isfinite(values).all():
        raise DamagedShard(f"{where}: has values that are not finite: {ADVICE}")
