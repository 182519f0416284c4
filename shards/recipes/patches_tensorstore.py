"""Patch tokens with tensorstore, all reads of a batch at once.

python patches_tensorstore.py cache/patches
"""

import json
import sys
from pathlib import Path

import numpy as np
import tensorstore


def open_zip(path: Path, inside: str = "") -> dict:
    """A shard, or an array of it, as a key-value store."""
    return {
        "driver": "zip",
        "base": {"driver": "file", "path": str(path.resolve())},
        "path": inside,
    }


def open_array(path: Path, name: str) -> tensorstore.TensorStore:
    """One array of a shard."""
    spec = {"driver": "zarr3", "kvstore": open_zip(path, f"{name}/")}
    return tensorstore.open(spec, open=True, read=True).result()


def read_windows(path: Path, windows: list[int]) -> np.ndarray:
    """Tokens of some windows of a shard, float32 (B, T, N, D)."""
    group = tensorstore.KvStore.open(open_zip(path)).result().read("zarr.json").result()
    dtype = json.loads(group.value)["attributes"]["logical_dtype"]
    tokens = open_array(path, "tokens")
    reads = [tokens[window].read() for window in windows]
    stored = np.stack([read.result() for read in reads])
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    values = stored.astype(np.float32)
    if dtype == "int8":
        scales = open_array(path, "token_scale").read().result()[windows]
        values *= scales.astype(np.float32)[..., None]
        values *= open_array(path, "channel_scale").read().result()
    return values


def main(cache: str) -> np.ndarray:
    """All tokens of a cache."""
    shards = []
    for path in sorted(Path(cache, "shards").glob("*.zarr.zip")):
        num_windows = open_array(path, "tokens").shape[0]
        shards.append(read_windows(path, list(range(num_windows))))
        print(f"{path.name}: {shards[-1].shape}")
    return np.concatenate(shards)


if __name__ == "__main__":
    main(sys.argv[1])
