"""The messages between the pool and its decoding processes: JSON and raw bytes, never pickle.

    +--------+---------------------+--------------+-----------------------+
    | "DTOK" | header bytes, u32le | header, JSON | payload, raw          |
    +--------+---------------------+--------------+-----------------------+
                                    header["payload_bytes"] says how many

Requests (pool to child, a pipe) have no payload. A child answers (a socket) `ready` once, then for
every request any number of `decoding` messages (which decoder has started) and one `windows` or
`unusable`. The payload of `windows` is uint8 (frames, height, width, 3). Where the system can, it
does not follow the header: the header says "shared": true, and the descriptor of a memory file
(`shared_frames.py`) travels along with the message. A child is not trusted: whatever is not exactly
this is a WireError, and the child is replaced.
"""

import array
import json
import os
import select
import socket
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..sampling import Square, WindowDraw
from .shared_frames import BadFrames, map_frames, share_frames

UInt8 = NDArray[np.uint8]

MAGIC = b"DTOK"
PREFIX_BYTES = 8
MAX_HEADER_BYTES = 64 * 2**20
"""A header of a million windows fits; more is garbage (a guess)."""

READ_BYTES = 2**20
"""At most this much is read at once, so that the pool turns to its other children."""

SEND_TIMEOUT_S = 5
"""For an idle process to take a request that is larger than its pipe (4 KiB where a user has many
pipes): the frames of a clip may be scattered over an archive. It waits for nothing else, so this
is short."""


class WireError(ValueError):
    """What came is no message."""


@dataclass(frozen=True)
class Message:
    """One message."""

    header: dict[str, Any]
    payload: UInt8
    """uint8 (payload bytes,)"""


class MessageReader:
    """Takes messages off a pipe or socket piece by piece; never reads past a message's end."""

    def __init__(self, source: int | socket.socket, *, max_payload_bytes: int) -> None:
        """source: the descriptor of a pipe; only a socket can bring shared payloads."""
        self._source = source
        self._max_payload_bytes = max_payload_bytes
        self._received: list[int] = []
        self._start()

    def close(self) -> None:
        """Closes what has come with an unfinished message; not the source itself."""
        while self._received:
            os.close(self._received.pop())

    def read(self) -> Message | None:
        """Reads once; gives a message if that completed it.

        Raises:
            EOFError: the other side has closed.
            WireError: what came is no message.
            BlockingIOError: nothing to read now (non-blocking descriptors only).
        """
        wanted = self._buffer[self._filled : self._filled + READ_BYTES]
        count = self._read_into(wanted.data)
        if count == 0:
            raise EOFError
        self._filled += count
        while self._filled == len(self._buffer):
            message = self._next_part()
            if message is not None:
                self._start()
                return message
        return None

    def _read_into(self, wanted: memoryview) -> int:
        if isinstance(self._source, int):
            return os.readv(self._source, [wanted])
        space = socket.CMSG_SPACE(array.array("i").itemsize)  # the kernel drops what is more
        count, extras, _, _ = self._source.recvmsg_into([wanted], space)
        for level, kind, data in extras:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._received += array.array("i", data)
        return count

    def _start(self) -> None:
        self.close()
        self._part = "prefix"
        self._header: dict[str, Any] = {}
        self._expect(PREFIX_BYTES)

    def _expect(self, size: int) -> None:
        self._buffer = np.empty(size, np.uint8)
        self._filled = 0

    def _next_part(self) -> Message | None:
        """Takes the part that is complete, and prepares for the next one."""
        data = self._buffer
        if self._part == "prefix":
            size = int.from_bytes(data[4:].tobytes(), "little")
            if data[:4].tobytes() != MAGIC or not 0 < size <= MAX_HEADER_BYTES:
                raise WireError("sent something that is no message")
            self._part = "header"
            self._expect(size)
            return None
        if self._part == "header":
            self._header = _parse_header(data.tobytes())
            size = self._header["payload_bytes"]
            if size > self._max_payload_bytes:
                raise WireError(f"announced {size} bytes, more than {self._max_payload_bytes}")
            if self._header.get("shared") is True:
                return Message(self._header, self._map(size))
            self._part = "payload"
            self._expect(size)
            return None
        return Message(self._header, data)

    def _map(self, size: int) -> UInt8:
        if size == 0 or not self._received:
            raise WireError("announced shared frames and shares none")
        if len(self._received) > 1:
            raise WireError("shares more than one file of frames")
        try:
            return map_frames(self._received[0], size)
        except BadFrames as error:
            raise WireError(str(error)) from error


