"""The zip file that a patch-token shard is: how it is written, and where its members lie.

    header, padding, data    of every member in turn, without gaps: the zarr.json files and small
                             arrays first, `tokens/c/0/0/0/0` last; each member stored as it is
    central directory        46 bytes and the name, a member
    zip64 end, locator       where the central directory begins beyond 2 GiB
    end of the directory     22 bytes, the last ones of the file

Written with the standard library's zipfile. Read strictly: the same members as were written, each
once, stored, one after the other from the first byte of the file to the central directory; headers
that say what the directory says; nothing before, between or behind. So the file has one meaning,
for this reader and any other.
"""

import stat
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DamagedShard, damaged_shard
from ..files import ReadOnlyFile
from ..schema import MAX_JSON_BYTES, shown

MODE = stat.S_IFREG | 0o644
ALIGNMENT = 64
"""Divides the byte that every member's data begins at: so does the size of any number in it."""
PAGE = 4096
"""The same for the tokens, so that they can be mapped, and read without the page cache."""

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_FIELD = struct.Struct("<2H")
_LOCAL_SIGNATURE, _CENTRAL_SIGNATURE, _END_SIGNATURE = b"PK\3\4", b"PK\1\2", b"PK\5\6"
_LOCATOR_SIGNATURE, _END64_SIGNATURE = b"PK\6\7", b"PK\6\6"
_ZIP64_FIELD, _PADDING_FIELD = 1, 0xD935
"""Extra fields: sizes and places of 8 bytes; padding, as Android's zipalign writes it."""
_LOCAL_FIELDS: tuple[list[int], ...] = (
    [],
    [_PADDING_FIELD],
    [_ZIP64_FIELD],
    [_PADDING_FIELD, _ZIP64_FIELD],
)
_BEYOND_16, _BEYOND_32 = 0xFFFF, 0xFFFFFFFF
_NO_FLAGS, _ZIP64_VERSION = 0, 45

_TAIL_BYTES = 65_536
"""Of the end of the file, read at once: the central directory and, of up to 4,000 frames, the index
of the tokens."""
_MAX_DIRECTORY_BYTES = 16_384
_SMALL_BYTES = 2**18
"""Members up to the first larger one are read at once."""


