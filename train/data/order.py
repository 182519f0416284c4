"""Which windows a training step sees, and every random number of training.

    split_windows   clips -> training and validation windows, by a hash of the clip's key
    BatchOrder      step -> the windows of the global batch: one permutation an epoch, O(1) seek
    StreamOrder     the same for `residency: stream`: whole blocks in seeded order, mixed in groups
    RankSlice       the slice of every global batch that one rank computes

All are pure functions of the seed and of what is asked for. No generator lives from one step to the
next, so that a resumed run draws what the uninterrupted one would have, and a rank draws what a
single process would have drawn for the same samples. numpy's bit generators have a fixed stream;
its distributions do not, so only raw bits are used.

A disk gives its full rate only to long reads. So a block (windows that follow one another in a
file) is read whole, the blocks of an epoch come in a random order, as many as make a group are held
at once, and the windows of a group are permuted among themselves.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ...shards.errors import UsageError


def seed_for(*parts: int | str) -> int:
    """63 bits that depend on every part: the key of one draw."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(size: int, *parts: int | str) -> NDArray[np.int64]:
    """A permutation of 0..size-1, int64 (size,)."""
    keys = np.random.Philox(key=seed_for("permutation", *parts)).random_raw(size)
    return np.argsort(keys, kind="stable").astype(np.int64)


def uniforms(size: int, *parts: int | str) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64 (size,)."""
    raw = np.random.Philox(key=seed_for("uniforms", *parts)).random_raw(size)
    uniform: NDArray[np.float64] = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator on `device`; the same parts give the same numbers there."""
    return torch.Generator(device=device).manual_seed(seed_for("generator", *parts))


Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RankSlice:
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


class Split(NamedTuple):
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


@dataclass(frozen=True, eq=False)
class BatchOrder:
    """The windows of every step: each epoch a fresh permutation, its incomplete last batch dropped.

    windows int64 (W,) are what there is; per_batch of them make a global batch.
    """

    windows: Indices
    per_batch: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.windows) < self.per_batch:
            raise UsageError(
                f"{len(self.windows)} training windows (validation clips not counted), one batch "
                f"takes {self.per_batch}: set a smaller batch_size, or extract more clips or more "
                "windows a clip"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches that one permutation gives."""
        return len(self.windows) // self.per_batch

    def at(self, step: int) -> Indices:
        """Windows of the global batch of step number `step` (from 0), int64 (per_batch,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self, epoch)
        return self.windows[order[position * self.per_batch : (position + 1) * self.per_batch]]

    def draw(self, epoch: int) -> Indices:
        """A permutation of 0..W-1, int64 (W,)."""
        return permutation(len(self.windows), self.seed, "order", epoch)


@dataclass(frozen=True, eq=False)
class StreamOrder(BatchOrder):
    """Whole blocks in a random order, mixed in groups. windows: ascending."""

    block_starts: Indices = field(kw_only=True)
    """int64 (blocks + 1,): the first window of every block of the cache, and the end."""
    group_windows: int = field(kw_only=True)
    """Windows of a group, about: blocks are kept whole."""

    def draw(self, epoch: int) -> Indices:
        blocks = np.searchsorted(self.block_starts, self.windows, side="right") - 1
        _, block, counts = np.unique(blocks, return_inverse=True, return_counts=True)
        order = permutation(len(counts), self.seed, "blocks", epoch)
        group = np.empty(len(counts), dtype=np.int64)
        group[order] = (np.cumsum(counts[order]) - counts[order]) // self.group_windows
        mixed = permutation(len(self.windows), self.seed, "within groups", epoch)
        return np.lexsort((mixed, group[block])).astype(np.int64)


@functools.lru_cache(maxsize=4)  # the epochs at hand: drawing one takes a second for 10 M windows
def _epoch_order(order: BatchOrder, epoch: int) -> Indices:
    return order.draw(epoch)


def spread(windows: Indices, count: int) -> Indices:
    """At most `count` of `windows`, spread evenly over them."""
    if len(windows) <= count:
        return windows
    return windows[np.linspace(0, len(windows) - 1, count).astype(np.int64)]


def _unit_hash(key: str) -> float:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64
