"""Statistics of stored values, taken again while a shard is read, against its done-record.

Sums in float64 over all tokens; the writer's are partly in float32, hence the tolerances.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DamagedShard
from ..patches.layout import FLOAT16_MAX
from ..schema import is_number

_OF_STD = 1e-3
"""Of a channel's standard deviation: what mean and deviation may differ by."""
_OF_MAX = 1e-6
"""And of the largest value, for channels that hardly vary."""


class StoredStatistics:
    """Of the values of one shard, D channels."""

    def __init__(self, num_channels: int) -> None:
        self._shift: NDArray[np.float64] | None = None
        self._sums = np.zeros(num_channels)
        self._squares = np.zeros(num_channels)
        self._count = 0
        self._abs_max = 0.0
        self._beyond_float16 = 0

    def add(self, values: NDArray[Any]) -> None:
        """Takes tokens (..., D), finite."""
        tokens = values.reshape(-1, values.shape[-1]).astype(np.float64)
        if self._shift is None:  # around the first mean: outlier channels keep their digits
            self._shift = tokens.mean(axis=0)
        magnitude = np.abs(tokens)
        self._abs_max = max(self._abs_max, float(magnitude.max()))
        self._beyond_float16 += int(np.count_nonzero(magnitude > FLOAT16_MAX))
        tokens -= self._shift
        self._sums += tokens.sum(axis=0)
        self._squares += np.einsum("nd,nd->d", tokens, tokens)
        self._count += len(tokens)

    def check(self, said: Mapping[str, Any], *, where: str) -> None:
        """Raises DamagedShard unless `said`, the `statistics` of the done-record, are these."""
        if self._shift is None:
            return
        mean = self._sums / self._count
        std = np.sqrt(np.maximum(self._squares / self._count - mean * mean, 0.0))
        mean += self._shift
        allowed = _OF_STD * std + _OF_MAX * self._abs_max
        for name, got in (("channel_mean", mean), ("channel_std", std)):
            values = said.get(name)
            if not isinstance(values, list) or len(values) != len(got):
                raise DamagedShard(f"{where}: statistics.{name} is no list of {len(got)} numbers")
            if not all(map(is_number, values)):
                raise DamagedShard(f"{where}: statistics.{name} has what is no number")
            far = np.flatnonzero(~(np.abs(np.array(values, dtype=np.float64) - got) <= allowed))
            if far.size:
                channel = int(far[0])
                raise DamagedShard(
                    f"{where}: statistics.{name} says {values[channel]} of channel {channel}, the "
                    f"shard's values give {got[channel]:.6g} ({far.size} channels differ)"
                )
        counted = {"abs_max": self._abs_max, "beyond_float16": self._beyond_float16}
        for name, value in counted.items():
            # Delta shards do not count values beyond float16: they are float16.
            if said.get(name, 0 if name == "beyond_float16" else None) != value:
                raise DamagedShard(
                    f"{where}: statistics.{name} is {said.get(name)!r}, the values give {value!r}"
                )
