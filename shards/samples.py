"""A hash of 16 pieces of a file, spread over it: tells a large shard from another's in no time.

Checksums inside a shard say that nothing was changed, not that it is the right shard: two whole
ones of equal size can be swapped. Hashing a gigabyte to notice that takes a second, this takes 16
small reads. Used when a shard is described (`records`) and when it is read first (`opening`).
"""

import hashlib
import os
from pathlib import Path

NUM_PIECES = 16
PIECE_BYTES = 4096
SAMPLED_ABOVE_BYTES = NUM_PIECES * PIECE_BYTES
"""Smaller files are hashed whole. Not the head alone: many videos begin with black frames."""


def sample_sha256(path: Path, *, size: int) -> str:
    """The SHA-256, 64 hex digits, of 16 pieces of 4,096 bytes; piece i starts at byte
    i * (size - 4096) // 15. `size`: of the file, more than 64 KiB. OSError as reading does."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        for piece in range(NUM_PIECES):
            start = piece * (size - PIECE_BYTES) // (NUM_PIECES - 1)
            digest.update(os.pread(descriptor, PIECE_BYTES, start))
    finally:
        os.close(descriptor)
    return digest.hexdigest()
