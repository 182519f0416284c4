"""Every random number of training, as a pure function of the seed and of what it is drawn for.

No generator lives from one step to the next, so that a resumed run draws what the uninterrupted one
would have, and a rank draws what a single process would have drawn for the same samples. numpy's
bit generators have a fixed stream; its distributions do not, so only raw bits are used.
"""

import hashlib
import json

import numpy as np
import torch
from numpy.typing import NDArray


def seed_for(*parts: int | str) -> int:
    """63 bits that depend on every part: the key of one draw."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(size: int, *parts: int | str) -> NDArray[np.int64]:
    """A permutation of 0..size-1, int64 (size,)."""
    keys = np.random.Philox(key=seed_for("permutation", *parts)).random_raw(size)
    return np.argsort(keys, kind="stable").astype(np.int64)


def uniforms(size: int, *parts: int | str) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64 (size,)."""
    raw = np.random.Philox(key=seed_for("uniforms", *parts)).random_raw(size)
    uniform: NDArray[np.float64] = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator on `device`; the same parts give the same numbers there."""
    return torch.Generator(device=device).manual_seed(seed_for("generator", *parts))
