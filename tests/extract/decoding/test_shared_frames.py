"""Shared frames arrive unchanged, and nothing that a child could still change is taken for them."""

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deltatok.extract.decoding.shared_frames import NAME, share_frames
from deltatok.extract.decoding.wire import (
    MAGIC,
    Message,
    MessageReader,
    WireError,
    send,
    send_frames,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")

FRAMES = [np.full((4, 6, 3), index, np.uint8) for index in range(3)]
SIZE = 3 * 4 * 6 * 3
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    receiver, sender = socket.socketpair()
    receiver.settimeout(10)
    with receiver, sender:
        yield receiver, sender


def _read(reader: MessageReader) -> Message:
    while (message := reader.read()) is None:
        pass
    return message


def _announce(sender: socket.socket, descriptors: list[int], **changes: object) -> None:
    header = {"event": "windows", "shared": True, "payload_bytes": SIZE} | changes
    text = json.dumps(header).encode()
    socket.send_fds(sender, [MAGIC + len(text).to_bytes(4, "little") + text], descriptors)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _mapped() -> int:
    return Path("/proc/self/maps").read_text().count(NAME)


def test_shared_frames_arrive_as_sent_between_other_messages(pair: Pair) -> None:
    receiver, sender = pair
    send(sender.fileno(), {"event": "decoding"})
    send_frames(sender, {"event": "windows"}, FRAMES)
    send(sender.fileno(), {"event": "decoding"})
    reader = MessageReader(receiver, max_payload_bytes=SIZE)
    first, second, third = (_read(reader) for _ in range(3))
    np.testing.assert_array_equal(second.payload, np.concatenate([f.ravel() for f in FRAMES]))
    events = [message.header["event"] for message in (first, second, third)]
    assert events == ["decoding", "windows", "decoding"]
    assert not second.payload.flags.writeable


def test_memory_is_given_back_with_the_last_array(pair: Pair) -> None:
    receiver, sender = pair
    files = _open_files()
    send_frames(sender, {"event": "windows"}, FRAMES)
    message = _read(MessageReader(receiver, max_payload_bytes=SIZE))
    view = message.payload.reshape(3, 4, 6, 3)[2]
    del message
    assert _mapped() == 1
    assert int(view.min()) == 2
    del view
    assert (_mapped(), _open_files()) == (0, files)


def test_sender_cannot_change_what_it_has_shared() -> None:
    descriptor = share_frames(FRAMES)
    assert descriptor is not None
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)


def _memory_file(size: int, seals: int) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


ALL_SEALS = 1 | 2 | 4 | 8
"""Seal, shrink, grow, write, by Linux's numbers."""


@pytest.mark.parametrize(
    ("size", "seals", "words"),
    [
        (SIZE - 1, ALL_SEALS, f"announced {SIZE} bytes of frames, shares {SIZE - 1}"),
        (SIZE + 1, ALL_SEALS, f"announced {SIZE} bytes of frames, shares {SIZE + 1}"),
        *((SIZE, ALL_SEALS - seal, "can still change") for seal in (1, 2, 4, 8)),
    ],
)
def test_memory_that_could_change_or_has_another_size_is_refused(
    pair: Pair, size: int, seals: int, words: str
) -> None:
    receiver, sender = pair
    files = _open_files()
    descriptor = _memory_file(size, seals)
    _announce(sender, [descriptor])
    os.close(descriptor)
    reader = MessageReader(receiver, max_payload_bytes=SIZE)
    with pytest.raises(WireError, match=words):
        _read(reader)
    reader.close()
    assert (_mapped(), _open_files()) == (0, files)


def test_plain_file_is_refused(pair: Pair, tmp_path: Path) -> None:
    receiver, sender = pair
    with (tmp_path / "frames").open("w+b") as file:
        file.truncate(SIZE)
        _announce(sender, [file.fileno()])
    reader = MessageReader(receiver, max_payload_bytes=SIZE)
    # A disk's file has no seals; one in a memory file system has them, but none is set.
    with pytest.raises(WireError, match=r"no memory file|can still change"):
        _read(reader)
    reader.close()


@pytest.mark.parametrize("count", [0, 2, 5])
def test_one_message_brings_one_file(pair: Pair, count: int) -> None:
    receiver, sender = pair
    files = _open_files()
    descriptors = [_memory_file(SIZE, ALL_SEALS) for _ in range(count)]
    _announce(sender, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    reader = MessageReader(receiver, max_payload_bytes=SIZE)
    with pytest.raises(WireError, match=r"shares none|more than one"):
        _read(reader)
    reader.close()
    assert _open_files() == files


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"payload_bytes": 10 * SIZE}, "more than"),
        ({"payload_bytes": 0}, "shares none"),
        ({"payload_bytes": -1}, "without the size"),
    ],
)
def test_sizes_that_cannot_be_are_refused(pair: Pair, changes: dict, words: str) -> None:
    receiver, sender = pair
    descriptor = _memory_file(SIZE, ALL_SEALS)
    _announce(sender, [descriptor], **changes)
    os.close(descriptor)
    reader = MessageReader(receiver, max_payload_bytes=SIZE)
    with pytest.raises(WireError, match=words):
        _read(reader)
    reader.close()


def test_file_with_a_message_that_needs_none_is_closed(pair: Pair) -> None:
    receiver, sender = pair
    files = _open_files()
    descriptor = _memory_file(SIZE, ALL_SEALS)
    _announce(sender, [descriptor], shared=False, payload_bytes=0)
    os.close(descriptor)
    assert _read(MessageReader(receiver, max_payload_bytes=SIZE)).payload.size == 0
    assert _open_files() == files


def test_without_memory_files_frames_go_through_the_socket(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    receiver, sender = pair
    send_frames(sender, {"event": "windows"}, FRAMES)
    message = _read(MessageReader(receiver, max_payload_bytes=SIZE))
    assert "shared" not in message.header
    np.testing.assert_array_equal(message.payload, np.concatenate([f.ravel() for f in FRAMES]))
