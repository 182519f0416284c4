"""The npy format, strictly: one plain numeric array, C order, nothing to unpickle.

`npy_bytes` writes it, `parse_npy` finds the numbers in it without NumPy's own reader, which
evaluates the header as Python text and can be made to unpickle. `map_npy` opens what other
programs wrote: labels, predicted frames.
"""

import io
import math
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DamagedShard
from .schema import shown

MAX_PREFIX_BYTES = 4096
"""More than any header of ours takes (128): what to read of a member to parse its header."""

_MAGIC = b"\x93NUMPY"
_PREFIX_BYTES = {1: 10, 2: 12}
_HEADER = re.compile(
    r"\{'descr': '(?P<descr>[<|][a-z][0-9]{1,2})', 'fortran_order': False, "
    r"'shape': \((?P<shape>[0-9]{1,12},|[0-9]{1,12}(?:, [0-9]{1,12}){1,7}),?\), ?\} *\n?"
)


@dataclass(frozen=True)
class NpyHeader:
    """Where the numbers of an npy file are and what they are."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int
    """Bytes before the first number."""


def npy_bytes(values: NDArray[Any]) -> bytes:
    """The npy file of `values`, version 1.0, C order; the same array gives the same bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array(
        buffer, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False
    )
    return buffer.getvalue()


def parse_npy(
    prefix: bytes, *, size: int, dtype: np.dtype[Any], num_axes: int, where: str
) -> NpyHeader:
    """The header of an npy file of `size` bytes that starts with `prefix` (up to 4,096 bytes).

    Raises DamagedShard unless it is C order, of this dtype and number of axes, and exactly as
    long as its shape says.
    """
    if prefix[:6] != _MAGIC or len(prefix) < 12 or prefix[6] not in _PREFIX_BYTES:
        raise DamagedShard(f"{where}: starts with {shown(prefix[:8])}, wanted an npy file")
    begin = _PREFIX_BYTES[prefix[6]]
    start = begin + int.from_bytes(prefix[8:begin], "little")
    if start > len(prefix):
        raise DamagedShard(
            f"{where}: an npy header of {start} bytes, wanted at most {MAX_PREFIX_BYTES}"
        )
    text = prefix[begin:start].decode("latin-1")
    match = _HEADER.fullmatch(text)
    if match is None or match["descr"] != dtype.str:
        raise DamagedShard(
            f"{where}: npy header {shown(text.strip())}, wanted {dtype.str!r} in C order"
        )
    shape = tuple(int(length) for length in match["shape"].split(",") if length.strip())
    wanted = start + math.prod(shape) * dtype.itemsize
    if len(shape) != num_axes or wanted != size:
        raise DamagedShard(
            f"{where}: {size} bytes for shape {shape} of {dtype}, wanted {num_axes} axes and "
            f"{wanted} bytes"
        )
    return NpyHeader(shape=shape, dtype=dtype, start=start)


def read_npy(data: bytes, *, dtype: np.dtype[Any], num_axes: int, where: str) -> NDArray[Any]:
    """The array in the npy file `data`, read-only; raises as `parse_npy`."""
    header = parse_npy(
        data[:MAX_PREFIX_BYTES], size=len(data), dtype=dtype, num_axes=num_axes, where=where
    )
    return np.frombuffer(data, dtype=dtype, offset=header.start).reshape(header.shape)


def map_npy(path: Path) -> NDArray[Any]:
    """The array of anybody's npy file, of any plain dtype, mapped read-only.

    Raises OSError, or ValueError for what is no such file (an .npz, an empty file, one that is
    shorter than its shape says): of damaged headers NumPy's reader raises much else.
    """
    try:
        mapped: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except (EOFError, OverflowError, SyntaxError, TypeError, tokenize.TokenError) as error:
        raise ValueError(f"no npy header: {error}") from error
    return mapped
