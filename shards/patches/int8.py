"""int8 tokens: one scale a channel, fitted once for the cache, times one scale a token.

    value[w, t, n, d] = int8 * token_scale[w, t, n] * channel_scale[d]    in float32, from the left

Channels of a backbone differ by orders of magnitude (int8 with a scale a token alone: 17 % of the
change between frames lost to the outlier channels; with channel scales 2.3 %). `extract/` makes the
same codes on the device; a test holds the two together, bit for bit.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import CHANNEL_SCALE, CacheInfo, read_cache_info
from ..errors import CacheMismatch, DamagedShard, DeltatokError
from ..files import create_bytes, write_bytes
from ..npy import npy_bytes, read_npy
from ..schema import read_file, shown
from ..stores.upload import top_changed

MAX_CODE = 127
"""Codes are -127..127."""
UNSTORABLE = -128
"""The code of a value that is not finite or too large; never stored."""
MIN_TOKEN_SCALE = 2.0**-14
"""The smallest normal float16: scales below it would have fewer digits than the others."""
MAX_NORMALISED = MAX_CODE * 65504.0
"""The largest |value / channel_scale| that a float16 token scale reaches."""

SAMPLE_CLIPS = 64
"""Clips the scales are fitted on, one window of each: as much work as one shard of the default size
(a guess: the scales need one or two digits, and half a million tokens give them)."""

_SMALLEST_SHARE = 0.01
"""Of the median channel scale: a channel that hardly moved in the sample (or not at all) must not
take the precision of all others when it does (a guess)."""


def quantise(
    values: NDArray[np.float32], channel_scale: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """float32 (..., D) -> codes int8 (..., D) and token_scale float16 (...).

    The dequantised value is within half a step, token_scale * channel_scale / 2, of the value. A
    value that is not finite, or beyond MAX_NORMALISED channel scales, gets the code UNSTORABLE.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        normalised = values.astype(np.float32, copy=False) / channel_scale
        magnitude = np.abs(normalised)
        peak = magnitude.max(axis=-1, keepdims=True)
        scale = np.maximum(peak / np.float32(MAX_CODE), np.float32(MIN_TOKEN_SCALE))
        scale = scale.astype(np.float16)
        normalised /= scale.astype(np.float32)
        codes = np.clip(np.rint(normalised), -MAX_CODE, MAX_CODE)
    if not np.isfinite(scale).all() or peak.max() > MAX_NORMALISED:
        codes = np.where(magnitude <= MAX_NORMALISED, np.nan_to_num(codes), UNSTORABLE)
    return codes.astype(np.int8), scale[..., 0]


def dequantise(
    codes: NDArray[np.int8],
    token_scale: NDArray[np.float16],
    channel_scale: NDArray[np.float32],
    *,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """codes (..., D), token_scale (...), channel_scale (D,) -> float32 (..., D), into `out` where
    given. The first product is exact, the second rounded once."""
    values = np.empty(codes.shape, dtype=np.float32) if out is None else out
    np.multiply(codes, token_scale[..., None].astype(np.float32), out=values)
    values *= channel_scale
    return values


def channel_scale_of(mean_squares: NDArray[np.float64]) -> NDArray[np.float32]:
    """The channel scales float32 (D,) for channels of these mean squares, float64 (D,): their root,
    but never less than a hundredth of the median. Raises DeltatokError unless all are finite."""
    root = np.sqrt(mean_squares)
    if not np.isfinite(root).all() or (root > np.finfo(np.float32).max).any():
        raise DeltatokError(
            f"{int(np.count_nonzero(~np.isfinite(root)))} of {len(root)} channels are not finite "
            "in the sample that the int8 scales are fitted on: run the backbone in float32"
        )
    floor = _SMALLEST_SHARE * float(np.median(root)) or float(root.max()) or 1.0
    scale: NDArray[np.float32] = np.maximum(root, floor).astype(np.float32)
    return np.maximum(scale, np.finfo(np.float32).tiny)


def sample_order(seed: int, key: str) -> tuple[bytes, str]:
    """Sorts clips by it: the first SAMPLE_CLIPS that have windows are those the scales are fitted
    on, by their first window."""
    name = f"calibration:{seed}:{key}".encode()
    return hashlib.blake2b(name, digest_size=16).digest(), key


def scale_sha256(channel_scale: NDArray[np.float32]) -> str:
    """What the identity of a cache says of its scales: the SHA-256 of the D little-endian float32
    numbers, 64 hex digits."""
    return hashlib.sha256(np.ascontiguousarray(channel_scale, dtype="<f4").tobytes()).hexdigest()


def write_channel_scale(folder: Path | str, channel_scale: NDArray[np.float32]) -> None:
    """Writes channel_scale.npy; CacheMismatch unless these are the scales cache.json names."""
    info = read_cache_info(folder)
    check_channel_scale(channel_scale, info, where=str(folder), error=CacheMismatch)
    write_bytes(Path(folder) / CHANNEL_SCALE, npy_bytes(channel_scale.astype("<f4")))


def agree_on_channel_scale(
    folder: Path | str, channel_scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Writes channel_scale.npy into a folder that has no cache.json yet, unless it is there; gives
    the scales that are. So of several processes that fitted scales at once, on devices that round
    differently, all use those of the first."""
    path = Path(folder) / CHANNEL_SCALE
    create_bytes(path, npy_bytes(channel_scale.astype("<f4")))
    top_changed(path.parent, path.name)
    return read_agreed_scale(folder, hidden_size=len(channel_scale))


def read_agreed_scale(folder: Path | str, *, hidden_size: int) -> NDArray[np.float32]:
    """The scales of a cache that is about to be begun, float32 (D,) (no cache.json names their hash
    yet); DamagedShard unless they are D positive numbers."""
    path = Path(folder) / CHANNEL_SCALE
    scale = _read_scale(path)
    if scale.shape != (hidden_size,) or not (np.isfinite(scale) & (scale > 0)).all():
        raise DamagedShard(
            f"{path}: channel scales {scale.shape}, wanted ({hidden_size},) positive ones: they "
            "are of another backbone: delete the file"
        )
    return scale


def read_channel_scale(folder: Path | str, info: CacheInfo) -> NDArray[np.float32]:
    """The scales in channel_scale.npy, float32 (D,); DamagedShard unless they are those of
    cache.json."""
    path = Path(folder) / CHANNEL_SCALE
    scale = _read_scale(path)
    check_channel_scale(scale, info, where=str(path))
    return scale


def _read_scale(path: Path) -> NDArray[np.float32]:
    data = read_file(path, advice="extract again, it is written first")
    scale: NDArray[np.float32] = read_npy(data, dtype=np.dtype("<f4"), num_axes=1, where=str(path))
    return scale


def check_channel_scale(
    scale: NDArray[Any],
    info: CacheInfo,
    *,
    where: str,
    error: type[DamagedShard] | type[CacheMismatch] = DamagedShard,
) -> None:
    """Raises `error` unless `scale` has D positive numbers with the hash that cache.json names."""
    storage = info.identity.get("storage", {})
    wanted = storage.get("scale_sha256") if isinstance(storage, dict) else None
    size = info.shape.hidden_size
    valid = scale.shape == (size,) and bool((np.isfinite(scale) & (scale > 0)).all())
    if not valid or scale_sha256(scale) != wanted:
        raise error(
            f"{where}: channel scales {scale.shape} with SHA-256 {scale_sha256(scale)}, wanted "
            f"({size},) positive ones with {shown(wanted)} (storage.scale_sha256 of cache.json): "
            "restore channel_scale.npy from a copy, or delete it and extract again"
        )
