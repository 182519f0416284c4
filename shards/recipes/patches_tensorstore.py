"""Patch tokens with tensorstore, all reads of a batch at once.

    python patches_tensorstore.py cache/patches

Whole arrays are read as arrays, frames of uncompressed shards by their bytes: where tensorstore
0.1.86 reads a part of an array in a zip of more than a few MB, it never comes to an end.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tensorstore

STORED = {"float16": "<f2", "bfloat16": "<u2", "int8": "i1"}
TOKENS = "tokens/c/0/0/0/0"


def open_zip(path: Path, inside: str = "") -> dict:
    """A shard, or an array of it, as a key-value store."""
    base = {"driver": "file", "path": str(path.resolve())}
    return {"driver": "zip", "base": base, "path": inside}


def read_array(path: Path, name: str) -> np.ndarray:
    """A whole array of a shard."""
    spec = {"driver": "zarr3", "kvstore": open_zip(path, f"{name}/")}
    return tensorstore.open(spec, open=True, read=True).result().read().result()


def read_stored(store: tensorstore.KvStore, dtype: str, windows: list[int]) -> np.ndarray | None:
    """The stored tokens of some windows (B, T, N, D); None of a compressed shard."""
    shape = json.loads(store["tokens/zarr.json"])["shape"]
    index_bytes = 16 * shape[0] * shape[1] + 4
    index = store.read(TOKENS, byte_range=slice(-index_bytes, None)).result().value
    places = np.frombuffer(index[:-4], "<u8").reshape(shape[0], shape[1], 2)[windows]
    frame_bytes = int(np.prod(shape[2:])) * np.dtype(dtype).itemsize
    if (places[..., 1] != frame_bytes + 4).any():  # 4: the crc32c after each
        return None
    starts = places[..., 0].ravel().tolist()
    reads = [store.read(TOKENS, byte_range=slice(at, at + frame_bytes)) for at in starts]
    frames = [np.frombuffer(read.result().value, dtype) for read in reads]
    return np.stack(frames).reshape(len(windows), *shape[1:])


def read_windows(path: Path, windows: list[int]) -> np.ndarray:
    """Tokens of some windows of a shard, float32 (B, T, N, D)."""
    store = tensorstore.KvStore.open(open_zip(path)).result()
    dtype = json.loads(store["zarr.json"])["attributes"]["logical_dtype"]
    stored = read_stored(store, STORED[dtype], windows)
    if stored is None:
        stored = read_array(path, "tokens")[windows]
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    values = stored.astype(np.float32)
    if dtype == "int8":
        values *= read_array(path, "token_scale")[windows].astype(np.float32)[..., None]
        values *= read_array(path, "channel_scale")
    return values


def main(cache: str) -> np.ndarray:
    """All tokens of a cache."""
    shards = []
    for path in sorted(Path(cache, "shards").glob("*.zarr.zip")):
        num_windows = len(read_array(path, "clip"))
        shards.append(read_windows(path, list(range(num_windows))))
        print(f"{path.name}: {shards[-1].shape}")
    return np.concatenate(shards)


if __name__ == "__main__":
    main(sys.argv[1])