def write_archive(file: BinaryIO, members: Iterable[tuple[str, Any]], *, last: str) -> None:
    """Writes the zip of these members, (name, bytes-like), into `file`, new and seekable. The data
    of the member `last` begins at a multiple of PAGE. Same members, same bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name)  # of 1980-01-01
            info.create_system, info.external_attr = 3, MODE << 16
            is_large = memoryview(data).nbytes > zipfile.ZIP64_LIMIT
            start = file.tell() + _LOCAL.size + len(name) + is_large * 20
            info.extra = _padding(start, PAGE if name == last else ALIGNMENT)
            with archive.open(info, "w", force_zip64=is_large) as target:
                target.write(data)
            info.extra = b""  # the central directory needs none


def _padding(start: int, alignment: int) -> bytes:
    """The extra field that moves data from byte `start` to the next multiple of `alignment`."""
    gap = -start % alignment
    if not gap:
        return b""
    gap += alignment if gap < struct.calcsize("<3H") else 0
    return struct.pack("<3H", _PADDING_FIELD, gap - 4, alignment).ljust(gap, b"\0")


@dataclass(frozen=True)
class Member:
    """A member as the central directory tells of it; places are bytes of the file."""

    name: str
    header_at: int
    offset: int
    """Where its data begins."""
    size: int
    crc: int
    """crc32 of its data."""
    common: tuple[int, ...]
    """What its own header has to say as well: flags, method, time, date, crc32."""


class ShardFile:
    """The zip of a patch-token shard, opened. Two or three reads show where all is, and bring the
    small members along."""

    def __init__(self, path: Path, names: Collection[str]) -> None:
        """names: the members that have to be there. Raises DamagedShard for any other file."""
        self.path = path
        self._file = ReadOnlyFile(path)
        self._pieces: list[tuple[int, bytes]] = []
        size = self._file.size()
        tail = max(0, size - _TAIL_BYTES)
        self._keep(tail, size)
        members = self._directory(size)
        self.members: dict[str, Member] = {member.name: member for member in members}
        """By name, in the order of the file."""
        if len(self.members) != len(members) or self.members.keys() != set(names):
            self._refuse_names(members, set(names))
        large = (member.offset for member in members if member.size > _SMALL_BYTES)
        self._keep(0, min(tail, next(large, tail)))
        for member in members:
            self._check_header(member)

    def read_member(self, name: str, *, size: int | None = None) -> bytes:
        """The data of a small member, held against its crc32; DamagedShard for other data, or
        another size than the one that is given."""
        member, where = self.members[name], f"{self.path}: {name}"
        if member.size != size if size is not None else member.size > MAX_JSON_BYTES:
            wanted = f"at most {MAX_JSON_BYTES}" if size is None else size
            raise damaged_shard(f"{where}: {member.size} bytes, wanted {wanted}")
        data = self.read(member.offset, member.size)
        if zlib.crc32(data) != member.crc:
            raise damaged_shard(f"{where}: wrong checksum, the file was changed or damaged")
        return data

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes of the file from `offset` on."""
        for start, data in self._pieces:
            if start <= offset and offset + size <= start + len(data):
                return data[offset - start : offset - start + size]
        return self._file.read(offset, size)

    def _keep(self, start: int, end: int) -> None:
        if end > start:
            self._pieces.append((start, self._file.read(start, end - start)))

    def _directory(self, size: int) -> list[Member]:
        """What the central directory tells, in the order of the file, which the members fill."""
        start, end, num_members = self._end_records(size)
        directory, at = self.read(start, end - start), 0
        entries = []
        while at < len(directory):
            entry, at = self._entry(directory, at)
            entries.append(entry)
        if at != len(directory) or len(entries) != num_members or not entries:
            raise self._error(
                f"{len(entries)} members in {at} bytes, its end says {num_members} in "
                f"{len(directory)}"
            )
        entries.sort(key=lambda entry: entry.header_at)
        members: list[Member] = []
        for entry, end in zip(entries, [*(e.header_at for e in entries[1:]), start], strict=True):
            offset = end - entry.size
            room = offset - entry.header_at - _LOCAL.size - len(entry.name)
            if not 0 <= room <= _BEYOND_16 or (not members and entry.header_at != 0):
                raise self._error(
                    f"member {shown(entry.name)} of {entry.size} bytes does not fill the place "
                    f"from byte {entry.header_at} to {end}"
                )
            members.append(replace(entry, offset=offset))
        return members

    def _end_records(self, size: int) -> tuple[int, int, int]:
        """Where the central directory starts and ends, and how many members it says there are."""
        data = self.read(max(0, size - _END.size), min(size, _END.size))
        if len(data) < _END.size or data[:4] != _END_SIGNATURE:
            raise self._error("no end of a zip in its last 22 bytes: it was cut off or added to")
        _, disk, first_disk, here, count, num_bytes, start, comment = _END.unpack(data)
        end, disks = size - _END.size, (disk, first_disk, here - count, comment)
        locator_at = end - _LOCATOR.size
        if locator_at >= _END64.size and self.read(locator_at, 4) == _LOCATOR_SIGNATURE:
            end = locator_at - _END64.size
            if self.read(locator_at, _LOCATOR.size) != _LOCATOR.pack(_LOCATOR_SIGNATURE, 0, end, 1):
                raise self._error("its zip64 locator does not name the record before it")
            short = (count, num_bytes, start)
            signature, length, _, _, *wide_disks, here, count, num_bytes, start = _END64.unpack(
                self.read(end, _END64.size)
            )
            wide = (min(count, _BEYOND_16), min(num_bytes, _BEYOND_32), min(start, _BEYOND_32))
            disks = (*disks, *wide_disks, here - count)
            if (signature, length, short) != (_END64_SIGNATURE, _END64.size - 12, wide):
                raise self._error("its zip64 end is not what its end says")
        if any(disks):
            raise self._error("is a part of several, or has a comment")
        if num_bytes > _MAX_DIRECTORY_BYTES or start + num_bytes != end:
            raise self._error(
                f"a central directory of {num_bytes} bytes at byte {start}, wanted at most "
                f"{_MAX_DIRECTORY_BYTES}, up to byte {end}"
            )
        return start, end, count

    def _entry(self, directory: bytes, at: int) -> tuple[Member, int]:
        """The entry at byte `at` of the central directory, its offset not known yet; and where the
        next one starts."""
        fields = directory[at : at + _CENTRAL.size]
        if len(fields) < _CENTRAL.size or fields[:4] != _CENTRAL_SIGNATURE:
            raise self._error("its central directory is damaged")
        _, _, version, *common, crc, stored, size, name_bytes, extra_bytes, comment = (
            _CENTRAL.unpack(fields)[:13]
        )
        disk, _, attributes, header_at = _CENTRAL.unpack(fields)[13:]
        end_of_name = at + _CENTRAL.size + name_bytes
        name = directory[at + _CENTRAL.size : end_of_name].decode("latin-1")
        extra = directory[end_of_name : end_of_name + extra_bytes]
        where = f"member {shown(name)}"
        if common[:2] != [_NO_FLAGS, zipfile.ZIP_STORED] or version > _ZIP64_VERSION:
            raise self._error(
                f"{where} has method {common[1]} and flags {common[0]:#x}, wanted 0 and 0: stored "
                "as it is, its sizes before it"
            )
        if stat.S_IFMT(attributes >> 16) not in (0, stat.S_IFREG) or disk or comment:
            raise self._error(f"{where} is no plain file")
        wide = [value for value in (size, stored, header_at) if value == _BEYOND_32]
        if wide:
            if extra[:4] != _FIELD.pack(_ZIP64_FIELD, 8 * len(wide)):
                raise self._error(f"{where} has no zip64 field")
            values = iter(struct.unpack_from(f"<{len(wide)}Q", extra.ljust(4 + 24, b"\0"), 4))
            size, stored, header_at = (
                next(values) if value == _BEYOND_32 else value
                for value in (size, stored, header_at)
            )
        if len(extra) != (4 + 8 * len(wide) if wide else 0) or stored != size:
            raise self._error(f"{where} has {stored} bytes for {size}, or unknown fields")
        member = Member(name, header_at, -1, size, crc, (*common, crc))
        return member, end_of_name + extra_bytes

    def _refuse_names(self, members: Sequence[Member], names: set[str]) -> None:
        found: set[str] = set()
        for member in members:
            if member.name in found or member.name not in names:
                what = "a second time" if member.name in found else "which no shard has"
                raise self._error(f"member {shown(member.name)}, {what}")
            found.add(member.name)
        raise self._error(f"no member {min(names - found)}")

    def _check_header(self, member: Member) -> None:
        """Raises DamagedShard unless the header before the data says what the directory says."""
        data = self.read(member.header_at, member.offset - member.header_at)
        signature, version, *common, stored, size, name_bytes, extra_bytes = _LOCAL.unpack_from(
            data
        )
        name, extra = data[_LOCAL.size :][:name_bytes], data[_LOCAL.size + name_bytes :]
        kinds = []
        while extra:
            kind, num_bytes = _FIELD.unpack(extra[:4].ljust(4, b"\xff"))
            kinds.append(kind)
            if kind == _ZIP64_FIELD and (size, stored) == (_BEYOND_32, _BEYOND_32):
                size, stored = struct.unpack("<2Q", extra[4:20].ljust(16, b"\0"))
            extra = extra[4 + num_bytes :]
        if (
            (signature, tuple(common)) != (_LOCAL_SIGNATURE, member.common)
            or (name.decode("latin-1"), size, stored) != (member.name, member.size, member.size)
            or len(data) != _LOCAL.size + name_bytes + extra_bytes
            or kinds not in _LOCAL_FIELDS
            or version > _ZIP64_VERSION
        ):
            raise self._error(
                f"the header of member {member.name} at byte {member.header_at} says something "
                "else than the central directory"
            )

    def _error(self, text: str) -> DamagedShard:
        return damaged_shard(f"{self.path}: {text}")
