"""Shards on their way to the disk, written while the backbone is at the next ones.

A shard is a gigabyte that has to be converted, hashed and flushed; done in the main thread, the
backbone would stand still meanwhile. Called by run.py.
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
from .writer import ShardRows, ShardWriter

_LOGGER = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)

MAX_THREADS = 4
"""Shards written at once; each takes about twice its size in memory (a guess)."""


class ShardSink:
    """Takes rows, gives done-records; a context manager that ends when all shards are written.

    An exception within the context lets the shards that are being written get finished.
    """

    def __init__(
        self, writer: ShardWriter, folder: Path, *, when_done: Callable[[DoneRecord], None]
    ) -> None:
        """when_done: called in the thread of `put`, in shard order, once a shard is written."""
        self._writer = writer
        self._folder = folder
        self._when_done = when_done
        self._num_threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 4))
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="write")
        self._waiting: deque[Future[DoneRecord]] = deque()

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

    def put(self, shard: int, rows: ShardRows) -> None:
        """Has the shard written; waits first while as many as there are threads are under way.

        Raises DeltatokError if one of these could not be written.
        """
        while len(self._waiting) >= self._num_threads:
            self._wait()
        self._waiting.append(self._threads.submit(self._write, shard, rows))

    def finish(self) -> None:
        """Waits for all shards; raises DeltatokError if one of them could not be written."""
        while self._waiting:
            self._wait()

    def _wait(self) -> None:
        self._when_done(self._waiting.popleft().result())

    def _write(self, shard: int, rows: ShardRows) -> DoneRecord:
        with disk_errors(self._folder):
            needed, free = rows.values.nbytes, shutil.disk_usage(self._folder).free
            if needed > free:
                raise OSError(
                    errno.ENOSPC,
                    f"shard {shard:06d} needs {needed / 1e6:.0f} MB, the disk has "
                    f"{free / 1e6:.0f} MB left",
                )
            return self._writer.write(self._folder, shard, rows)


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
