"""Reads the arrays of a patch-token shard directly: metadata, checksums, small arrays whole, the
tokens frame by frame.

Zarr's own reader gives the same numbers (a test holds the two together) at several times the
cost a read, starts a thread that does not survive a fork, and takes a missing file for zeros.
This one reads exactly what `layout` draws, checks each checksum, and refuses the rest. Of the
tokens, many frames in one member, positions come from the member's index and bytes by preadv
straight into the caller's array.

zstd is the codec of that name of Zarr v3: one zstd frame a chunk, which says its size. numcodecs is
imported when the first chunk is compressed or decompressed: most caches are not.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DamagedShard, UsageError, damaged_shard
from ..files import ReadOnlyFile
from ..schema import STORED, load, parse_json, shown
from .archive import ShardFile
from .layout import only_chunk

COMPRESSIONS = ("none", "zstd")

LEVEL = 3
"""Zstandard's own default. Higher ones gain less than 1 % on features (a guess)."""

_MAGIC = b"\x28\xb5\x2f\xfd"
_CONTENT_SIZE_BYTES = (0, 2, 4, 8)
_DICTIONARY_ID_BYTES = (0, 1, 2, 4)


def check_compression(compression: str) -> None:
    """Raises UsageError unless it is one of COMPRESSIONS."""
    if compression not in COMPRESSIONS:
        raise UsageError(f"compression {compression!r}, wanted one of {', '.join(COMPRESSIONS)}")


