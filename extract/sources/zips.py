"""The directory of a zip archive: where it lies, and the entries listed in it, read in one pass.

    entries' data ... | directory: one record an entry | end record (zip64: 3) | comment

Our own reader, because `zipfile` keeps an object of some 600 bytes for every entry: Kinetics as
frames has 136 million. Called by sources_zip.py (all of it) and zip_frames.py (one clip's part).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..shards.errors import DeltatokError
from .zip_parts import ZipParts

_END = struct.Struct("<4s4H2IH")
_LOCATOR64 = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_RECORD = struct.Struct("<4s6H3I5H2I")
_MAX_COMMENT = 65535
_MAX_RECORD = _RECORD.size + 3 * 65535
_FULL = 0xFFFFFFFF
_BLOCK_BYTES = 4 * 2**20


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
