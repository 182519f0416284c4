"""Which windows a training step sees, and every random number of training.

    split_windows   clips -> training and validation windows, by a hash of the clip's key
    shuffled        position -> its place in a permutation, computed: there is no table
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
import math
from collections.abc import Iterator, Sequence
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


def uniforms(size: int, *parts: int | str) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64 (size,)."""
    return next(uniform_rows(size, *parts))


def uniform_rows(size: int, *parts: int | str) -> Iterator[NDArray[np.float64]]:
    """The same, `size` of them after the other."""
    bits = np.random.Philox(key=seed_for("uniforms", *parts))
    while True:
        yield (bits.random_raw(size) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator on `device`; the same parts give the same numbers there."""
    return torch.Generator(device=device).manual_seed(seed_for("generator", *parts))


Indices = NDArray[np.int64]


def shuffled(positions: Indices, size: int, *parts: int | str) -> Indices:
    """What stands at `positions` (n,) of a permutation of 0..size-1, int64 (n,), size up to 2**40.

    The permutation is a function of `parts`; it is computed for the positions alone, so 100 M
    windows take no longer to seek in than a hundred. It is the generalized Feistel cipher of Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002): a number is a pair of digits
    of bases a and b, ab >= size, and a round adds a random function of one digit to the other. What
    comes out at `size` or above goes in again (their cycle walking); a and b are chosen so that
    this is rare.

    The random function multiplies by an odd key, adds a key, mixes, and keeps the high half.
    Over 400,000 keys the orders of 3 to 9 items come out as often as with a random table in its
    place, whatever the rounds, so the rounds alone decide: the joint places of five items are
    uniform (chi-squared) with 24, which Mitchell et al., "Bandwidth-Optimal Random Shuffling for
    GPUs" (2021), use too; from 64 items on no test of neighbours found anything with 12. FF1 (NIST
    SP 800-38G) has 10, for a million items or more.
    """
    left_size, right_size, keys = _rounds(size, *parts)
    numbers = _one_pass(positions.astype(np.uint64), left_size, right_size, keys)
    outside = np.flatnonzero(numbers >= np.uint64(size))
    while len(outside):
        numbers[outside] = _one_pass(numbers[outside], left_size, right_size, keys)
        outside = outside[numbers[outside] >= np.uint64(size)]
    return numbers.astype(np.int64)


HIGH = np.uint64(32)
MIX = np.uint64(0x94D049BB133111EB)
"""The second multiplier of SplitMix64 (Steele et al., OOPSLA 2014)."""


@functools.lru_cache(maxsize=16)
def _rounds(size: int, *parts: int | str) -> tuple[int, int, NDArray[np.uint64]]:
    """The bases, and of every round an odd key and a key, uint64 (rounds, 2)."""
    root = math.isqrt(size - 1) + 1
    near = range(root, root + min(64, root // 8) + 1)
    left_size = min(near, key=lambda base: -size % base)
    num_rounds = 12 if size >= 64 else 24
    keys = np.random.Philox(key=seed_for("permutation", *parts)).random_raw(2 * num_rounds)
    keys[::2] |= np.uint64(1)
    return left_size, -(-size // left_size), keys.reshape(num_rounds, 2)


def _one_pass(
    numbers: NDArray[np.uint64], left_size: int, right_size: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    changed_size, other_size = np.uint64(left_size), np.uint64(right_size)
    changed, other = np.divmod(numbers, other_size)
    added, spare = np.empty_like(numbers), np.empty_like(numbers)
    for factor, key in keys:
        np.multiply(other, factor, out=added)
        np.add(added, key, out=added)
        np.right_shift(added, HIGH, out=spare)
        np.bitwise_xor(added, spare, out=added)
        np.multiply(added, MIX, out=added)
        np.right_shift(added, HIGH, out=added)
        np.multiply(added, changed_size, out=added)
        np.right_shift(added, HIGH, out=added)  # 0..changed_size-1
        np.add(changed, added, out=changed)
        np.subtract(changed, changed_size, out=spare)  # wraps to a huge number where it is smaller
        np.minimum(changed, spare, out=changed)
        changed, other = other, changed
        changed_size, other_size = other_size, changed_size
    return changed * other_size + other  # an even number of rounds: as they were


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
    clips = np.flatnonzero(np.bincount(clip_index, minlength=len(keys)))  # those with windows
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


DRAWN_AT_ONCE = 8192
"""Positions of small batches that are computed together: 25 us for 1,024 instead of 75."""


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
        epoch, batch = divmod(step, self.steps_per_epoch)
        at_once = max(1, DRAWN_AT_ONCE // self.per_batch)
        piece, number = divmod(batch, at_once)
        drawn = _draw(self, epoch, piece, at_once * self.per_batch)
        return self.windows[drawn[number * self.per_batch : (number + 1) * self.per_batch]]

    def _drawn(self, epoch: int, positions: Indices) -> Indices:
        """Which of `windows` stand at `positions` of the epoch, int64 (n,)."""
        return shuffled(positions, len(self.windows), self.seed, "order", epoch)


@dataclass(frozen=True, eq=False)
class StreamOrder(BatchOrder):
    """Whole blocks in a random order, mixed in groups. windows: ascending.

    An epoch begins with the sizes of its groups, blocks taken a few thousand at a time; what is
    kept is a number a group.
    """

    block_starts: Indices = field(kw_only=True)
    """int64 (blocks + 1,): the first window of every block of the cache, and the end."""
    group_windows: int = field(kw_only=True)
    """Windows of a group, about: a group has a fixed number of blocks."""

    @functools.cached_property
    def _first(self) -> Indices:
        """int64 (blocks + 1,): how many of `windows` lie before every block, and all."""
        return np.searchsorted(self.windows, self.block_starts).astype(np.int64)

    @functools.cached_property
    def _group_blocks(self) -> int:
        num_blocks = len(self.block_starts) - 1
        return max(1, self.group_windows * num_blocks // int(self.block_starts[-1]))

    def _drawn(self, epoch: int, positions: Indices) -> Indices:
        group_starts = _group_starts(self, epoch)
        groups = np.searchsorted(group_starts, positions, side="right") - 1
        drawn = np.empty_like(positions)
        for group in np.unique(groups).tolist():
            inside = groups == group
            drawn[inside] = self._of_group(epoch, group, positions[inside] - group_starts[group])
        return drawn

    def _of_group(self, epoch: int, group: int, positions: Indices) -> Indices:
        blocks, ends = _blocks_of_group(self, epoch, group)
        mixed = shuffled(positions, int(ends[-1]), self.seed, "group", epoch, group)
        place = np.searchsorted(ends, mixed, side="right")
        return self._first[blocks[place] + 1] - (ends[place] - mixed)

    def _blocks_at(self, epoch: int, start: int, stop: int) -> Indices:
        """The blocks at the places `start` to `stop` of the epoch's order of blocks."""
        num_blocks = len(self.block_starts) - 1
        places = np.arange(start, min(stop, num_blocks))
        return shuffled(places, num_blocks, self.seed, "blocks", epoch)

    def _counts(self, blocks: Indices) -> Indices:
        return self._first[blocks + 1] - self._first[blocks]


