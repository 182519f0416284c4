"""A video that is a part of a file, given to decoders as a file object: nothing is unpacked."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FileSlice:
    """`size` bytes of a file from `offset` on."""

    path: Path
    offset: int
    size: int

    def open(self) -> "SliceReader":
        """A file object of these bytes only; OSError where the file cannot be opened."""
        return SliceReader(self)

    def read(self) -> bytes:
        """All of it."""
        with self.open() as file:
            return file.read()


class SliceReader(io.RawIOBase):
    """A seekable file that begins and ends with the slice."""

    def __init__(self, part: FileSlice) -> None:
        self._descriptor = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
        self._part = part
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._part.size}
        if start[whence] + offset < 0:
            raise ValueError(f"seek to {start[whence] + offset}, before the start")
        self._position = start[whence] + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        left = max(0, self._part.size - self._position)
        view = memoryview(buffer).cast("B")[:left]
        count = os.preadv(self._descriptor, [view], self._part.offset + self._position)
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()
