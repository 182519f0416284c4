"""zstd, as the codec of that name of Zarr v3: one frame a chunk that says its size.

numcodecs is imported when the first chunk is compressed or decompressed: most caches are not.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DamagedShard, UsageError

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
