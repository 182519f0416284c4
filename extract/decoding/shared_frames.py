"""Decoded frames from a child to the pool without a copy in the pool: sealed memory files (Linux).

The child writes a clip's frames into a memory file of its own, seals it, so that nobody can write
to it, shrink it or grow it any more, and sends its descriptor along with a message (`wire.py`).
The pool checks seals and size and maps it: what it then sees can neither change nor go away,
whatever becomes of the child. The memory is given back when the last array on it is; there is no
name in /dev/shm that a killed process could leave behind. Every array holds one file descriptor.

Systems without such files (macOS) send the frames through the socket.
"""

import fcntl
import mmap
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...shards.errors import DeltatokError

UInt8 = NDArray[np.uint8]

NAME = "deltatok-frames"
"""As it is shown in /proc/*/maps; several files may have it."""


class BadFrames(ValueError):
    """The descriptor is of no sealed memory file of that size."""


def share_frames(frames: Sequence[UInt8]) -> int | None:
    """The descriptor of a sealed memory file with the arrays one after the other.

    frames: contiguous, not empty together. None where the system has no such files, or none of
    that size for this process (a sandbox, a limit on the size of files).
    """
    if not hasattr(os, "memfd_create"):
        return None
    try:
        descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return None
    try:
        for frame in frames:
            rest = frame.data.cast("B")
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _seals())
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def map_frames(descriptor: int, size: int) -> UInt8:
    """The bytes behind the descriptor, uint8 (size,), read-only; size above 0.

    Raises BadFrames for anything that could change or shrink, or has another size; DeltatokError
    where this process can map no more.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:  # no memory file
        raise BadFrames("sent frames in something that is no memory file") from error
    got = os.fstat(descriptor).st_size
    if seals & _seals() != _seals():
        raise BadFrames("sent frames that it can still change")
    if got != size:
        raise BadFrames(f"announced {size} bytes of frames, shares {got}")
    # Private: older kernels (before 6.7) refuse a shared mapping of what is sealed against writing.
    try:
        memory = mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ)
    except OSError as error:  # no fault of the child's
        raise DeltatokError(
            f"cannot map {size} bytes of decoded frames ({error.strerror}): "
            "use fewer workers, or raise the limit of open files (ulimit -n)"
        ) from error
    return np.frombuffer(memory, np.uint8)


def _seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
