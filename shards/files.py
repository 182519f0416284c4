"""Writing files so that a kill at any moment leaves the old file, the new file, or a partial.

Every writer in the house goes through here: a file or folder is built under its partial name
`NAME.partial-<pid>-<8 hex>` (4 hex digits of the machine, 4 random), flushed to the disk, and
only then moved onto its final name.

And what every reader opens: `local_path` refuses addresses, `open_regular` what is no regular file;
`ReadOnlyFile` reads parts of a shard's files.
"""

import errno
import functools
import hashlib
import io
import json
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DeltatokError, UsageError, damaged_shard

PARTIAL = re.compile(r"\.partial-([0-9]+)-([0-9a-f]{4})[0-9a-f]{4}$")

STALE_AFTER_S = 86_400.0
"""Partials of another machine are taken for dead after a day without a change (a guess)."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|pipe:")
"""Two letters or more: C:/data is a path."""

SCHEMES = ("s3", "gs", "az", "file", "hf")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""What file systems without hard links say."""

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What no room on the disk would change."""

REMOVE_TRIES = 100
"""Every failed one has seen another process remove a part of the same folder (a guess)."""


def is_address(text: str) -> bool:
    """Whether it is of the form scheme://..."""
    return _URL.match(text) is not None


def check_address(text: str) -> None:
    """Raises UsageError unless it is an address of a known scheme."""
    found = _URL.match(text)
    if found is None or found[1] not in SCHEMES:
        raise UsageError(
            f"{text}: an address of {found[1] if found else 'no scheme'}, wanted a path on this "
            f"machine or one of {', '.join(f'{known}://' for known in SCHEMES)} (all but hf:// "
            "need pip install 'deltatok[cloud]')"
        )


def local_path(path: Path | str) -> Path:
    """`path`, that somebody gave us; UsageError for an address (s3://bucket/cache, file:///data,
    pipe:cat ...), of which a local folder would be made that is called so.

    A Path has lost one of the two slashes. A file that is called so has the path ./s3:/...
    """
    text = os.fspath(path)
    if _ADDRESS.match(text):
        raise UsageError(
            f"{text}: an address, wanted a path on this machine ({text.partition(':')[0]}: is "
            f"neither read nor written): mount or copy what lies there, or give ./{text} for a "
            "file of that name"
        )
    return Path(path)


def partial_path(path: Path) -> Path:
    """A fresh name beside `path` to build it under: `NAME.partial-<pid>-<8 hex>`."""
    return path.with_name(f"{path.name}{partial_mark()}{secrets.token_hex(2)}")


def partial_mark() -> str:
    """What the names of all partials of this process have in them, and of no other process."""
    return f".partial-{os.getpid()}-{_machine()}"


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


def flush_names(folder: Path) -> None:
    """Waits until a folder's own name, the names in it and in the folders in it are on the disk.

    They may not be, if who gave them was killed before it waited for that: then a power loss could
    take them, and leave what was built on them since. Parents that cannot be read are left out.
    """
    for path in (folder, *filter(Path.is_dir, folder.iterdir())):
        with suppress(FileNotFoundError):  # removed by another process
            flush(path)
    for parent in folder.absolute().parents:
        with suppress(PermissionError):
            flush(parent)


def write_bytes(path: Path, data: bytes | bytearray) -> None:
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


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """An OSError within, such as a full disk, becomes a DeltatokError that names `path` and says
    what to do."""
    try:
        yield
    except OSError as error:
        advice = "check the permissions" if error.errno in _REFUSED else "make room on the disk"
        raise DeltatokError(
            f"{path}: cannot be written ({error.strerror or error}): {advice} and run again; "
            "what is finished stays"
        ) from error