def compress(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 (n,) -> uint8 (m,), one frame without a checksum (crc32c comes after it)."""
    return np.frombuffer(_codec().encode(data), dtype=np.uint8)


def decompress(data: NDArray[np.uint8], *, out: NDArray[np.uint8], where: str) -> None:
    """Fills `out`, uint8 (n,), C-contiguous; DamagedShard unless `data` is one frame of n bytes."""
    # The size is checked before anything is decompressed: a made-up one could ask for gigabytes.
    size = _content_size(data[:18].tobytes())
    if size != out.nbytes:
        raise DamagedShard(f"{where}: a zstd frame of {size} bytes, wanted {out.nbytes}")
    try:
        _codec().decode(data, out=out)
    except (RuntimeError, ValueError) as error:
        raise DamagedShard(f"{where}: cannot be decompressed ({error})") from error


def _content_size(header: bytes) -> int | None:
    """The size that a frame's header names (RFC 8878, 3.1.1.1), None where it names none."""
    if len(header) < 5 or header[:4] != _MAGIC:
        return None
    descriptor = header[4]
    flag, single_segment = descriptor >> 6, bool(descriptor & 0x20)
    width = _CONTENT_SIZE_BYTES[flag] or int(single_segment)
    start = 5 + (not single_segment) + _DICTIONARY_ID_BYTES[descriptor & 3]
    field = header[start : start + width]
    if not width or len(field) < width:
        return None
    return int.from_bytes(field, "little") + (256 if width == 2 else 0)


def _codec() -> Any:
    from numcodecs import Zstd

    return Zstd(level=LEVEL)


_DTYPES = {
    "<f2": "float16",
    "<u2": "uint16",
    "|i1": "int8",
    "<f4": "float32",
    "<i4": "int32",
    "|b1": "bool",
}
CRC_BYTES = 4


def read_array(
    shard: ShardFile, name: str, *, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """A whole array of one chunk; DamagedShard if it is not what is asked for."""
    check_metadata(shard, name, shape=shape, dtype=dtype, inner=None)
    member = only_chunk(name, len(shape))
    num_bytes = math.prod(shape) * dtype.itemsize
    data = np.frombuffer(shard.read_member(member, size=num_bytes + CRC_BYTES), dtype=np.uint8)
    numbers, where = data[:num_bytes], f"{shard.path}: {member}"
    check_crc(numbers, data[num_bytes:], where=where)
    if dtype == np.bool_ and (numbers > 1).any():
        raise damaged_shard(f"{where}: holds bytes that are neither true nor false")
    return numbers.view(dtype).reshape(shape).copy()


def read_attributes(shard: ShardFile) -> dict[str, Any]:
    """The attributes of the group."""
    value, where = _read_json(shard, "zarr.json")
    return load(_Group, value, where=where, how=STORED).attributes


def _read_json(shard: ShardFile, member: str) -> tuple[Any, str]:
    """The value, and what to call the member in messages."""
    where = f"{shard.path}: {member}"
    return parse_json(shard.read_member(member), where=where), where


@dataclass(frozen=True)
class _Group:
    """The part of a group's zarr.json that is ours."""

    attributes: dict[str, Any]


def check_metadata(
    shard: ShardFile,
    name: str,
    *,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    inner: tuple[int, ...] | None,
) -> str:
    """Holds an array's zarr.json against the layout there is; gives its compression.

    `inner`: shape of the chunks in a shard, None for an array of one chunk, never compressed."""
    metadata, where = _read_json(shard, f"{name}/zarr.json")
    if not isinstance(metadata, dict):
        raise damaged_shard(f"{where}: {shown(metadata)}, wanted a JSON object")
    codecs = _BYTES_AND_CRC if inner is None else _sharding(inner, _BYTES_AND_CRC)
    compression = "none"
    if inner is not None:
        compressed = _sharding(inner, [_BYTES_AND_CRC[0], {"name": "zstd"}, _BYTES_AND_CRC[1]])
        if _without_defaults(metadata.get("codecs")) == compressed:
            codecs, compression = compressed, "zstd"
    wanted = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": _DTYPES[dtype.str],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": codecs,
    }
    for field, value in wanted.items():
        got = metadata.get(field)
        if _without_defaults(got) != value:
            raise damaged_shard(
                f"{where}: {field} is {shown(got)}, wanted {shown(value)}: not the layout of "
                "format_version 1, or damaged"
            )
    if metadata.get("storage_transformers") not in (None, []):
        raise damaged_shard(f"{where}: has storage transformers, wanted none")
    return compression


_BYTES_AND_CRC: list[dict[str, Any]] = [{"name": "bytes"}, {"name": "crc32c"}]


def _sharding(inner: tuple[int, ...], codecs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The codecs of an array of one Zarr shard, without defaults."""
    configuration = {
        "chunk_shape": list(inner),
        "codecs": codecs,
        "index_codecs": _BYTES_AND_CRC,
        "index_location": "end",
    }
    return [{"name": "sharding_indexed", "configuration": configuration}]


def _without_defaults(value: Any) -> Any:
    """`value` without what does not matter or may be left out: empty configurations, the byte order
    of one byte, the level of zstd."""
    if isinstance(value, list):
        return [_without_defaults(item) for item in value]
    if isinstance(value, dict):
        plain = {key: _without_defaults(item) for key, item in value.items()}
        is_default = plain.get("configuration") in ({}, {"endian": "little"}, {"separator": "/"})
        if is_default or plain.get("name") == "zstd":
            plain.pop("configuration", None)
        return plain
    return value


def check_crc(data: NDArray[np.uint8], crc: NDArray[np.uint8], *, where: str) -> None:
    """Raises DamagedShard unless `crc`, 4 bytes, is the crc32c of `data`; `where` names them."""
    import google_crc32c  # by the first chunk: delta tokens, and models alone, do without

    if google_crc32c.value(data) != int.from_bytes(crc.tobytes(), "little"):
        raise damaged_shard(f"{where}: wrong checksum, the file was changed or damaged")


MAX_STRETCH = 256
"""Frames in one read: two buffers each, of which a system takes 1,024 at once."""

_INDEX_ENTRY_BYTES = 16


class FrameMember:
    """An array of one Zarr shard that is read frame by frame: dtype (W, T, ...)."""

    def __init__(
        self,
        shard: ShardFile,
        name: str,
        *,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        check_once: bool = False,
    ) -> None:
        """check_once: hold each frame against its checksum when it is read first, not every time;
        compressed ones always."""
        inner = (1, 1, *shape[2:])
        self.compression = check_metadata(shard, name, shape=shape, dtype=dtype, inner=inner)
        self.member = shard.members[only_chunk(name, len(shape))]
        self.where = f"{shard.path}: {self.member.name}"
        """For messages."""
        self._frame_bytes = math.prod(shape[2:]) * dtype.itemsize
        self._offsets, self._sizes = self._read_index(shard, (shape[0], shape[1]))
        self._checked: NDArray[np.bool_] | None = None
        if check_once:  # threads may set it at once: at worst a frame is checked twice
            self._checked = np.zeros(shape[:2], dtype=np.bool_)
        self._unread = np.empty((shape[1], CRC_BYTES), dtype=np.uint8)
        chunk_bytes = self._frame_bytes + CRC_BYTES
        steps = np.diff(self._offsets, axis=1)
        self._in_order = bool((steps == chunk_bytes).all())
        """Whether the frames of every window lie one after the other."""

    def read_frames(
        self, file: ReadOnlyFile, window: int, frames: Sequence[int], *, out: NDArray[np.uint8]
    ) -> None:
        """Fills `out`, uint8 (len(frames), frame_bytes), C-contiguous, from the shard's file.

        Frames that follow one another are one read. Raises DamagedShard on a wrong checksum: of
        every frame, or with `check_once` of each when it is read first.
        """
        if self.compression != "none":
            for row, frame in enumerate(frames):
                self._read_compressed(file, window, frame, out=out[row])
            return
        at = 0
        for first, count in _stretches(frames):
            self._read_stretch(file, window, first, out=out[at : at + count])
            at += count

    def _read_stretch(
        self, file: ReadOnlyFile, window: int, first: int, *, out: NDArray[np.uint8]
    ) -> None:
        """The frames from `first` on; the chunks of a window lie one after the other."""
        count = len(out)
        if count > 1 and not self._in_order:  # another writer's order
            for row in range(count):
                self._read_stretch(file, window, first + row, out=out[row : row + 1])
            return
        checked = self._checked
        if checked is not None and checked[window, first : first + count].all():
            crcs = self._unread[:count]  # whatever is written there, nobody reads it
        else:
            crcs, checked = np.empty((count, CRC_BYTES), dtype=np.uint8), None
        buffers = [buffer for pair in zip(out, crcs, strict=True) for buffer in pair]
        file.read_into(buffers, int(self._offsets[window, first]))
        if checked is not None:
            return
        for row in range(count):
            where = f"{self.where}: window {window}, frame {first + row}"
            check_crc(out[row], crcs[row], where=where)
        if self._checked is not None:
            self._checked[window, first : first + count] = True

    def _read_compressed(
        self, file: ReadOnlyFile, window: int, frame: int, *, out: NDArray[np.uint8]
    ) -> None:
        crc = np.empty(CRC_BYTES, dtype=np.uint8)
        stored = np.empty(int(self._sizes[window, frame]) - CRC_BYTES, dtype=np.uint8)
        file.read_into([stored, crc], int(self._offsets[window, frame]))
        where = f"{self.where}: window {window}, frame {frame}"
        check_crc(stored, crc, where=where)
        decompress(stored, out=out, where=where)

    def _read_index(
        self, shard: ShardFile, shape: tuple[int, int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each chunk starts in the shard's file and how long it is, int64 (W, T) each."""
        num_entries = shape[0] * shape[1]
        index_bytes = num_entries * _INDEX_ENTRY_BYTES
        end_of_data = self.member.size - index_bytes - CRC_BYTES
        chunk_bytes = self._frame_bytes + CRC_BYTES
        plain = self.compression == "none"
        if end_of_data < 0 or (plain and end_of_data != num_entries * chunk_bytes):
            wanted = num_entries * (chunk_bytes + _INDEX_ENTRY_BYTES) + CRC_BYTES
            raise damaged_shard(f"{self.where}: {self.member.size} bytes, wanted {wanted}")
        # Only now: a made-up shape could ask for terabytes.
        data = shard.read(self.member.offset + end_of_data, index_bytes + CRC_BYTES)
        index = np.frombuffer(data, dtype=np.uint8)
        check_crc(index[:index_bytes], index[index_bytes:], where=f"{self.where}: index")
        entries = index[:index_bytes].view("<u8").reshape(num_entries, 2)
        if not _cover(entries, end_of_data) or (plain and (entries[:, 1] != chunk_bytes).any()):
            raise damaged_shard(f"{self.where}: the index does not cover the data")
        offsets, sizes = entries.astype(np.int64).reshape(*shape, 2).transpose(2, 0, 1)
        return offsets + self.member.offset, sizes


def _stretches(frames: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of every stretch of numbers that follow one another, MAX_STRETCH at most."""
    first, count = frames[0], 0
    for frame in frames:
        if frame != first + count or count == MAX_STRETCH:
            yield first, count
            first, count = frame, 0
        count += 1
    yield first, count


def _cover(entries: NDArray[np.uint64], end: int) -> bool:
    """Whether the chunks (offset, bytes), uint64 (C, 2), follow one another from 0 to `end`."""
    if (entries > end).any() or (entries[:, 1] <= CRC_BYTES).any():
        return False
    in_order = entries[np.argsort(entries[:, 0])].astype(np.int64)
    ends = np.cumsum(in_order[:, 1])
    return bool(ends[-1] == end and np.array_equal(in_order[:, 0], ends - in_order[:, 1]))
