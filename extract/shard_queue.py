"""Shards waiting to be made, in order; the clips of later ones are decoded while one is made.

put --> shards(), one after the other, for the loop
    \\-> items_ahead(): what they consist of, as far as is known, for the decoding processes
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class ShardQueue(Generic[Item]):
    """Shards with their items, such as clips in plan order. One thread reads; `put` and `close` may
    be called from others."""

    def __init__(
        self, shards: Iterable[tuple[int, Sequence[Item]]] = (), *, is_open: bool = False
    ) -> None:
        """shards: number -> items, read only as far as needed. is_open: more will be `put`, until
        `close`."""
        self._first = iter(shards)
        self._put: deque[tuple[int, Sequence[Item]]] = deque()
        self._is_open = is_open
        self._changed = threading.Condition()
        self._begun: deque[tuple[int, Sequence[Item]]] = deque()
        """Items have been given of, the shard has not."""
        self._items: deque[Sequence[Item]] = deque()
        self.waited_s = 0.0
        """For shards that were not there yet."""

    def put(self, shard: int, items: Sequence[Item]) -> None:
        """One more, behind all others."""
        with self._changed:
            self._put.append((shard, items))
            self._changed.notify()

    def close(self) -> None:
        """There will be no more."""
        with self._changed:
            self._is_open = False
            self._changed.notify()

    def shards(self) -> Iterator[tuple[int, Sequence[Item]]]:
        """Each shard; waits for the next one while the queue is open."""
        while self._begun or self._begin(wait=True):
            yield self._begun.popleft()

    def items_ahead(self) -> Iterator[Item | None]:
        """The items of all shards, also of those that `shards` has not given yet; None where, for
        now or for ever, there is no more: ask again once `shards` has given another one."""
        while True:
            while self._items:
                yield from self._items.popleft()
            if not self._begin(wait=False):
                yield None

    def _begin(self, *, wait: bool) -> bool:
        """Whether there is one more shard."""
        shard = next(self._first, None)
        if shard is None:
            start_s = time.monotonic()
            with self._changed:
                while wait and self._is_open and not self._put:
                    self._changed.wait()
                self.waited_s += time.monotonic() - start_s
                if not self._put:
                    return False
                shard = self._put.popleft()
        self._begun.append(shard)
        self._items.append(shard[1])
        return True
