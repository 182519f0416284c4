"""Zip archives of videos and of frame folders -> clips, which are read where they lie.

    NAME.mp4, NAME.json, NAME.cls      a video and what is known of it, as in tars
    CLIP/<anything>_<seconds>.jpg      the frames of a clip

    entries' data ... | directory: one record an entry | end record (zip64: 3) | comment

Only the directory of an archive is read to find its clips, once and in order; a clip keeps the
places of its part of it. Our own reader, because `zipfile` keeps an object of some 600 bytes for
every entry: Kinetics as frames has 136 million. A stored video is decoded in place, a deflated one
from a temporary file without a name. Sizes are checked before anything is unpacked, never more is
unpacked than the archive says, and nothing is used that is not what its checksum says.
"""

import logging
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ...shards.errors import ClipError, DeltatokError, UsageError
from .archive import ArchiveFile, FileSlice
from .clip import (
    FRAME_NAME,
    VIDEO_SUFFIXES,
    ClipCandidate,
    ClipSource,
    SampleMetadata,
    Unreadable,
    ZipFolder,
    ZipVideo,
    check_member,
    frame_seconds,
    warn_whole_numbers,
)

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 * 2**20
"""A frame as a file; an uncompressed 4K frame has 25 MB (a guess)."""

MAX_VIDEO_BYTES = 4 * 2**30
"""A deflated video, unpacked: so much room a decoding process may take on the disk for temporary
files (a guess). Stored ones are not unpacked."""

MAX_RATIO = 100
"""Unpacked over packed bytes, above 1 MiB: photographs and videos do not get smaller in a zip;
archives made to fill a disk reach 1000 (a guess)."""

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
_PACKED_BYTES = 2**16
"""Unpacked at once: at most 64 MiB come out."""
_STORED, _DEFLATED = 0, 8
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class BadZip(DeltatokError):
    """The archive cannot be read as a zip; the text says why."""


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

    @property
    def end(self) -> int:
        """Of its data in the archive, at the least."""
        return self.header_offset + _LOCAL_HEADER.size + len(self.name) + self.stored_bytes


def find_directory(archive: ArchiveFile) -> tuple[int, int, int]:
    """First byte, bytes and entries of the directory; BadZip for an archive that is cut short or
    was changed."""
    tail_bytes = min(archive.size, _END.size + _MAX_COMMENT)
    tail_start = archive.size - tail_bytes
    tail = archive.pread(tail_bytes, tail_start)
    found = tail.rfind(b"PK\5\6")
    if found < 0 or len(tail) - found < _END.size:
        raise BadZip("no directory at its end: it is cut short, lacks its last part, or is no zip")
    end_offset = tail_start + found
    _, disk, first_disk, here, total, size, offset, _ = _END.unpack_from(tail, found)
    locator = archive.pread(_LOCATOR64.size, max(0, end_offset - _LOCATOR64.size))
    if len(locator) == _LOCATOR64.size and locator.startswith(b"PK\6\7"):
        end_offset = _LOCATOR64.unpack(locator)[2]
        end64 = archive.pread(_END64.size, end_offset)
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
    return offset, size, total


def read_entries(archive: ArchiveFile, offset: int, size: int) -> Iterator[ZipEntry]:
    """The entries listed in these bytes of the directory, in order; BadZip where they are not
    whole records."""
    data, start, end = b"", offset, offset + size
    position = 0
    while start + position < end:
        if len(data) - position < _MAX_RECORD and start + len(data) < end:
            start, position = start + position, 0
            data = archive.pread(min(_BLOCK_BYTES, end - start), start)
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

    def __init__(self, archive: ArchiveFile, source: ZipFolder) -> None:
        """BadZip where its part of the directory is not as it was."""
        self._archive = archive
        self._entries: dict[str, ZipEntry] = {}
        for offset, size in source.runs:
            for entry in read_entries(archive, offset, size):
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
        _check_size(name, entry, max_bytes=MAX_FRAME_BYTES, what="frame")
        return b"".join(_unpack(self._archive, name, entry, _data_start(self._archive, entry)))


