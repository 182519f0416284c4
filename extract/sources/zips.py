"""Zip archives of frame folders -> clips; the frames are read where they lie.

    NAME.zip, or pieces of it in order, as `split` makes them: NAME.zip.part000, NAME.zip.part001,
    ...; NAME.zip.000 or .001 on are taken too. Nothing is joined on disk.

    entries' data ... | directory: one record an entry | end record (zip64: 3) | comment

Only the directory of an archive is read to find its clips, once and in order; a clip keeps the
places of its part of it. Our own reader, because `zipfile` keeps an object of some 600 bytes for
every entry: Kinetics as frames has 136 million. Sizes are checked before a frame is unpacked, and
never more is unpacked than the archive says.
"""

import logging
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ...shards.errors import ClipError, DeltatokError, UsageError
from ...shards.files import open_regular
from .clip import (
    FRAME_NAME,
    VIDEO_SUFFIXES,
    WANTED_FRAMES,
    ClipCandidate,
    Stamp,
    ZipFolder,
    check_member,
    frame_seconds,
    warn_whole_numbers,
)

logger = logging.getLogger(__name__)

PART_NAME = re.compile(r"(?P<archive>.+\.zip)\.(?:part)?(?P<number>[0-9]{2,6})", re.IGNORECASE)

MAX_FRAME_BYTES = 64 * 2**20
"""A frame as a file; an uncompressed 4K frame has 25 MB (a guess)."""

MAX_RATIO = 100
"""Unpacked over packed bytes of a frame, where it is larger than 1 MiB: photographs do not get
smaller in a zip; archives made to fill a disk reach 1000 (a guess)."""

MAX_RUNS = 1000
"""Parts of the directory a clip may be spread over before all between them counts as its part too
(the part is then read and the entries of other clips passed over)."""

_END = struct.Struct("<4s4H2IH")
_LOCATOR64 = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_RECORD = struct.Struct("<4s6H3I5H2I")
_MAX_COMMENT = 65535
_MAX_RECORD = _RECORD.size + 3 * 65535
_FULL = 0xFFFFFFFF
_BLOCK_BYTES = 4 * 2**20
_STORED, _DEFLATED = 0, 8
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


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

    def __enter__(self) -> "ZipParts":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class BadZip(DeltatokError):
    """The archive cannot be read as a zip; the text says why."""


@dataclass(frozen=True)
class Directory:
    """Where the list of entries lies in the archive."""

    offset: int
    size: int
    num_entries: int


class ZipEntry(NamedTuple):  # made 136 million times: a third of what a dataclass takes
    """One entry as the directory describes it."""

    name: bytes
    encrypted: bool
    method: int
    """0 stored, 8 deflated."""
    crc32: int
    stored_bytes: int
    """In the archive."""
    size_bytes: int
    """Unpacked."""
    header_offset: int
    record_offset: int
    """Of its record in the archive."""
    record_bytes: int


def find_directory(parts: ZipParts) -> Directory:
    """Where the directory lies; BadZip for an archive that is cut short or was changed."""
    tail_bytes = min(parts.size, _END.size + _MAX_COMMENT)
    tail_start = parts.size - tail_bytes
    tail = parts.pread(tail_bytes, tail_start)
    found = tail.rfind(b"PK\5\6")
    if found < 0 or len(tail) - found < _END.size:
        raise BadZip("no directory at its end: it is cut short, lacks its last part, or is no zip")
    end_offset = tail_start + found
    _, disk, first_disk, here, total, size, offset, _ = _END.unpack_from(tail, found)
    locator = parts.pread(_LOCATOR64.size, max(0, end_offset - _LOCATOR64.size))
    if len(locator) == _LOCATOR64.size and locator.startswith(b"PK\6\7"):
        end_offset = _LOCATOR64.unpack(locator)[2]
        end64 = parts.pread(_END64.size, end_offset)
        if len(end64) < _END64.size or not end64.startswith(b"PK\6\6"):
            raise BadZip("its zip64 end record is not where it should be: a part is missing")
        _, _, _, _, disk, first_disk, here, total, size, offset = _END64.unpack(end64)
    if disk or first_disk or here != total:
        raise BadZip("a multi-volume zip (zip -s): join it with `zip -s 0 IN --out OUT`")
    if offset + size != end_offset:
        raise BadZip(
            f"its directory of {size} bytes should lie at {offset}, but ends at {end_offset}: a "
            "part is missing, or something was added before the archive"
        )
    return Directory(offset, size, total)


