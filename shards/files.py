"""Writing files so that a kill at any moment leaves the old file, the new file, or a partial.

Every writer in the house goes through here: a file or folder is built under its partial name
`NAME.partial-<pid>-<8 hex>` (4 hex digits of the machine, 4 random), flushed to the disk, and
only then moved onto its final name.

A disk that is full, or refuses for another reason, while a run writes. Used by loop.py, logs.py
and checkpoints.py.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import DeltatokError

PARTIAL = re.compile(r"\.partial-([0-9]+)-([0-9a-f]{4})[0-9a-f]{4}$")

STALE_AFTER_S = 86_400.0
"""Partials of another machine are taken for dead after a day without a change (a guess)."""

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""What file systems without hard links say."""

REMOVE_TRIES = 100
"""Every failed one has seen another process remove a part of the same folder (a guess)."""


def partial_path(path: Path) -> Path:
    """A fresh name beside `path` to build it under: `NAME.partial-<pid>-<8 hex>`."""
    return path.with_name(f"{path.name}.partial-{os.getpid()}-{_machine()}{secrets.token_hex(2)}")


def publish(partial: Path, final: Path) -> None:
    """Flushes the file or folder `partial` to the disk, moves it onto `final`, flushes the parent.

    A file that is already there is replaced in one step. A folder that is already there is moved
    aside first: killed in between, neither is there, which no done-record ever promises.
    """
    _flush_tree(partial)
    if partial.is_dir() and final.exists():
        aside = partial_path(final)
        final.rename(aside)
        partial.rename(final)
        remove(aside)
    else:
        partial.replace(final)
    flush(final.parent)


def flush(path: Path) -> None:
    """Waits until a file's bytes, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder, and say so with these.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` as the whole file `path`, atomically."""
    partial = partial_path(path)
    try:
        partial.write_bytes(data)
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def create_bytes(path: Path, data: bytes) -> bool:
    """Writes `data` as the whole file `path` unless there is one; False if there is.

    Of several processes that do this at once, on one file system, exactly one gets True; on a file
    system without hard links the last one's bytes stand.
    """
    partial = partial_path(path)
    try:
        partial.write_bytes(data)
        flush(partial)
        path.hardlink_to(partial)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if path.exists():
            return False
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)
    return True


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON with sorted keys, atomically.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return f"{json.dumps(value, indent=1, sort_keys=True, allow_nan=False)}\n".encode()


def sha256_file(path: Path) -> str:
    """The SHA-256 of the file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Removes a file or a whole folder; a missing one is fine, also one that others remove too."""
    for attempt in range(REMOVE_TRIES):
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        try:
            shutil.rmtree(path)
        except FileNotFoundError:  # another process was quicker with some file of it
            if attempt == REMOVE_TRIES - 1:
                raise


def is_partial(path: Path) -> bool:
    """Whether the name is one that `partial_path` gives."""
    return PARTIAL.search(path.name) is not None


def remove_partials(
    folder: Path, *, prefix: str = "", stale_after_s: float = STALE_AFTER_S
) -> list[Path]:
    """Removes what killed writers left directly in `folder`, under names with this `prefix`; gives
    what was removed.

    Kept: the partials of other living processes, and those of other machines that changed within
    the last `stale_after_s` seconds. Call it before this process starts to write there, since its
    own are removed.
    """
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = PARTIAL.search(path.name)
        if (
            match is None
            or not path.name.startswith(prefix)
            or _may_be_alive(path, int(match[1]), match[2], stale_after_s=stale_after_s)
        ):
            continue
        remove(path)
        removed.append(path)
    return removed


def _may_be_alive(path: Path, pid: int, machine: str, *, stale_after_s: float) -> bool:
    if machine != _machine():
        try:
            return time.time() - path.lstat().st_mtime < stale_after_s
        except FileNotFoundError:
            return False
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _machine() -> str:
    """4 hex digits of this machine's name: a process id means something only on its machine."""
    return hashlib.blake2b(platform.node().encode(), digest_size=2).hexdigest()


def _flush_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _flush_tree(child)
    flush(path)


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """DeltatokError naming `what` if writing it, inside, fails: no traceback, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system said
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DeltatokError(
            f"{what}: could not be written ({reason}). The checkpoints that were there before are "
            "whole: make room on the disk and run the same command again"
        ) from error