@contextmanager
def opened_video(path: Path, archive: ArchiveFile, source: ZipVideo) -> Iterator[FileSlice]:
    """A video of the archive at `path`, whole and checked.

    Raises BadZip where its part of the directory is not as it was, ClipError where the video is
    damaged, encrypted or too large, OSError where there is no room to unpack it.
    """
    (entry,) = read_entries(archive, *source.record)
    name = PurePosixPath(entry_name(entry.name)).name
    start = _data_start(archive, entry)
    if entry.method == _STORED:
        for _ in _unpack(archive, name, entry, start):
            pass  # held against its checksum
        yield FileSlice(path, start, entry.size_bytes)
        return
    _check_size(name, entry, max_bytes=MAX_VIDEO_BYTES, what="video")
    with tempfile.TemporaryFile() as file:  # without a name: nothing of it outlives a kill
        file.writelines(_unpack(archive, name, entry, start))
        file.flush()
        yield FileSlice(Path(f"/dev/fd/{file.fileno()}"), 0, entry.size_bytes)


def _check_size(name: str, entry: ZipEntry, *, max_bytes: int, what: str) -> None:
    bomb = entry.size_bytes > max(2**20, MAX_RATIO * entry.stored_bytes)
    if bomb or max(entry.size_bytes, entry.stored_bytes) > max_bytes:
        raise _damaged(
            name, f"would unpack from {entry.stored_bytes} to {entry.size_bytes} bytes, no {what}"
        )


def _data_start(archive: ArchiveFile, entry: ZipEntry) -> int:
    """Where its stored bytes begin; ClipError unless they are there and can be read."""
    name = PurePosixPath(entry_name(entry.name)).name
    if entry.encrypted or entry.method not in (_STORED, _DEFLATED):
        raise _damaged(name, f"is encrypted or compressed in another way ({entry.method})")
    header = archive.pread(_LOCAL_HEADER.size + len(entry.name), entry.header_offset)
    # The name is there a second time: a damaged directory gives no bytes of another clip.
    if not (header.startswith(b"PK\3\4") and header[_LOCAL_HEADER.size :] == entry.name):
        raise _damaged(name, "does not lie where the archive says")
    *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(header)
    return int(entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes)


def _unpack(archive: ArchiveFile, name: str, entry: ZipEntry, start: int) -> Iterator[bytes]:
    """The content of an entry in pieces; ClipError as soon as it is not what the archive says."""
    inflate = zlib.decompressobj(-15)
    size = crc = 0
    for position in range(start, start + entry.stored_bytes, _PACKED_BYTES):
        left = min(_PACKED_BYTES, start + entry.stored_bytes - position)
        data = archive.pread(left, position)
        if len(data) < left:
            raise _damaged(name, "is cut short")
        try:
            data = data if entry.method == _STORED else inflate.decompress(data)
        except zlib.error as error:
            raise _damaged(name, f"cannot be unpacked ({error})") from error
        size, crc = size + len(data), zlib.crc32(data, crc)
        if size > entry.size_bytes:
            break
        yield data
    if size != entry.size_bytes or crc != entry.crc32:
        raise _damaged(name, "is not what its checksum says")


def _damaged(name: str, what: str) -> ClipError:
    return ClipError(f"{name} {what}", stage="decode")


def _overlapping(entries: Iterable[ZipEntry]) -> Iterator[tuple[ZipEntry, ZipEntry]]:
    """Pairs of entries that share bytes of the archive, as only those made to do harm do; every
    entry that does is the first of a pair."""
    last: ZipEntry | None = None
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if last is not None and entry.header_offset < last.end:
            yield entry, last
            yield last, entry
        if last is None or entry.end > last.end:
            last = entry


def _overlaps(entry: ZipEntry, other: ZipEntry) -> str:
    return f"{entry_name(entry.name)} shares bytes of the archive with {entry_name(other.name)}"


