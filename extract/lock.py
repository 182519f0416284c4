"""One run at a time in one output folder.

`.lock` in the folder is held with flock while a run writes there and says who holds it. The kernel
lets go of it when the process dies, however it dies. Called by run.py.
"""

import fcntl
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..shards.errors import UsageError

LOCK = ".lock"
_LOGGER = logging.getLogger(__name__)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the file is removed at the end.

    Raises UsageError naming host and process of the run that holds it already.
    """
    path = folder / LOCK
    descriptor = _acquire(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"host": platform.node(), "pid": os.getpid()}).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(
                f"{path.parent}: cannot be written ({error.strerror}): give another folder"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(path)
            os.close(descriptor)
            raise UsageError(
                f"{path.parent}: another run writes here ({holder}): wait for it, stop it, or "
                "give another folder"
            ) from error
        except OSError as error:
            _LOGGER.warning(
                "%s: this file system has no locks (%s): see to it yourself that no other run "
                "writes here",
                path.parent,
                error.strerror,
            )
            return descriptor
        if _is_still_there(path, descriptor):
            return descriptor
        os.close(descriptor)


def _is_still_there(path: Path, descriptor: int) -> bool:
    """Whether the locked file is the one at `path`: the run before may have removed it between
    our opening and our locking it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"host {holder['host']}, process {holder['pid']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown host and process"
