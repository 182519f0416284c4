"""The bytes of an archive by position, over all of its parts, and a video that is a part of them.

NAME.tar; NAME.zip, or pieces of it in order, as `split` makes them: NAME.zip.part000,
NAME.zip.part001, ...; NAME.zip.000 or .001 on are taken too. Nothing is joined on disk.
"""

import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...shards.errors import UsageError
from ...shards.files import open_regular
from .clip import Stamp

PART_NAME = re.compile(r"(?P<archive>.+\.zip)\.(?:part)?(?P<number>[0-9]{2,6})", re.IGNORECASE)


def archive_of(path: Path) -> Path | None:
    """The zip archive that `path` is or is a part of; None for another name."""
    if path.suffix.lower() == ".zip":
        return path
    match = PART_NAME.fullmatch(path.name)
    return path.with_name(match["archive"]) if match else None


def find_parts(archive: Path) -> list[Path]:
    """The files that make the archive, in order; empty if there are none.

    Raises UsageError for a part that is missing between others, and for parts of two kinds.
    """
    if archive.is_file():
        return [archive]
    numbered: dict[int, Path] = {}
    folder = archive.parent
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = PART_NAME.fullmatch(path.name)
        if match is None or match["archive"] != archive.name or not path.is_file():
            continue
        number = int(match["number"])
        if number in numbered:
            raise UsageError(f"{path} and {numbered[number].name}: both part {number}: keep one")
        numbered[number] = path
    first = min(numbered, default=0)
    missing = sorted(set(range(min(first, 1), max(numbered, default=-1) + 1)) - numbered.keys())
    if first == 1:  # 7-Zip counts from .001 on, split from .part000
        missing = [number for number in missing if number]
    if missing:
        raise UsageError(
            f"{archive}: part {missing[0]} is missing beside {numbered[first].name}: put all "
            "parts into one folder"
        )
    return [numbered[number] for number in sorted(numbered)]


class ArchiveFile:
    """The bytes of an archive by position, over all of its parts."""

    def __init__(self, archive: Path) -> None:
        """Raises UsageError where it is not there, OSError where it cannot be opened."""
        paths = find_parts(archive)
        if not paths:
            raise UsageError(f"{archive}: no such archive, nor parts of it: check the path")
        self._descriptors: list[int] = []
        self._starts = [0]
        changed_ns = 0
        try:
            for path in paths:
                self._descriptors.append(open_regular(path))
                status = os.fstat(self._descriptors[-1])
                self._starts.append(self._starts[-1] + status.st_size)
                changed_ns = max(changed_ns, status.st_mtime_ns)
        except OSError:
            self.close()
            raise
        self.size = self._starts[-1]
        """Bytes of all parts together."""
        self.stamp: Stamp = (self.size, changed_ns)

    def pread(self, size: int, position: int) -> bytes:
        """`size` bytes from `position` on; fewer where the archive ends."""
        pieces: list[bytes] = []
        for descriptor, start, end in zip(
            self._descriptors, self._starts, self._starts[1:], strict=False
        ):
            while size > 0 and start <= position < end:
                piece = os.pread(descriptor, min(size, end - position), position - start)
                if not piece:
                    return b"".join(pieces)
                pieces.append(piece)
                position += len(piece)
                size -= len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> "ArchiveFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class FileSlice:
    """A video that is a part of a file: `size` bytes from `offset` on."""

    path: Path
    """Of the file; of a split archive its name without the part."""
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
        self._archive = ArchiveFile(part.path)
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
        view = memoryview(buffer).cast("B")
        left = max(0, min(len(view), self._part.size - self._position))
        data = self._archive.pread(left, self._part.offset + self._position)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._archive.close()
        super().close()