@dataclass
class _Folder:
    """What is known of one folder of the archive so far."""

    stored_bytes: int = 0
    has_seconds: bool = False
    """One of its names has a decimal point."""
    runs: list[tuple[int, int]] = field(default_factory=list)
    """(first byte, end)"""


def find_in_zip(path: Path) -> Iterator[ClipCandidate]:
    """The videos of the archive, with their class and split where it names them, and its frame
    folders.

    Raises UsageError for an archive that is cut short, lacks a part, or has an entry whose name
    leads out of the archive.
    """
    try:
        with ArchiveFile(path) as archive:
            folders, videos, metadata = _read_directory(archive, path)
            stamp = archive.stamp
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}): check it") from error
    except BadZip as error:
        raise UsageError(f"{path}: {error}: get it again, and all parts of it") from error
    overlapping = {entry: _overlaps(entry, other) for entry, other in _overlapping(videos)}
    clips = []
    for entry in videos:
        name = _without_dots(entry_name(entry.name))
        source: ClipSource = ZipVideo((entry.record_offset, entry.record_bytes), stamp)
        if entry in overlapping:
            source = Unreadable(overlapping[entry])
        clips.append(ClipCandidate(name, path, source, size_bytes=entry.size_bytes))
    yield from metadata.add_to(clips)
    for raw in sorted(folders):
        folder, name = folders[raw], entry_name(raw)
        if not folder.has_seconds:
            warn_whole_numbers(f"{path}: {name}")
            continue
        frames = ZipFolder(folder=name, runs=_joined(folder.runs), stamp=stamp)
        yield ClipCandidate(_without_dots(name), path, frames, size_bytes=folder.stored_bytes)


def _read_directory(
    archive: ArchiveFile, path: Path
) -> tuple[dict[bytes, _Folder], list[ZipEntry], SampleMetadata]:
    """Every folder that has frames, every video, and what other entries say of the videos."""
    offset, size, num_listed = find_directory(archive)
    folders: dict[bytes, _Folder] = {}
    videos: list[ZipEntry] = []
    about: list[ZipEntry] = []
    num_entries = 0
    current, folder = b"", _Folder()
    for entry in read_entries(archive, offset, size):
        num_entries += 1
        parent, _, name = entry.name.rpartition(b"/")
        match = FRAME_NAME.fullmatch(name)
        if match is None or name.startswith(b"."):
            check_member(entry_name(entry.name), path)
            suffix = PurePosixPath(entry_name(name)).suffix.lower()
            if suffix in VIDEO_SUFFIXES and not name.startswith(b"."):
                videos.append(entry)
            elif suffix in SampleMetadata.SUFFIXES:
                about.append(entry)
            continue
        if parent != current or num_entries == 1:
            check_member(entry_name(entry.name), path)
            current, folder = parent, folders.setdefault(parent, _Folder())
        folder.stored_bytes += entry.stored_bytes
        folder.has_seconds = folder.has_seconds or match[2] is not None
        start, end = entry.record_offset, entry.record_offset + entry.record_bytes
        if folder.runs and folder.runs[-1][1] == start:
            start = folder.runs.pop()[0]
        folder.runs.append((start, end))
    if num_entries != num_listed:
        raise BadZip(f"lists {num_entries} entries, its end says {num_listed}")
    metadata = SampleMetadata(path)
    for entry in about if videos else []:
        metadata.read(_without_dots(entry_name(entry.name)), _content(archive, entry))
    return folders, videos, metadata


def _content(archive: ArchiveFile, entry: ZipEntry) -> bytes | None:
    """Of a small entry; None where it cannot be had."""
    name = entry_name(entry.name)
    try:
        _check_size(name, entry, max_bytes=SampleMetadata.MAX_BYTES, what="metadata")
        return b"".join(_unpack(archive, name, entry, _data_start(archive, entry)))
    except ClipError:
        return None


def _joined(runs: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """(first byte, bytes)"""
    if len(runs) > MAX_RUNS:
        runs = [(runs[0][0], runs[-1][1])]
    return tuple((start, end - start) for start, end in runs)


def _without_dots(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))
