"""A zip archive in one file or several: NAME.zip, or NAME.zip.part000, NAME.zip.part001, ...

The parts are pieces of one file, in order, as `split` makes them; NAME.zip.000 or .001 on are taken
too. Read by position only; nothing is joined on disk.
"""

import os
import re
from pathlib import Path

from ..shards.errors import UsageError
from .clips import Stamp

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


class ZipParts:
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
                self._descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
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

    def __enter__(self) -> "ZipParts":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