def read_entries(parts: ZipParts, offset: int, size: int) -> Iterator[ZipEntry]:
    """The entries listed in these bytes of the directory, in order; BadZip where they are not
    whole records."""
    data, start, end = b"", offset, offset + size
    position = 0
    while start + position < end:
        if len(data) - position < _MAX_RECORD and start + len(data) < end:
            start, position = start + position, 0
            data = parts.pread(min(_BLOCK_BYTES, end - start), start)
        try:
            (signature, _, _, flags, method, _, _, crc, stored, size_bytes, *lengths) = (
                _RECORD.unpack_from(data, position)
            )
        except struct.error as error:
            raise BadZip(f"its directory ends within an entry, at byte {start}") from error
        name_bytes, extra_bytes, comment_bytes, _, _, _, header = lengths
        length = _RECORD.size + name_bytes + extra_bytes + comment_bytes
        if signature != b"PK\1\2" or position + length > len(data):
            raise BadZip(f"its directory is damaged at byte {start + position}")
        name_end = position + _RECORD.size + name_bytes
        if _FULL in (stored, size_bytes, header):
            extra = data[name_end : name_end + extra_bytes]
            size_bytes, stored, header = _zip64(extra, size_bytes, stored, header)
        yield ZipEntry(
            data[position + _RECORD.size : name_end],
            bool(flags & 1),
            method,
            crc,
            stored,
            size_bytes,
            header,
            start + position,
            length,
        )
        position += length


def entry_name(raw: bytes) -> str:
    """A name in the archive as text: UTF-8, or where it is none code page 437 as zip has it."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("cp437")


def _zip64(extra: bytes, *values: int) -> list[int]:
    """`values` (size, stored size, header offset) with those that are full read from `extra`."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        field = extra[position + 4 : position + 4 + length]
        if kind == 1:
            full = values.count(_FULL)
            if len(field) < 8 * full:
                break
            wide = iter(struct.unpack_from(f"<{full}Q", field))
            return [next(wide) if value == _FULL else value for value in values]
        position += 4 + length
    raise BadZip("an entry says zip64 and has no such field")


class ZipImages:
    """The frames of one folder of an archive."""

    def __init__(self, parts: ZipParts, source: ZipFolder) -> None:
        """BadZip where its part of the directory is not as it was."""
        self._parts = parts
        self._entries: dict[str, ZipEntry] = {}
        for offset, size in source.runs:
            for entry in read_entries(parts, offset, size):
                folder, _, name = entry_name(entry.name).rpartition("/")
                if folder == source.folder and frame_seconds(name) is not None:
                    if name in self._entries:
                        raise ClipError(f"{name} is twice in the archive", stage="open")
                    self._entries[name] = entry

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    @property
    def size_bytes(self) -> int:
        """Of all frames together, as they are stored."""
        return sum(entry.stored_bytes for entry in self._entries.values())

    def read(self, name: str) -> bytes:
        entry = self._entries[name]
        _check_entry(name, entry)
        header = self._parts.pread(_LOCAL_HEADER.size + len(entry.name), entry.header_offset)
        # The name is there a second time: a damaged directory gives no frame of another clip.
        if not (header.startswith(b"PK\3\4") and header[_LOCAL_HEADER.size :] == entry.name):
            raise _damaged(name, "does not lie where the archive says")
        *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(header)
        start = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        stored = self._parts.pread(entry.stored_bytes, start)
        if len(stored) < entry.stored_bytes:
            raise _damaged(name, "is cut short")
        data = stored if entry.method == _STORED else _inflate(name, stored, entry.size_bytes)
        if len(data) != entry.size_bytes or zlib.crc32(data) != entry.crc32:
            raise _damaged(name, "is not what its checksum says")
        return data


