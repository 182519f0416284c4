"""A decoding process: takes clips from the pool, gives their windows, and writes their frames into
memory that the pool reads.

Started by `DecodePool`, with the descriptor of a connection and the pool's process id. Imports no
torch, so that it starts in a fraction of a second. It dies with its parent, and ignores SIGINT and
SIGTERM: whether a run stops, and when, is for the parent to say.

    pool -> worker   (DecodeRequest, number of a memory file); then, where the number is new, the
                     descriptor of that file
    worker -> pool   None, once, when it is ready; then for every request the names of the decoders
                     as they are started, or "download" (str), and one of: a Quarantined; an error
                     that is no fault of the clip's; (DecodedClip without frames, height, width):
                     the frames are in the file, uint8 (height, width, 3) one after the other in
                     the order of `frames_used`
"""

import ctypes
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

import numpy as np

from ...shards.errors import ClipError, DeltatokError
from ...shards.records import Quarantined
from ..config import DecoderChoice
from ..datasets.windows import Policy
from ..sources.clip import Clip
from .backends import Step, frames_used
from .clip import DecodedClip, decode_clip
from .container import UInt8

PR_SET_PDEATHSIG = 1
"""Linux: the signal a process gets when its parent dies."""


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """One clip to decode."""

    clip: Clip
    policy: Policy
    decoder: DecoderChoice
    threads: int
    """Of the decoder."""
    max_bytes: int
    """Of RGB that the frames of the windows may have together."""


Decode = Callable[[DecodeRequest, Callable[[Step], None]], DecodedClip]


def decode_request(request: DecodeRequest, starting: Callable[[Step], None]) -> DecodedClip:
    """What the clip gives; `starting` is called as `decode_clip` says."""
    return decode_clip(
        request.clip,
        policy=request.policy,
        decoder=request.decoder,
        threads=request.threads,
        max_bytes=request.max_bytes,
        starting=starting,
    )


def main(arguments: Sequence[str], *, decode: Decode = decode_request) -> None:
    """Serves requests until the pool closes the connection; tests pass another `decode`."""
    connection_fd, parent_pid = map(int, arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a decoder that crashes leaves no core file
    # A limit on the size of files holds for memory files too, and they are none that fill a disk.
    _, largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    _die_with(parent_pid)
    connection = Connection(connection_fd)
    memory_files: dict[int, _FrameFile] = {}
    connection.send(None)
    while True:
        try:
            request, memory = connection.recv()
        except EOFError:
            return
        if memory not in memory_files:
            memory_files[memory] = _FrameFile(recv_handle(connection))
        try:
            decoded = decode(request, connection.send)
        except ClipError as error:
            # A frame in a folder may have a name that no record can hold.
            reason = str(error).encode(errors="backslashreplace").decode()
            key, stage = request.clip.key, error.stage
            connection.send(Quarantined(clip=key, stage=stage, reason=reason, attempts=1))
            continue
        except DeltatokError as error:
            connection.send(error)
            continue
        used = [decoded.frames[index] for index in frames_used(decoded.windows)]
        memory_files[memory].write(used)
        height, width, _ = used[0].shape
        connection.send((replace(decoded, frames={}), height, width))


class _FrameFile:
    """A memory file of the pool's, which is mapped once and written to again and again: twice as
    fast as `write`, which looks for every page of it (2 cores: 6.4 for 3.2 GB/s)."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._mapped: mmap.mmap | None = None

    def write(self, frames: Sequence[UInt8]) -> None:
        """Puts frames of one size, uint8 (H, W, 3), one after the other from its beginning."""
        size = sum(frame.nbytes for frame in frames)
        if os.fstat(self._descriptor).st_size < size:  # new, or the pool has made it smaller
            os.ftruncate(self._descriptor, size)
        if self._mapped is None or len(self._mapped) < size:
            self._mapped = mmap.mmap(self._descriptor, size)
        rows = np.frombuffer(self._mapped, np.uint8, count=size)
        for row, frame in zip(rows.reshape(-1, *frames[0].shape), frames, strict=True):
            row[...] = frame


def _die_with(parent_pid: int) -> None:
    """Has the kernel kill this process when the thread that started it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the line above
        sys.exit(1)
