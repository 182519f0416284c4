"""Checks of what is in a shard: every frame, every value. For `verify_cache`."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache import BLACK, CacheInfo
from .errors import DamagedShard
from .int8 import UNSTORABLE, read_channel_scale
from .opening import ADVICE
from .patch_table import check_attributes, logical_dtype, read_black, read_shard_table
from .records import DoneRecord, shard_path
from .tar_blocks import Block, read_blocks, read_timestamps, read_tokens, read_windows
from .token_reader import TokenReader


def check_patches(folder: Path, info: CacheInfo, record: DoneRecord) -> None:
    """Reads every frame of a patch-token shard; raises at the first fault."""
    group = shard_path(folder, record.shard, ".zarr")
    check_attributes(group, record, info)
    table = read_shard_table(group, record, info.shape.num_frames)
    for name in ("timestamps_s", "crop"):
        _check_finite(table[name], f"{group}: {name}")
    tokens = TokenReader(group, info, rows=record.rows)
    files, stored = tokens.open(), tokens.new_frame()
    values = np.empty(stored.shape, dtype=np.float32)
    for window in range(record.rows):
        for index in range(info.shape.num_frames):
            tokens.read_values(files, window, index, out=values, stored=stored)
            usable = np.isfinite(values).all()
            if stored.dtype == np.int8:
                usable = usable and stored.min() != UNSTORABLE
            if not usable:
                raise DamagedShard(
                    f"{tokens.path}: window {window}, frame {index} has values that are not "
                    f"finite: {ADVICE}"
                )


def check_deltas(folder: Path, info: CacheInfo, record: DoneRecord) -> None:
    """Reads every block of a delta-token shard; DamagedShard at the first fault."""
    path = shard_path(folder, record.shard, ".tar")
    shape = info.shape
    blocks = read_blocks(path, num_frames=shape.num_frames, hidden_size=shape.hidden_size)
    rows = sum(block.num_windows for block in blocks)
    if rows != record.rows:
        raise DamagedShard(f"{path}: {rows} windows, the done-record says {record.rows}: {ADVICE}")
    for block in blocks:
        _check_block(path, block, info, record)


def check_black(folder: Path, info: CacheInfo) -> None:
    """Reads black.npy."""
    shape = info.shape
    black = read_black(folder / BLACK, info, (shape.num_tokens or 0, shape.hidden_size))
    _check_finite(black, f"{folder / BLACK}")


def check_scales(folder: Path, info: CacheInfo) -> None:
    """Reads channel_scale.npy, where the cache must have one."""
    if logical_dtype(info) == "int8":
        read_channel_scale(folder, info)


def _check_block(path: Path, block: Block, info: CacheInfo, record: DoneRecord) -> None:
    shape = info.shape
    where = f"{path}: {block.tokens.name}"
    _check_finite(read_tokens(path, block), where)
    _check_finite(read_timestamps(path, block), f"{path}: {block.timestamps.name}")
    keys = set(record.keys)
    for window in read_windows(path, block, num_frames=shape.num_frames):
        if window["clip"] not in keys:
            raise DamagedShard(
                f"{path}: {block.windows.name}: clip {window['clip']!r} is not in the "
                f"done-record: {ADVICE}"
            )


def _check_finite(values: NDArray[Any], where: str) -> None:
    if not np.isfinite(values).all():
        raise DamagedShard(f"{where}: has values that are not finite: {ADVICE}")
