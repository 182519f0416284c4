"""Seconds by stage: where the time of an extraction, a training run or an evaluation goes."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class Stopwatch:
    """Seconds that a thread spent at each stage."""

    def __init__(self, *, wait: Callable[[], None] | None = None) -> None:
        """wait: called at the end of a stage, as to wait for a device: a stage pays for its own
        work then."""
        self.seconds: dict[str, float] = {}
        self._wait = wait

    @contextmanager
    def at(self, stage: str) -> Iterator[None]:
        """Counts the time within for `stage`."""
        start_s = time.perf_counter()
        try:
            yield
            if self._wait is not None:
                self._wait()
        finally:
            self.add(stage, time.perf_counter() - start_s)

    def add(self, stage: str, seconds: float) -> None:
        """Counts time that was measured elsewhere."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def each(self, stage: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items, the time that making each takes counted for `stage`."""
        iterator = iter(items)
        while True:
            with self.at(stage):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def slowest(self) -> str | None:
        """Like "decode 71 %": the stage with most time and its share; None before there is any."""
        total_s = sum(self.seconds.values())
        if not total_s:
            return None
        stage = max(self.seconds, key=lambda name: self.seconds[name])
        return f"{stage} {100 * self.seconds[stage] / total_s:.0f} %"