def send_frames(channel: socket.socket, header: dict[str, Any], frames: list[UInt8]) -> None:
    """Writes one message with a payload, shared where the system can; blocks like `send`.

    frames: the payload, contiguous uint8 arrays.
    """
    descriptor = share_frames(frames)
    if descriptor is None:
        send(channel.fileno(), header, frames)
        return
    size = sum(frame.nbytes for frame in frames)
    data = _encode(header | {"shared": True, "payload_bytes": size})
    try:
        sent = socket.send_fds(channel, [data], [descriptor])
    finally:
        os.close(descriptor)
    _write_all(channel.fileno(), data[sent:])


def send(descriptor: int, header: dict[str, Any], frames: list[UInt8] | None = None) -> None:
    """Writes one message; blocks until the other side has taken it.

    Args:
        frames: the payload, contiguous uint8 arrays.
    """
    frames = frames or []
    size = sum(frame.nbytes for frame in frames)
    _write_all(descriptor, _encode(header | {"payload_bytes": size}))
    for frame in frames:
        _write_all(descriptor, frame.data.cast("B"))


def _encode(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return MAGIC + len(text).to_bytes(4, "little") + text


def windows_message(
    decoder: str, windows: list[WindowDraw], frames: dict[int, UInt8]
) -> tuple[dict[str, Any], list[UInt8]]:
    """Header and payload of a clip's windows; the frames in the order of their first use."""
    order = dict.fromkeys(frame for draw in windows for frame in draw.frame_index)
    payload = [frames[frame] for frame in order]
    header = {
        "event": "windows",
        "decoder": decoder,
        "size": payload[0].shape[:2],
        "frames": list(order),
        "windows": [asdict(draw) for draw in windows],
    }
    return header, payload


@dataclass(frozen=True)
class DecodedFrames:
    """What came back for one clip."""

    decoder: str
    frames: UInt8
    """uint8 (frames, height, width, 3)"""
    windows: list[tuple[WindowDraw, list[int]]]
    """Every window with the rows of `frames` it is made of."""


def read_windows(message: Message) -> DecodedFrames:
    """The clip in a `windows` message.

    Raises:
        WireError: the header does not describe the payload.
    """
    header = message.header
    try:
        height, width = header["size"]
        if height < 1 or width < 1:  # reshape would take -1 for "whatever fits"
            raise ValueError
        rows = {int(frame): row for row, frame in enumerate(header["frames"])}
        frames = message.payload.reshape(len(rows), height, width, 3)
        draws = [_read_draw(fields) for fields in header["windows"]]
        windows = [(draw, [rows[frame] for frame in draw.frame_index]) for draw in draws]
        decoder = str(header["decoder"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WireError("sent windows that do not fit their pixels") from error
    if not windows:
        raise WireError("sent no windows")
    return DecodedFrames(decoder, frames, windows)


def _read_draw(fields: dict[str, Any]) -> WindowDraw:
    top, left, height, width = map(int, fields["crop"])
    square = fields.get("square")
    return WindowDraw(
        frame_index=tuple(map(int, fields["frame_index"])),
        timestamps_s=tuple(map(float, fields["timestamps_s"])),
        crop=(top, left, height, width),
        flipped=bool(fields["flipped"]),
        square=None if square is None else Square(**{k: int(v) for k, v in square.items()}),
    )


def _parse_header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError("sent a header that is no JSON") from error
    size = header.get("payload_bytes") if isinstance(header, dict) else None
    if not isinstance(size, int) or size < 0:
        raise WireError("sent a header without the size of its payload")
    return dict(header)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    """TimeoutError where a pipe that does not block stays full."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            room = select.poll()
            room.register(descriptor, select.POLLOUT)
            if not room.poll(1000 * SEND_TIMEOUT_S):
                raise TimeoutError(f"its pipe is full for {SEND_TIMEOUT_S} s") from None
