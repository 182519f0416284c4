"""One training run at a time writes into a folder. Used by the train_* functions."""

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..shards.errors import UsageError
from .devices import Accelerator, on_main

LOCK = "run.lock"
"""An empty file in OUT; the system drops the lock when its holder ends, however it ends."""


@contextmanager
def locked(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold OUT's lock on the main rank; the other ranks are led by it.

    Raises UsageError, on every rank, where another process trains into the folder, or it cannot be
    written.
    """
    with ExitStack() as stack:
        on_main(accelerator, lambda: _lock(folder, stack))
        yield


def _lock(folder: Path, stack: ExitStack) -> None:
    """Until the stack is left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context((folder / LOCK).open("wb"))
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be written ({error.strerror or error}): make room on the disk, or "
            "set another out"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"{folder}: another process is training into it: wait for it, stop it, or set "
            "another out"
        ) from None