def make_folder(folder: Path | str, *, flag: str = "") -> Path:
    """A folder to write into, made where it is missing. UsageError, naming it and the `flag` that
    gave it, where it cannot be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{flag} {folder}: cannot be made ({error.strerror}); give another folder".lstrip()
        ) from None
    return Path(folder)


def check_free(folder: Path, needed_bytes: int, *, what: str, min_free_bytes: int = 0) -> None:
    """Raises DeltatokError if `needed_bytes` for `what` would leave less than `min_free_bytes` on
    the disk that `folder` is, or will be, on."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if needed_bytes + min_free_bytes > free:
        reserved = f", of which min_free keeps {min_free_bytes / 1e9:.3g} GB"
        raise DeltatokError(
            f"{folder}: {what} takes {needed_bytes / 1e9:.3g} GB, there are {free / 1e9:.3g} GB "
            f"left{reserved if min_free_bytes else ''}: make room and run again, or give a folder "
            "on another disk"
        )


def open_regular(path: Path) -> int:
    """A descriptor of a file to read; OSError for what is no regular file: opening or reading a
    pipe or a device may wait for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    _check_regular(descriptor, path)
    return descriptor


def _check_regular(descriptor: int, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", str(path))


def open_append(path: Path) -> io.FileIO:
    """A regular file to add bytes to, made where there is none, unbuffered; OSError likewise."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    _check_regular(descriptor, path)
    return os.fdopen(descriptor, "ab", buffering=0)


def open_file(path: Path) -> io.BufferedReader:
    """`open_regular` as a file object."""
    return os.fdopen(open_regular(path), "rb")


def read_text(path: Path, *, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a regular file; OSError as `open_regular`, UnicodeDecodeError."""
    with os.fdopen(open_regular(path), encoding=encoding, errors=errors) as file:
        return file.read()


def sha256_file(path: Path) -> str:
    """The SHA-256 of a regular file's bytes, 64 hex digits."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_text(num_bytes: float) -> str:
    """Bytes as people write them: 25206062 -> 25.2 MB."""
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.{3 if num_bytes < 999 * size else 4}g} {unit}"
    return f"{num_bytes:.0f} bytes"


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


def living_partials(folder: Path) -> list[Path]:
    """What other living processes of this machine are writing directly in `folder`."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = PARTIAL.search(path.name)
        if match and match[2] == _machine() and _is_other_process(int(match[1])):
            found.append(path)
    return found


def _may_be_alive(path: Path, pid: int, machine: str, *, stale_after_s: float) -> bool:
    if machine != _machine():
        try:
            return time.time() - path.lstat().st_mtime < stale_after_s
        except FileNotFoundError:
            return False
    return _is_other_process(pid)


def _is_other_process(pid: int) -> bool:
    """Whether a process of this machine, but not this one, has this number."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@functools.cache
def _machine() -> str:
    """4 hex digits that tell where a process id means something: this machine and, in a container,
    its own processes."""
    try:
        processes = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # no Linux
        processes = ""
    return hashlib.blake2b(f"{platform.node()} {processes}".encode(), digest_size=2).hexdigest()


def _flush_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _flush_tree(child)
    flush(path)


class ReadOnlyFile:
    """A file descriptor that is closed when nobody holds it any more; DamagedShard where the file
    cannot be opened or read.

    Reads go by position, so that threads and forked processes can share it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = open_regular(path)
        except OSError as error:
            raise damaged_shard(f"{path}: cannot be opened ({error.strerror})") from error

    # `close` is bound here: of a reader that lives to the end, `os` is taken apart first.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._descriptor >= 0:
            close(self._descriptor)

    def size(self) -> int:
        """Bytes in the file now."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on."""
        data = np.empty(size, dtype=np.uint8)
        self.read_into([data], offset)
        return data.tobytes()

    def read_into(self, buffers: list[NDArray[np.uint8]], offset: int) -> None:
        """Fills the uint8 (n,) `buffers`, one after the other, from `offset` on."""
        views = [buffer.data for buffer in buffers]
        left = sum(map(len, views))
        try:
            while left:  # once, unless it is interrupted
                got = os.preadv(self._descriptor, views, offset)
                if got == 0:
                    raise damaged_shard(f"{self.path}: ends at byte {offset}, wanted more")
                offset, left = offset + got, left - got
                while left and got >= len(views[0]):
                    got -= len(views.pop(0))
                if left:
                    views[0] = views[0][got:]
        except OSError as error:
            raise damaged_shard(f"{self.path}: cannot be read ({error})") from error
