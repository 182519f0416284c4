"""Writes one delta-token shard: a plain WebDataset tar whose samples are blocks of windows.

Same rows, same bytes: fixed owner, mode and time.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..cache import DELTAS, read_cache_info
from ..errors import CacheMismatch, DeltatokError
from ..files import partial_path, remove
from ..npy import npy_bytes
from ..plan import window_order
from ..records import DoneRecord, commit_shard, shard_path
from ..windows import ShardRows

BLOCK_WINDOWS = 256
"""Windows a sample: streaming gains 10x over one window a sample (74-103 k against 2-8 k
windows/s, 2 cores), and a block of 8 x 768 float16 is 3 MB."""


def write_delta_shard(
    folder: Path | str,
    shard: int,
    rows: ShardRows,
    *,
    block_windows: int = BLOCK_WINDOWS,
    seed: int | None = None,
) -> DoneRecord:
    """Writes shards/NNNNNN.tar and its done-record into the cache `folder`; gives the record.

    rows: times from the windows' first frames. They are stored as given, or, with a `seed`, in
    `window_order(W, seed=seed, shard=shard)`: rows straight from videos need it, rows from a patch
    shard have it already.
    Whatever an earlier run left of this shard is replaced. Without windows only the done-record
    is written. Raises DeltatokError, naming the clip, for tokens that are not finite;
    CacheMismatch for rows of another shape than the cache's.
    """
    folder = Path(folder)
    info = read_cache_info(folder, format=DELTAS)
    where = f"{folder}: shard {shard:06d}"
    num_windows, num_frames = len(rows.tokens), info.shape.num_frames
    wanted = (num_windows, num_frames, info.shape.hidden_size)
    if rows.tokens.shape != wanted or rows.tokens.dtype != np.float16:
        raise CacheMismatch(
            f"{where}: tokens is {rows.tokens.dtype} {rows.tokens.shape}, wanted float16 {wanted} "
            "as in cache.json: use the tokenizer the cache was made with"
        )
    rows.check_columns(num_windows=num_windows, num_frames=num_frames, where=where)
    _check_finite(rows, where=where)
    order = np.arange(num_windows)
    if seed is not None:
        order = window_order(num_windows, seed=seed, shard=shard)
    partial = partial_path(shard_path(folder, shard, ".tar"))
    try:
        if num_windows:
            _write_tar(partial, rows, order, block_windows=block_windows)
    except BaseException:
        remove(partial)
        raise
    record = rows.record(shard, abs_max=float(np.abs(rows.tokens).max(initial=0)))
    return commit_shard(folder, record, partial=partial, suffix=".tar")


def _check_finite(rows: ShardRows, *, where: str) -> None:
    finite = np.isfinite(rows.tokens)
    if not finite.all():
        window = int(np.flatnonzero(~finite.all(axis=(1, 2)))[0])
        raise DeltatokError(
            f"{where}: {np.count_nonzero(~finite)} of {finite.size} delta token values are not "
            f"finite in float16, first in clip {rows.keys[rows.clip[window]]!r}: run the "
            "tokenizer in float32, or check its weights"
        )


def _write_tar(path: Path, rows: ShardRows, order: NDArray[np.intp], *, block_windows: int) -> None:
    # Imported here: webdataset imports torch.
    from webdataset import TarWriter

    with (
        path.open("xb") as file,
        TarWriter(file, user="", group="", mode=0o644, encoder=False, mtime=0) as tar,
    ):
        for block, start in enumerate(range(0, len(order), block_windows)):
            chosen = order[start : start + block_windows]
            described = [rows.describe(window) for window in chosen]
            tar.write(
                {
                    "__key__": f"{block:06d}",
                    "tokens.npy": npy_bytes(rows.tokens[chosen].astype("<f2", copy=False)),
                    "timestamps.npy": npy_bytes(rows.timestamps_s[chosen].astype("<f4")),
                    "windows.json": json.dumps(
                        described, allow_nan=False, separators=(",", ":")
                    ).encode(),
                }
            )
