"""Reading the next batches in a thread while this one is computed. Used by loop.py."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

DEPTH = 2
"""Batches that are read ahead: one hides a steady reader, a second its stutters (a guess)."""

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Gives read(start), read(start + 1), ... read(stop - 1), each begun ahead of its turn.

    One thread keeps up with what training eats; more take turns. What `read` raises is raised by
    `next`.
    """

    def __init__(
        self, read: Callable[[int], T], *, start: int, stop: int, num_threads: int = 1
    ) -> None:
        self._read = read
        self._depth = max(DEPTH, num_threads)
        self._steps = iter(range(start, stop))
        self._pool = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="prefetch")
        self._ahead: deque[Future[T]] = deque()

    def __enter__(self) -> Self:
        for _ in range(self._depth):
            self._begin_one()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def next(self) -> T:
        """The batch of the next step; waits for it if it is not read yet."""
        batch = self._ahead.popleft().result()
        self._begin_one()
        return batch

    def _begin_one(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._ahead.append(self._pool.submit(self._read, step))