def _check_entry(name: str, entry: ZipEntry) -> None:
    if entry.encrypted or entry.method not in (_STORED, _DEFLATED):
        raise _damaged(name, f"is encrypted or compressed in another way ({entry.method})")
    largest = max(entry.size_bytes, entry.stored_bytes)
    bomb = entry.size_bytes > max(2**20, MAX_RATIO * entry.stored_bytes)
    if largest > MAX_FRAME_BYTES or bomb:
        raise _damaged(
            name, f"would unpack from {entry.stored_bytes} to {entry.size_bytes} bytes, no frame"
        )


def _inflate(name: str, stored: bytes, size: int) -> bytes:
    try:
        return zlib.decompressobj(-15).decompress(stored, size + 1)
    except zlib.error as error:
        raise _damaged(name, f"cannot be unpacked ({error})") from error


def _damaged(name: str, what: str) -> ClipError:
    return ClipError(f"{name} {what}", stage="decode")


@dataclass
class _Folder:
    """What is known of one folder of the archive so far."""

    stored_bytes: int = 0
    has_seconds: bool = False
    """One of its names has a decimal point."""
    runs: list[tuple[int, int]] = field(default_factory=list)
    """(first byte, end)"""


def find_in_zip(archive: Path) -> Iterator[ClipCandidate]:
    """The frame folders of the archive.

    Raises UsageError for an archive that is cut short, lacks a part, or has an entry whose name
    leads out of the archive.
    """
    try:
        with ZipParts(archive) as parts:
            folders, num_videos = _read_folders(parts, archive)
            stamp = parts.stamp
    except OSError as error:
        raise UsageError(f"{archive}: cannot be read ({error.strerror}): check it") from error
    except BadZip as error:
        raise UsageError(f"{archive}: {error}: get it again, and all parts of it") from error
    if num_videos:
        logger.warning(
            "%s: %d videos in it are not read: from a zip only %s are; unpack it, or make a tar",
            archive,
            num_videos,
            WANTED_FRAMES,
        )
    for raw in sorted(folders):
        folder, name = folders[raw], entry_name(raw)
        if not folder.has_seconds:
            warn_whole_numbers(f"{archive}: {name}")
            continue
        source = ZipFolder(folder=name, runs=_joined(folder.runs), stamp=stamp)
        yield ClipCandidate(_without_dots(name), archive, source, size_bytes=folder.stored_bytes)


def _read_folders(parts: ZipParts, archive: Path) -> tuple[dict[bytes, _Folder], int]:
    """Every folder that has frames, and how many videos there are beside them."""
    directory = find_directory(parts)
    folders: dict[bytes, _Folder] = {}
    num_entries = num_videos = 0
    current, folder = b"", _Folder()
    for entry in read_entries(parts, directory.offset, directory.size):
        num_entries += 1
        parent, _, name = entry.name.rpartition(b"/")
        match = FRAME_NAME.fullmatch(name)
        if match is None or name.startswith(b"."):
            num_videos += PurePosixPath(entry_name(name)).suffix.lower() in VIDEO_SUFFIXES
            check_member(entry_name(entry.name), archive)
            continue
        if parent != current or num_entries == 1:
            check_member(entry_name(entry.name), archive)
            current, folder = parent, folders.setdefault(parent, _Folder())
        folder.stored_bytes += entry.stored_bytes
        folder.has_seconds = folder.has_seconds or match[2] is not None
        start, end = entry.record_offset, entry.record_offset + entry.record_bytes
        if folder.runs and folder.runs[-1][1] == start:
            start = folder.runs.pop()[0]
        folder.runs.append((start, end))
    if num_entries != directory.num_entries:
        raise BadZip(f"lists {num_entries} entries, its end says {directory.num_entries}")
    return folders, num_videos


def _joined(runs: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """(first byte, bytes)"""
    if len(runs) > MAX_RUNS:
        runs = [(runs[0][0], runs[-1][1])]
    return tuple((start, end - start) for start, end in runs)


def _without_dots(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))
