"""The order of `residency: stream`: whole blocks in seeded order, mixed within groups of blocks.

A disk gives its full rate only to long reads. So a block (windows that follow one another in a
file) is read whole, the blocks of an epoch come in a random order, as many as make a group are held
at once, and the windows of a group are permuted among themselves. Used by data.py and stream.py.
"""

import functools
from dataclasses import dataclass, field

import numpy as np

from .draws import permutation
from .order import Indices, check_enough


@dataclass(frozen=True, eq=False)
class StreamOrder:
    """As order.BatchOrder: the windows of every step, a function of (seed, epoch, step)."""

    windows: Indices
    """int64 (W,), ascending: what there is."""
    per_batch: int
    seed: int
    block_starts: Indices = field(kw_only=True)
    """int64 (blocks + 1,): the first window of every block of the cache, and the end."""
    group_windows: int = field(kw_only=True)
    """Windows of a group, about: blocks are kept whole."""

    def __post_init__(self) -> None:
        check_enough(self.windows, self.per_batch)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch; what is left over is not used in it."""
        return len(self.windows) // self.per_batch

    def at(self, step: int) -> Indices:
        """Windows of the global batch of step number `step` (from 0), int64 (per_batch,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        sequence = self._sequence(epoch)
        return sequence[position * self.per_batch : (position + 1) * self.per_batch]

    @functools.cached_property
    def _sequence(self) -> "functools._lru_cache_wrapper[Indices]":
        return functools.lru_cache(maxsize=2)(self._make_sequence)

    def _make_sequence(self, epoch: int) -> Indices:
        blocks = np.searchsorted(self.block_starts, self.windows, side="right") - 1
        _, block, counts = np.unique(blocks, return_inverse=True, return_counts=True)
        order = permutation(len(counts), self.seed, "blocks", epoch)
        group = np.empty(len(counts), dtype=np.int64)
        group[order] = (np.cumsum(counts[order]) - counts[order]) // self.group_windows
        mixed = permutation(len(self.windows), self.seed, "within groups", epoch)
        return self.windows[np.lexsort((mixed, group[block]))]


def same_block_share(order: StreamOrder, step: int) -> tuple[float, float]:
    """How well a batch is shuffled: the share of pairs of its windows that lie in one block, and
    that share in a batch of a global shuffle. 0..1; the closer the two, the better."""
    count = order.per_batch
    if count < 2:
        return 0.0, 0.0
    batch = np.searchsorted(order.block_starts, order.at(step), side="right")
    everything = np.searchsorted(order.block_starts, order.windows, side="right")
    return _pairs_alike(batch), _pairs_alike(everything)


def _pairs_alike(values: Indices) -> float:
    counts = np.unique(values, return_counts=True)[1].astype(np.float64)
    total = float(len(values))
    return float((counts * (counts - 1)).sum() / (total * (total - 1)))
