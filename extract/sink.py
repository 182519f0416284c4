"""Shards on their way to the disk, written while the backbone is at the next ones.

A shard is a gigabyte that has to be converted, hashed and flushed; done in the main thread, the
backbone would stand still meanwhile.
"""

import errno
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from ..shards.errors import DeltatokError
from ..shards.records import DoneRecord
from ..shards.windows import ShardRows
from .work import TakenShard
from .writer import ShardWriter

_LOGGER = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)

MAX_THREADS = 4
"""Shards written at once; each takes about twice its size in memory (a guess)."""


class ShardSink:
    """Takes rows, gives done-records; a context manager that ends when all shards are written.

    An exception within the context lets the shards that are being written get finished.
    """

    def __init__(
        self,
        writer: ShardWriter,
        folder: Path,
        *,
        min_free_bytes: int,
        when_done: Callable[[TakenShard, DoneRecord | None], None],
    ) -> None:
        """min_free_bytes: left on the disk, whatever is written. when_done: called in the thread of
        `put`, in the order of `put`, once a shard is written; without a record if it was not,
        because another process has it now."""
        self._writer = writer
        self._folder = folder
        self._min_free_bytes = min_free_bytes
        self._when_done = when_done
        self._num_threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 4))
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="write")
        self._waiting: deque[tuple[TakenShard, Future[DoneRecord | None]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.finish()
        except DeltatokError as problem:
            if error is None:
                raise
            _LOGGER.error("%s", problem)  # the first error is the one to end with
        finally:
            self._threads.shutdown()

    def put(self, taken: TakenShard, rows: Callable[[], ShardRows]) -> None:
        """Has the shard written; waits first while as many as there are threads are under way.

        rows: asked for once, by the thread that writes them.
        Raises DeltatokError if one of these could not be written.
        """
        while len(self._waiting) >= self._num_threads:
            self._wait()
        self._waiting.append((taken, self._threads.submit(self._write, taken, rows)))

    def finish(self) -> None:
        """Waits for all shards; raises DeltatokError if one of them could not be written."""
        while self._waiting:
            self._wait()

    def _wait(self) -> None:
        taken, future = self._waiting.popleft()
        self._when_done(taken, future.result())

    def _write(self, taken: TakenShard, make_rows: Callable[[], ShardRows]) -> DoneRecord | None:
        rows = make_rows()
        if not taken.lease.is_held():
            return None
        try:
            with disk_errors(self._folder):
                check_room(
                    self._folder,
                    f"shard {taken.shard:06d}",
                    rows.tokens.nbytes,
                    min_free_bytes=self._min_free_bytes,
                )
                return self._writer.write(self._folder, taken.shard, rows)
        except DeltatokError as error:
            if taken.lease.is_held():
                raise
            # Whoever has it now may have removed what we were writing.
            _LOGGER.warning("shard %06d: %s", taken.shard, error)
            return None


def check_room(folder: Path, what: str, needed: int, *, min_free_bytes: int) -> None:
    """Raises OSError if `needed` bytes for `what` would leave less than `min_free_bytes`."""
    free = shutil.disk_usage(folder).free
    if needed + min_free_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {needed / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB left, of which "
            f"min_free keeps {min_free_bytes / 1e6:.0f} MB",
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """An OSError within, such as a full disk, becomes a DeltatokError that says what to do."""
    try:
        yield
    except OSError as error:
        advice = "make room" if error.errno in _FULL else "put that right"
        raise DeltatokError(
            f"{folder}: cannot be written ({error.strerror or error}): {advice} and run again; "
            "finished shards stay"
        ) from error
