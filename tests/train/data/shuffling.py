"""How well `residency: stream` mixes the windows of a cache."""

import numpy as np

from deltatok.train.data.order import StreamOrder


def same_block_share(order: StreamOrder, step: int) -> tuple[float, float]:
    """How well a batch is shuffled: the share of pairs of its windows that lie in one block, and
    that share in a batch of a global shuffle. 0..1; the closer the two, the better."""
    count = order.per_batch
    if count < 2:
        return 0.0, 0.0
    batch = np.searchsorted(order.block_starts, order.at(step), side="right")
    everything = np.searchsorted(order.block_starts, order.windows, side="right")
    return _pairs_alike(batch), _pairs_alike(everything)


def _pairs_alike(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1].astype(np.float64)
    total = float(len(values))
    return float((counts * (counts - 1)).sum() / (total * (total - 1)))
