"""A decoding process: takes clips from the pool, gives their windows, and writes their frames into
memory that the pool reads.

Started by `DecodePool`, with the descriptor of a connection and the pool's process id. Imports no
torch, so that it starts in a fraction of a second. It dies with its parent, and ignores SIGINT and
SIGTERM: whether a run stops, and when, is for the parent to say.

    pool -> worker   (DecodeRequest, number of a memory file); then, where the number is new, the
                     descriptor of that file
    worker -> pool   Ready, once; then for every request the names of the decoders as they are
                     started (str), and a DecodeReply or a Refusal
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

from ...shards.errors import ClipError, ClipStage
from ...shards.sampling import WindowDraw
from ..config import DecoderChoice
from ..datasets.windows import Policy
from ..sources.clip import Clip
from .clip import DecodedFrames, DecoderName, decode_clip

PR_SET_PDEATHSIG = 1
"""Linux: the signal a process gets when its parent dies."""


@dataclass(frozen=True)
class Ready:
    """The first message of a process."""


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


@dataclass(frozen=True)
class DecodeReply:
    """The windows of a clip; their frames are in its memory file, one after the other."""

    decoder: DecoderName
    windows: list[WindowDraw]
    rows: dict[int, int]
    """Frame index -> row in the file, which holds uint8 (rows, height, width, 3)."""
    size: tuple[int, int]
    """Height and width."""


@dataclass(frozen=True)
class Refusal:
    """Why a clip gives no windows."""

    stage: ClipStage
    reason: str


Decode = Callable[[DecodeRequest, Callable[[DecoderName], None]], DecodedFrames]


def decode_request(
    request: DecodeRequest, starting: Callable[[DecoderName], None]
) -> DecodedFrames:
    """The frames of the clip; `starting` is called with every decoder that is tried."""
    clip = request.clip
    return decode_clip(
        clip.path,
        key=clip.key,
        policy=request.policy,
        source=clip.source,
        size_bytes=clip.size_bytes,
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
    memory_files: dict[int, int] = {}
    connection.send(Ready())
    while True:
        try:
            request, memory = connection.recv()
        except EOFError:
            return
        if memory not in memory_files:
            memory_files[memory] = recv_handle(connection)
        try:
            decoded = decode(request, connection.send)
        except ClipError as error:
            connection.send(Refusal(error.stage, str(error)))
            continue
        connection.send(_write_frames(decoded, memory_files[memory]))


def _write_frames(decoded: DecodedFrames, descriptor: int) -> DecodeReply:
    """Writes the frames in the order of their first use, each once."""
    order = dict.fromkeys(frame for draw in decoded.windows for frame in draw.frame_index)
    position = 0
    for frame in order:
        rest = decoded.frames[frame].data.cast("B")
        while rest:
            count = os.pwrite(descriptor, rest, position)
            rest, position = rest[count:], position + count
    height, width = decoded.frames[next(iter(order))].shape[:2]
    rows = {frame: row for row, frame in enumerate(order)}
    return DecodeReply(decoded.decoder, decoded.windows, rows, (height, width))


def _die_with(parent_pid: int) -> None:
    """Has the kernel kill this process when the thread that started it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the line above
        sys.exit(1)