@functools.lru_cache(maxsize=4)  # for the batches that are read ahead
def _draw(order: BatchOrder, epoch: int, piece: int, size: int) -> Indices:
    last = order.steps_per_epoch * order.per_batch
    return order._drawn(epoch, np.arange(piece * size, min((piece + 1) * size, last)))


@functools.lru_cache(maxsize=4)
def _group_starts(order: StreamOrder, epoch: int) -> Indices:
    """int64 (groups + 1,): the first position of every group of the epoch, and the end."""
    group, num_blocks = order._group_blocks, len(order.block_starts) - 1
    at_once = group * max(1, 2**16 // group)
    sizes = [np.zeros(1, dtype=np.int64)]
    for start in range(0, num_blocks, at_once):
        counts = order._counts(order._blocks_at(epoch, start, start + at_once))
        sizes.append(np.add.reduceat(counts, np.arange(0, len(counts), group)))
    return np.concatenate(sizes).cumsum()


@functools.lru_cache(maxsize=4)  # the groups at hand
def _blocks_of_group(order: StreamOrder, epoch: int, group: int) -> tuple[Indices, Indices]:
    """The group's blocks, and how many windows end with each, int64 (blocks of a group,) each."""
    size = order._group_blocks
    blocks = order._blocks_at(epoch, group * size, (group + 1) * size)
    return blocks, order._counts(blocks).cumsum()


def spread(windows: Indices, count: int) -> Indices:
    """At most `count` of `windows`, spread evenly over them."""
    if len(windows) <= count:
        return windows
    return windows[np.linspace(0, len(windows) - 1, count).astype(np.int64)]


def _unit_hash(key: str) -> float:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64
