"""Uncompressed tars of videos, as WebDataset has them -> clips, which are read where they lie.

    NAME.mp4      the video
    NAME.json     optional: an object with `label` and `split` (texts)
    NAME.cls      optional: the label

What is lost is named, or the tar is refused: a video that the end of the file cuts off is a clip
that goes to quarantine; where not even a name is left, nothing of the tar is used.
"""

import io
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ...shards.errors import UsageError
from ...shards.files import open_regular
from .clip import (
    VIDEO_SUFFIXES,
    ClipCandidate,
    Stamp,
    TarVideo,
    Unreadable,
    check_member,
    file_stamp,
)

logger = logging.getLogger(__name__)

MAX_METADATA_BYTES = 2**20
_BLOCK_BYTES = 512
_READ_BYTES = 2**20


@dataclass(frozen=True)
class FileSlice:
    """A video that is a part of a file: `size` bytes from `offset` on."""

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
        self._descriptor = open_regular(part.path)
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


@dataclass
class _Metadata:
    label: str | None = None
    split: str | None = None


def find_in_tar(path: Path) -> Iterator[ClipCandidate]:
    """The videos of a tar, with their class and split where it names them.

    Raises UsageError for a tar that is compressed, damaged or cut short within a header, and for
    a member whose name leads out of it.
    """
    videos: list[ClipCandidate] = []
    metadata: dict[str, _Metadata] = {}
    bad_metadata: list[str] = []
    try:
        stamp = file_stamp(path)
        with tarfile.open(path, "r:") as tar:
            for member in _members(tar, path, size=stamp[0]):
                name = PurePosixPath(member.name)
                if name.suffix.lower() in VIDEO_SUFFIXES and not member.isdir():
                    videos.append(_video(path, name.as_posix(), member, stamp))
                elif name.suffix.lower() in (".json", ".cls") and member.isreg():
                    known = metadata.setdefault(_base(name), _Metadata())
                    if not _read_metadata(tar, member, known):
                        bad_metadata.append(member.name)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}): check it") from error
    except UsageError:
        raise
    except (tarfile.TarError, RecursionError, OverflowError, ValueError) as error:
        raise UsageError(
            f"{path}: cannot be read as an uncompressed tar ({error}): get it again; unpack a "
            "compressed one"
        ) from error
    if bad_metadata:
        first = bad_metadata[0]
        logger.warning("%s: %d members give no metadata, first %s", path, len(bad_metadata), first)
    for video in videos:
        known = metadata.get(_base(PurePosixPath(video.name)), _Metadata())
        yield replace(video, label=known.label, split=known.split)


def _members(tar: tarfile.TarFile, path: Path, *, size: int) -> Iterator[tarfile.TarInfo]:
    """The members in order, hidden ones left out. A video that the end of the file cuts off is
    the last one; UsageError where something else is cut off, or the tar does not end there."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined] # it would keep them all
        check_member(member.name, path)
        if member.size < 0:  # `tarfile` would go back, and round for ever
            raise _cut_short(path, member.offset, size)
        if member.isreg() and member.offset_data + member.size > size:
            if PurePosixPath(member.name).suffix.lower() not in VIDEO_SUFFIXES:
                raise _cut_short(path, member.offset, size)
            yield member
            return
        if not PurePosixPath(member.name).name.startswith("."):
            yield member
    _check_end(path, tar.offset, size)


def _video(path: Path, name: str, member: tarfile.TarInfo, stamp: Stamp) -> ClipCandidate:
    reason = None
    if not member.isreg() or member.issparse():
        reason = "is no plain file in its tar, but a link or a sparse one"
    elif member.offset_data + member.size > stamp[0]:
        there = max(0, stamp[0] - member.offset_data)
        reason = (
            f"{path.name} is cut short: {there} of the {member.size} bytes of this member are "
            "there, and nothing that came after it"
        )
        logger.warning("%s: %s", name, reason)
    if reason is not None:
        return ClipCandidate(name, path, Unreadable(reason), size_bytes=member.size)
    return ClipCandidate(name, path, TarVideo(member.offset_data, stamp), size_bytes=member.size)


def _base(name: PurePosixPath) -> str:
    """What the members of one sample have in common: the name up to its first dot."""
    return (name.parent / name.name.partition(".")[0]).as_posix()


def _read_metadata(tar: tarfile.TarFile, member: tarfile.TarInfo, metadata: _Metadata) -> bool:
    """Takes label and split from a .json or .cls member; False where there are none to take."""
    file = tar.extractfile(member) if member.size <= MAX_METADATA_BYTES else None
    text = file.read() if file is not None else b""
    try:
        if member.name.lower().endswith(".cls"):
            metadata.label = text.decode().strip() or None
            return metadata.label is not None
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(fields, dict):
        return False
    for name in ("label", "split"):
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is not None and not isinstance(value, str):
            return False
        if value:
            setattr(metadata, name, value)
    return True


def _check_end(path: Path, end: int, size: int) -> None:
    """Refuses a tar that goes on after the place where `tarfile` takes it to end."""
    if end >= size:
        logger.warning("%s: has no end mark; if it was cut short, what came after is lost", path)
        return
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(_BLOCK_BYTES)
        if block.strip(b"\0") or len(block) < _BLOCK_BYTES:
            raise _cut_short(path, end, size)
        while rest := file.read(_READ_BYTES):
            if rest.strip(b"\0"):
                raise UsageError(
                    f"{path}: has its end mark at byte {end}, but more follows: two tars in one "
                    "file? take them apart"
                )


def _cut_short(path: Path, position: int, size: int) -> UsageError:
    return UsageError(
        f"{path}: damaged or cut short at byte {position} of {size}: which videos came after "
        "cannot be told: get it again"
    )
