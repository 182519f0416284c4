"""A message arrives as it was sent, in whatever pieces, and nothing else passes for one."""

import json
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltatok.extract.decoding.wire import (
    MAGIC,
    Message,
    MessageReader,
    WireError,
    read_windows,
    send,
)
from deltatok.extract.decoding.wire import windows_message as make_windows_message
from deltatok.extract.sampling import WindowDraw

DRAWS = [
    WindowDraw((3, 5, 5), (0.12, 0.2, 0.2), (1, 2, 3, 4), True),
    WindowDraw((7, 8, 3), (0.28, 0.32, 0.12), (0, 0, 4, 6), False),
]
FRAMES = {index: np.full((4, 6, 3), index, np.uint8) for index in (8, 7, 5, 3)}


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


def _raw(header: object, payload: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return MAGIC + len(text).to_bytes(4, "little") + text + payload


def _read(read: int, *, max_payload_bytes: int = 1000) -> Message:
    reader = MessageReader(read, max_payload_bytes=max_payload_bytes)
    while (message := reader.read()) is None:
        pass
    return message


def test_windows_arrive_as_sent(pipe: tuple[int, int]) -> None:
    read, write = pipe
    send(write, *make_windows_message("pyav", DRAWS, FRAMES))
    decoded = read_windows(_read(read))
    assert decoded.decoder == "pyav"
    assert [draw for draw, _ in decoded.windows] == DRAWS
    for draw, rows in decoded.windows:
        assert [int(decoded.frames[row].mean()) for row in rows] == list(draw.frame_index)


def test_shared_frame_is_sent_once_in_order_of_use() -> None:
    header, payload = make_windows_message("pyav", DRAWS, FRAMES)
    assert header["frames"] == [3, 5, 7, 8]
    assert len(payload) == 4


@given(st.lists(st.integers(1, 50), max_size=20))
def test_message_in_pieces_arrives_whole(sizes: list[int]) -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    data = _raw({"event": "x", "payload_bytes": 5}, b"abcde")
    reader = MessageReader(read, max_payload_bytes=5)
    message = None
    for size in [*sizes, len(data)]:
        os.write(write, data[:size])
        data = data[size:]
        try:
            while message is None:
                message = reader.read()
        except BlockingIOError:
            continue
    os.close(read)
    os.close(write)
    assert message is not None
    assert message.payload.tobytes() == b"abcde"


def test_two_messages_do_not_run_together(pipe: tuple[int, int]) -> None:
    read, write = pipe
    send(write, {"event": "first"})
    send(write, {"event": "second"})
    reader = MessageReader(read, max_payload_bytes=0)
    events = []
    while len(events) < 2:
        message = reader.read()
        events += [message.header["event"]] if message else []
    assert events == ["first", "second"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"Segmentation fault", "sent something that is no message"),
        (MAGIC + (2**31).to_bytes(4, "little"), "sent something that is no message"),
        (MAGIC + b"\x03\0\0\0{x}", "header that is no JSON"),
        (_raw([1, 2]), "without the size of its payload"),
        (_raw({"payload_bytes": -1}), "without the size of its payload"),
        (_raw({"payload_bytes": 1001}), "announced 1001 bytes, more than 1000"),
    ],
)
def test_garbage_is_refused(pipe: tuple[int, int], data: bytes, words: str) -> None:
    read, write = pipe
    os.write(write, data)
    with pytest.raises(WireError, match=words):
        _read(read)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": [4, 7]},
        {"size": [-1, 6]},
        {"frames": [3, 5, 7]},
        {"frames": ["x", 5, 7, 8]},
        {"windows": []},
        {"windows": [{"frame_index": [1]}]},
        {"windows": None},
        {"decoder": None, "size": None},
    ],
)
def test_windows_that_do_not_fit_their_pixels_are_refused(changes: dict) -> None:
    header, frames = make_windows_message("pyav", DRAWS, FRAMES)
    message = Message(header | changes, np.concatenate([frame.ravel() for frame in frames]))
    with pytest.raises(WireError, match="sent"):
        read_windows(message)
