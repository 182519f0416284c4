"""Where the members of a delta-token tar lie: positions in the file, nothing unpacked.

    512 bytes   header of BBBBBB.timestamps.npy: name, size, checksum, "ustar"
    ...         its bytes, filled up to a multiple of 512
    512 bytes   header of BBBBBB.tokens.npy
    ...
    1024 bytes  of zeros: the end

Members of an uncompressed tar are contiguous, so an array in one can be mapped in place. Only
regular files with the names above are let through: no links, folders, extended headers, paths.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .checked import shown
from .errors import DamagedShard
from .opening import ADVICE

BLOCK_BYTES = 512
MEMBER_NAME = re.compile(r"([0-9]{6,9})\.(tokens\.npy|timestamps\.npy|windows\.json)")

_ZEROS = bytes(BLOCK_BYTES)
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
    b"L": "a long-name header",
    b"K": "a long-link header",
    b"g": "an extended header",
    b"x": "an extended header",
}


@dataclass(frozen=True)
class TarMember:
    """One regular file in a tar."""

    name: str
    offset: int
    """Where its bytes start in the tar."""
    size: int


def read_members(path: Path) -> list[TarMember]:
    """The members of a delta-token tar, in file order.

    Raises DamagedShard for anything but regular files of our names that lie within the file, each
    once, followed by the end mark.
    """
    members: dict[str, TarMember] = {}
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DamagedShard(f"{path}: cannot be opened ({error.strerror}): {ADVICE}") from error
    try:
        file_size = os.fstat(descriptor).st_size
        position = 0
        while True:
            header = os.pread(descriptor, BLOCK_BYTES, position)
            where = f"{path}: byte {position}"
            if len(header) < BLOCK_BYTES:
                raise DamagedShard(f"{where}: the tar ends without its end mark: {ADVICE}")
            if header == _ZEROS:
                if os.pread(descriptor, BLOCK_BYTES, position + BLOCK_BYTES) != _ZEROS:
                    raise DamagedShard(f"{where}: half an end mark: {ADVICE}")
                return list(members.values())
            name, size = _parse_header(header, where=where)
            offset = position + BLOCK_BYTES
            if offset + size > file_size:
                raise DamagedShard(
                    f"{where}: member {name!r} of {size} bytes does not fit into the file of "
                    f"{file_size}: {ADVICE}"
                )
            if name in members:
                raise DamagedShard(f"{where}: member {name!r} a second time: {ADVICE}")
            members[name] = TarMember(name=name, offset=offset, size=size)
            position = offset + -(-size // BLOCK_BYTES) * BLOCK_BYTES
    except OSError as error:
        raise DamagedShard(f"{path}: cannot be read ({error.strerror}): {ADVICE}") from error
    finally:
        os.close(descriptor)


def _parse_header(header: bytes, *, where: str) -> tuple[str, int]:
    """The name and size in a 512-byte ustar header (POSIX.1-1988)."""
    checksum = _octal(header[148:156], "checksum", where=where)
    if checksum != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise DamagedShard(f"{where}: a tar header with a wrong checksum: {ADVICE}")
    if header[257:263] != b"ustar\0":
        raise DamagedShard(f"{where}: {shown(header[257:265])}, wanted a ustar header: {ADVICE}")
    kind = header[156:157]
    raw = header[:100].rstrip(b"\0")
    prefix = header[345:500].rstrip(b"\0")
    name = (prefix + b"/" + raw if prefix else raw).decode("latin-1")
    if kind not in (b"0", b"\0"):
        what = _TYPES.get(kind, f"of type {shown(kind)}")
        raise DamagedShard(f"{where}: member {shown(name)} is {what}, wanted regular files")
    if name.startswith("/") or ".." in name.split("/"):
        raise DamagedShard(f"{where}: member {shown(name)} would leave the folder it is read in")
    if not MEMBER_NAME.fullmatch(name):
        raise DamagedShard(
            f"{where}: member {shown(name)}, wanted NNNNNN.tokens.npy, NNNNNN.timestamps.npy "
            "or NNNNNN.windows.json"
        )
    return name, _octal(header[124:136], "size", where=where)


def _octal(field: bytes, what: str, *, where: str) -> int:
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise DamagedShard(f"{where}: {what} {shown(field)} in a tar header, wanted octal digits")
    return int(match[1], 8)
