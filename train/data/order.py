"""Which windows a training step sees: pure functions of (seed, epoch, step, rank).

    split_windows   clips -> training and validation windows, by a hash of the clip's key
    BatchOrder      step -> the windows of the global batch: one permutation an epoch, O(1) seek
    Share           the slice of every global batch that one rank computes

Used by data.py and head.py.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..shards.errors import UsageError
from .draws import permutation

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which slice of every global batch this process computes."""

    rank: int = 0
    num_ranks: int = 1

    def of(self, batch_size: int) -> slice:
        """Samples of a global batch for this rank; UsageError unless every rank gets as many."""
        if batch_size % self.num_ranks:
            raise UsageError(
                f"batch_size {batch_size} on {self.num_ranks} processes: wanted a multiple of "
                f"{self.num_ranks}, so that every process gets the same number of samples"
            )
        part = batch_size // self.num_ranks
        return slice(self.rank * part, (self.rank + 1) * part)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Windows of the cache for training and for validation, int64, each in ascending order."""

    training: Indices
    validation: Indices


def split_windows(
    keys: Sequence[str], clip_index: NDArray[np.integer[Any]], fraction: float
) -> Split:
    """Keep the clips whose key hashes below `fraction` for validation: at least one, never all.

    clip_index: (num_windows,) index into keys. A clip's side depends on its key alone, so it is
    the same in the tokenizer's and the world model's training, and when the cache grows. Where the
    hashes would keep no clip or all, the one with the lowest or the highest decides.
    """
    clip_index = np.asarray(clip_index, dtype=np.int64)
    clips = np.unique(clip_index)  # those with windows
    hashes = np.array([_unit_hash(key) for key in keys], dtype=np.float64)
    kept = hashes < fraction
    if fraction > 0 and len(clips) <= 1:
        kept[clips] = False
    elif fraction > 0 and not kept[clips].any():
        kept[clips[hashes[clips].argmin()]] = True
    elif fraction > 0 and kept[clips].all():
        kept[clips[hashes[clips].argmax()]] = False
    is_validation = kept[clip_index]
    return Split(training=np.flatnonzero(~is_validation), validation=np.flatnonzero(is_validation))


@dataclass(frozen=True)
class BatchOrder:
    """The windows of every step: each epoch a fresh permutation, its incomplete last batch dropped.

    windows int64 (W,) are what there is; per_batch of them make a global batch.
    """

    windows: Indices
    per_batch: int
    seed: int

    def __post_init__(self) -> None:
        check_enough(self.windows, self.per_batch)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that one permutation gives."""
        return len(self.windows) // self.per_batch

    def at(self, step: int) -> Indices:
        """Windows of the global batch of step number `step` (from 0), int64 (per_batch,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _epoch_order(len(self.windows), self.seed, epoch)
        return self.windows[order[position * self.per_batch : (position + 1) * self.per_batch]]


def check_enough(windows: Indices, per_batch: int) -> None:
    """UsageError where there are too few windows for one batch."""
    if len(windows) < per_batch:
        raise UsageError(
            f"{len(windows)} training windows (validation clips not counted), one batch "
            f"takes {per_batch}: set a smaller batch_size, or extract more clips or more "
            "windows a clip"
        )


def evenly(windows: Indices, count: int) -> Indices:
    """At most `count` of `windows`, spread evenly over them."""
    if len(windows) <= count:
        return windows
    return windows[np.linspace(0, len(windows) - 1, count).astype(np.int64)]


@functools.lru_cache(maxsize=4)  # the epochs at hand: drawing one takes a second for 10 M windows
def _epoch_order(size: int, seed: int, epoch: int) -> Indices:
    order = permutation(size, seed, "order", epoch)
    order.setflags(write=False)
    return order


def _unit_hash(key: str) -> float:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64
