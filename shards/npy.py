"""The npy format, strictly: one plain numeric array, C order, nothing to unpickle.

`npy_bytes` writes it, `parse_npy` finds the numbers in it, NumPy parses the header (as a Python
literal, nothing is executed). `map_npy` opens what other programs wrote: labels, predicted frames.
"""

import io
import math
import tokenize
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from .errors import DamagedShard
from .files import open_file
from .schema import shown

MAX_PREFIX_BYTES = 4096
"""More than any header of ours takes (128): what to read of a member to parse its header."""

_READERS = {
    (1, 0): npy_format.read_array_header_1_0,
    (2, 0): npy_format.read_array_header_2_0,
}
_HEADER_ERRORS = (
    *(EOFError, MemoryError, OverflowError, RecursionError, SyntaxError, TypeError, ValueError),
    *(tokenize.TokenError, UserWarning),  # a warning, as an error, for headers of Python 2
)
"""What NumPy's reader raises for damaged headers."""


def npy_bytes(values: NDArray[Any]) -> bytes:
    """The npy file of `values`, version 1.0, C order; the same array gives the same bytes."""
    buffer = io.BytesIO()
    npy_format.write_array(buffer, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def parse_npy(
    prefix: bytes, *, size: int, dtype: np.dtype[Any], num_axes: int, where: str
) -> tuple[tuple[int, ...], int]:
    """Of an npy file of `size` bytes that starts with `prefix` (up to 4,096 bytes): the shape, and
    the bytes before the first number.

    Raises DamagedShard unless it is C order, of this dtype and number of axes, and exactly as
    long as its shape says.
    """
    length = 10 if prefix[6:7] == b"\1" else 12  # of the magic string and the header's length
    start = length + int.from_bytes(prefix[8:length], "little")
    try:
        shape, fortran_order, stored = _parse_header(prefix[:start])
    except _HEADER_ERRORS as error:
        raise DamagedShard(
            f"{where}: starts with {shown(prefix[:8])}, wanted an npy file with an npy header of "
            f"at most {MAX_PREFIX_BYTES} bytes ({error})"
        ) from error
    if stored != dtype or fortran_order or any(axis < 0 for axis in shape):
        raise DamagedShard(
            f"{where}: npy header of {shown(stored)} {shape}"
            f"{' in Fortran order' if fortran_order else ''}, wanted {dtype.str!r} in C order"
        )
    wanted = start + math.prod(shape) * dtype.itemsize
    if len(shape) != num_axes or wanted != size:
        raise DamagedShard(
            f"{where}: {size} bytes for shape {shape} of {dtype}, wanted {num_axes} axes and "
            f"{wanted} bytes"
        )
    return shape, start


@lru_cache(maxsize=256)  # the blocks of a cache have few different headers
def _parse_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype in what precedes the numbers of an npy file."""
    file = io.BytesIO(data)
    version = npy_format.read_magic(file)
    if version not in _READERS:
        raise ValueError(f"version {version}")
    return _READERS[version](file)


def read_npy(data: bytes, *, dtype: np.dtype[Any], num_axes: int, where: str) -> NDArray[Any]:
    """The array in the npy file `data`, read-only; raises as `parse_npy`."""
    prefix = data[:MAX_PREFIX_BYTES]
    shape, start = parse_npy(prefix, size=len(data), dtype=dtype, num_axes=num_axes, where=where)
    return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape)


def map_npy(path: Path) -> NDArray[Any]:
    """The array of anybody's npy file, of any plain dtype, mapped read-only.

    Raises OSError, or ValueError for what is no such file (an .npz, an empty file, one that is
    shorter than its shape says).
    """
    open_file(path).close()
    try:
        mapped: NDArray[Any] = npy_format.open_memmap(path, mode="r")
    except _HEADER_ERRORS as error:
        raise ValueError(f"no npy header: {error}") from error
    return mapped
