"""The rows of one shard of an export, gathered from the caches its clips are in. For `export`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..patches.layout import STORED_DTYPES
from ..patches.reader import PatchShards
from .export_plan import Reader

Pick = tuple[Reader, NDArray[np.int64]]
"""The windows of one clip, by their numbers in its cache."""


def in_order_of_content(reader: Reader, windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """`windows` by their frames, then crop, then flip: an order that does not depend on the cache
    they are in, so that neither do the bytes of an export."""
    table = reader.table()
    columns = [table.flipped[windows], *table.crop[windows].T[::-1]]
    columns += list(table.frame_index[windows].T[::-1])
    return windows[np.lexsort(columns)]


def gather_columns(picks: Sequence[Pick], *, like: Reader, kept: bool) -> dict[str, Any]:
    """The arrays of PatchRows or DeltaRows: the windows of each clip in turn; `clip` numbers the
    picks.

    like: any of the readers, for the shapes where there are no picks. kept: the tokens as they are
    stored, with token_scale for int8; else float16 or float32 values.
    """
    ends = np.cumsum([0, *(len(windows) for _, windows in picks)])
    tokens = np.empty((ends[-1], *like.shape), dtype=_row_dtype(like, kept=kept))
    columns: dict[str, Any] = {
        "tokens": tokens,
        "clip": np.repeat(np.arange(len(picks), dtype=np.int32), np.diff(ends)),
    }
    for name in ("timestamps_s", "frame_index", "crop", "flipped"):
        parts = [getattr(reader.table(), name)[windows] for reader, windows in picks]
        columns[name] = np.concatenate([getattr(like.table(), name)[:0], *parts])
    if tokens.dtype == np.int8:
        columns["token_scale"] = np.empty(tokens.shape[:3], dtype=np.float16)
    for (reader, windows), begin, end in zip(picks, ends[:-1], ends[1:], strict=True):
        if isinstance(reader, PatchShards) and tokens.dtype != np.float32:
            reader.stored_tokens(windows, out=tokens[begin:end])
        else:
            reader.tokens(windows, out=tokens[begin:end])
        if isinstance(reader, PatchShards) and tokens.dtype == np.int8:
            columns["token_scale"][begin:end] = reader.token_scale(windows)
    return columns


def _row_dtype(reader: Reader, *, kept: bool) -> np.dtype[Any]:
    if not isinstance(reader, PatchShards):
        return np.dtype("<f2")
    as_stored = kept or reader.dtype == "float16"
    return STORED_DTYPES[reader.dtype] if as_stored else np.dtype(np.float32)
