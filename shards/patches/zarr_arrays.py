"""Reads the arrays of a patch-token shard directly: metadata, small arrays, checksums.

Zarr's own reader gives the same numbers (a test holds the two together) at several times the
cost a read, starts a thread that does not survive a fork, and takes a missing file for zeros.
This one reads exactly the layout in `patch_layout`, checks each checksum, and refuses the rest.
The tokens, many frames in one file, are read by `frame_file`.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from .checked import Fields, shown
from .errors import DamagedShard
from .patch_layout import only_chunk
from .strict_json import read_json

_DTYPES = {
    "<f2": "float16",
    "<u2": "uint16",
    "|i1": "int8",
    "<f4": "float32",
    "<i4": "int32",
    "|b1": "bool",
}
CRC_BYTES = 4

ADVICE = (
    "run `deltatok-shards verify` on the cache, then delete the shard's done-record "
    "(shards/NNNNNN.json) and extract again"
)


class ReadOnlyFile:
    """A file descriptor that is closed when nobody holds it any more.

    Reads go by position, so that threads and forked processes can share it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise DamagedShard(f"{path}: cannot be opened ({error.strerror}): {ADVICE}") from error

    # `close` is bound here: of a reader that lives to the end, `os` is taken apart first.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._descriptor >= 0:
            close(self._descriptor)

    def size(self) -> int:
        """Bytes in the file now."""
        return os.fstat(self._descriptor).st_size

    def read_into(self, buffers: list[NDArray[np.uint8]], offset: int) -> None:
        """Fills the uint8 (n,) `buffers`, one after the other, from `offset` on."""
        wanted = sum(buffer.nbytes for buffer in buffers)
        try:
            got = os.preadv(self._descriptor, [buffer.data for buffer in buffers], offset)
            while got < wanted:  # interrupted, or the file ends
                rest = [buffer.data for buffer in _rest(buffers, got)]
                more = os.preadv(self._descriptor, rest, offset + got)
                if more == 0:
                    raise DamagedShard(
                        f"{self.path}: ends at byte {offset + got}, wanted {offset + wanted}: "
                        f"{ADVICE}"
                    )
                got += more
        except OSError as error:
            raise DamagedShard(f"{self.path}: cannot be read ({error}): {ADVICE}") from error


def read_array(
    group: Path, name: str, *, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """A whole array of one chunk; DamagedShard if it is not what is asked for."""
    check_metadata(group / name, shape=shape, dtype=dtype, inner=None)
    path = group.joinpath(name, *only_chunk(len(shape)))
    file = ReadOnlyFile(path)
    wanted = math.prod(shape) * dtype.itemsize + CRC_BYTES
    if file.size() != wanted:
        raise DamagedShard(f"{path}: {file.size()} bytes, wanted {wanted}: {ADVICE}")
    data = np.empty(shape, dtype=dtype)
    buffer = data.reshape(-1).view(np.uint8)
    crc = np.empty(CRC_BYTES, dtype=np.uint8)
    file.read_into([buffer, crc], 0)
    check_crc(buffer, crc, where=str(path))
    if dtype == np.bool_ and (buffer > 1).any():
        raise DamagedShard(f"{path}: holds bytes that are neither true nor false: {ADVICE}")
    return data


def read_attributes(group: Path) -> dict[str, Any]:
    """The attributes of the group."""
    where = str(group / "zarr.json")
    return Fields(read_json(group / "zarr.json"), where=where).mapping("attributes")


def check_metadata(
    path: Path, *, shape: tuple[int, ...], dtype: np.dtype[Any], inner: tuple[int, ...] | None
) -> str:
    """Holds an array's zarr.json against the layout there is; gives its compression.

    `inner`: shape of the chunks in a shard, None for an array of one chunk, never compressed."""
    where = str(path / "zarr.json")
    metadata = read_json(path / "zarr.json")
    fields = Fields(metadata, where=where)
    compression = "none"
    if inner is not None and _takes_zstd_out(metadata):
        compression = "zstd"
    codecs = _bytes_and_crc()
    if inner is not None:
        sharding = {
            "chunk_shape": list(inner),
            "codecs": codecs,
            "index_codecs": _bytes_and_crc(),
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    wanted = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": _DTYPES[dtype.str],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": codecs,
    }
    for name, value in wanted.items():
        got = metadata[name] if fields.has(name) else None
        if _without_defaults(got) != _without_defaults(value):
            raise DamagedShard(
                f"{where}: {name} is {shown(got)}, wanted {shown(value)}: not the layout of "
                f"format_version 1, or damaged; {ADVICE}"
            )
    if fields.has("storage_transformers") and fields.sequence("storage_transformers"):
        raise DamagedShard(f"{where}: has storage transformers, wanted none; {ADVICE}")
    return compression


def _takes_zstd_out(metadata: Any) -> bool:
    """Whether the inner codecs are bytes, zstd, crc32c; then zstd, of any level, is taken out."""
    try:
        inner = metadata["codecs"][0]["configuration"]["codecs"]
        is_zstd = len(inner) == 3 and inner[1]["name"] == "zstd"
    except (TypeError, KeyError, IndexError):
        return False
    if is_zstd and isinstance(inner, list):
        del inner[1]
        return True
    return False


def _bytes_and_crc() -> list[dict[str, Any]]:
    return [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def _without_defaults(value: Any) -> Any:
    """`value` without what may be left out: empty configurations, the byte order of one byte."""
    if isinstance(value, list):
        return [_without_defaults(item) for item in value]
    if isinstance(value, dict):
        plain = {key: _without_defaults(item) for key, item in value.items()}
        if plain.get("configuration") in ({}, {"endian": "little"}, {"separator": "/"}):
            del plain["configuration"]
        return plain
    return value


def check_crc(data: NDArray[np.uint8], crc: NDArray[np.uint8], *, where: str) -> None:
    """Raises DamagedShard unless `crc`, 4 bytes, is the crc32c of `data`; `where` names them."""
    if google_crc32c.value(data) != int.from_bytes(crc.tobytes(), "little"):
        raise DamagedShard(f"{where}: wrong checksum, the file was changed or damaged: {ADVICE}")


def _rest(buffers: list[NDArray[np.uint8]], skip: int) -> list[NDArray[np.uint8]]:
    rest = []
    for buffer in buffers:
        taken = min(skip, buffer.nbytes)
        skip -= taken
        if taken < buffer.nbytes:
            rest.append(buffer[taken:])
    return rest
