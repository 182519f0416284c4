"""Two patch caches of the same windows: the proof that they are, and which window is which.

Caches of the same videos, sampling and seed hold the same windows, but perhaps cut into other
shards and so in another order. Called by `cache_fidelity.py`.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..shards.cache import compare
from ..shards.errors import CacheMismatch
from ..shards.patches import PatchShards

COLUMNS = ("frame_index", "timestamps_s", "crop", "flipped")
"""What makes a window of a clip the same, as the columns of `PatchShards.table()`."""


def match_windows(
    patches: PatchShards, reference: PatchShards, *, names: tuple[str, str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Window numbers int64 (W,) of `patches` and, in the same order, of `reference`.

    names: what the two are called in messages. Raises CacheMismatch naming the field that differs,
    unless both hold the same windows of the same videos through the same backbone; `storage` may
    differ.
    """
    compare(_compared(patches), _compared(reference), what_got=names[0], what_wanted=names[1])
    ours, theirs = _windows(patches), _windows(reference)
    our_order = sorted(range(len(ours)), key=ours.__getitem__)
    their_order = sorted(range(len(theirs)), key=theirs.__getitem__)
    _check_clips(ours, theirs, names=names)
    for one, other in zip(our_order, their_order, strict=True):
        if ours[one] != theirs[other]:
            pairs = zip(("clip", *COLUMNS), ours[one], theirs[other], strict=True)
            field = next(name for name, mine, its in pairs if mine != its)
            raise CacheMismatch(
                f"{names[0]}: {field} of a window of clip {ours[one][0]!r} differs from "
                f"{names[1]}: both must be extracted from the same videos with the same seed"
            )
    return np.array(our_order, dtype=np.int64), np.array(their_order, dtype=np.int64)


def _compared(cache: PatchShards) -> dict[str, Any]:
    identity = {name: value for name, value in cache.info.identity.items() if name != "storage"}
    return identity | {"shape": asdict(cache.info.shape)}


def _windows(cache: PatchShards) -> list[tuple[Any, ...]]:
    """Of every window the clip's key and the bytes of each of COLUMNS."""
    table, keys = cache.table(), cache.keys
    columns = [[row.tobytes() for row in getattr(table, name)] for name in COLUMNS]
    clips = [keys[clip] for clip in table.clip.tolist()]
    return list(zip(clips, *columns, strict=True))


def _check_clips(
    ours: list[tuple[Any, ...]], theirs: list[tuple[Any, ...]], *, names: tuple[str, str]
) -> None:
    """Raises CacheMismatch unless both have the same clips, and as many windows."""
    our_clips, their_clips = {window[0] for window in ours}, {window[0] for window in theirs}
    if different := sorted(our_clips ^ their_clips):
        where = names[0] if different[0] in our_clips else names[1]
        raise CacheMismatch(
            f"keys: clip {different[0]!r} is in {where} only ({len(different)} such clips): both "
            "caches must hold the same clips; see quarantine.jsonl of the other one"
        )
    if len(ours) != len(theirs):
        raise CacheMismatch(
            f"{names[0]}: windows is {len(ours)}, but {len(theirs)} in {names[1]}: both must be "
            "extracted from the same videos with the same settings"
        )
