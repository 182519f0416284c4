"""A decoding process: takes clips from a pipe, gives windows and pixels back through a socket.

Started as `python -m deltatok.extract.decoding.child REQUEST_FD RESPONSE_FD PARENT_PID`. It
imports no torch, so that it starts in a fraction of a second. It dies with its parent, and it
ignores SIGINT and SIGTERM: whether a run stops, and when, is for the parent to say.
"""

import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...shards.errors import UnusableClip
from ..datasets.windows import policy_from_json
from ..sources.clip import source_from_json
from .clip import DecodedFrames, DecoderName, decode_clip
from .wire import Message, MessageReader, send, send_frames, windows_message

PR_SET_PDEATHSIG = 1
"""Linux: the signal a process gets when its parent dies."""

Decode = Callable[[dict[str, Any], Callable[[DecoderName], None]], DecodedFrames]


def decode_request(
    request: dict[str, Any], starting: Callable[[DecoderName], None]
) -> DecodedFrames:
    """The windows of the clip a request names; the fields are those `pool.py` sends."""
    return decode_clip(
        Path(request["path"]),
        key=request["key"],
        policy=policy_from_json(request["policy"]),
        source=source_from_json(request["source"]),
        size_bytes=request["size_bytes"],
        decoder=request["decoder"],
        threads=request["threads"],
        max_bytes=request["max_bytes"],
        starting=starting,
    )


def main(arguments: Sequence[str], *, decode: Decode = decode_request) -> int:
    """Serves requests until the pool closes the pipe; tests pass another `decode`."""
    request_fd, response_fd, parent_pid = map(int, arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a decoder that crashes leaves no core file
    _die_with(parent_pid)
    response = socket.socket(fileno=response_fd)
    send(response_fd, {"event": "ready"})
    reader = MessageReader(request_fd, max_payload_bytes=0)
    while (request := _next_request(reader)) is not None:
        _answer(request.header, response, decode)
    return 0


def _answer(request: dict[str, Any], response: socket.socket, decode: Decode) -> None:
    def starting(decoder: DecoderName) -> None:
        send(response.fileno(), {"event": "decoding", "decoder": decoder})

    try:
        decoded = decode(request, starting)
        header, frames = windows_message(decoded.decoder, decoded.windows, decoded.frames)
    except UnusableClip as error:
        reason = {"event": "unusable", "stage": error.stage, "reason": str(error)}
        send(response.fileno(), reason)
        return
    send_frames(response, header, frames)


def _next_request(reader: MessageReader) -> Message | None:
    try:
        while (message := reader.read()) is None:
            pass
    except EOFError:
        return None
    return message


def _die_with(parent_pid: int) -> None:
    """Has the kernel kill this process when its parent ends, however it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the line above
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
