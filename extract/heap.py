"""Memory that was freed goes back to the system: what long runs need of glibc.

glibc keeps what threads free in pieces between what is still used, so that the memory of an
extraction, whose shards are of many sizes, would creep up over thousands of clips.
"""

import ctypes
import functools
from collections.abc import Callable


def give_back_freed() -> None:
    """Returns what the C library keeps without using it (glibc; elsewhere nothing happens)."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return None
    return trim
