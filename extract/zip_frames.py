"""The frames of one clip in a zip archive. Called by opened_clip.py in a decoding process.

Sizes are checked before anything is unpacked, and never more is unpacked than the archive says.
"""

import struct
import zlib

from .clips import ZipFolder
from .frame_names import frame_seconds
from .unusable import UnusableClip
from .zip_directory import ZipEntry, entry_name, read_entries
from .zip_parts import ZipParts

MAX_FRAME_BYTES = 64 * 2**20
"""A frame as a file; an uncompressed 4K frame has 25 MB (a guess)."""

MAX_RATIO = 100
"""Unpacked over packed bytes of a frame, where it is larger than 1 MiB: photographs do not get
smaller in a zip; archives made to fill a disk reach 1000 (a guess)."""

_STORED, _DEFLATED = 0, 8
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


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
                        raise UnusableClip(f"{name} is twice in the archive", stage="open")
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


def _damaged(name: str, what: str) -> UnusableClip:
    return UnusableClip(f"{name} {what}", stage="decode")
