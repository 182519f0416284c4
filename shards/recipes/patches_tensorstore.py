"""Patch tokens with tensorstore, all reads of a batch at once.

python patches_tensorstore.py cache/patches
"""

import json
import sys
from pathlib import Path

import numpy as np
import tensorstore


def open_array(path: Path) -> tensorstore.TensorStore:
    """One array of a shard. A missing file would read as zeros: see patches_numpy.py."""
    store = {"driver": "file", "path": f"{path.resolve()}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result()


def read_windows(group: Path, windows: list[int]) -> np.ndarray:
    """Tokens of some windows of a shard, float32 (B, T, N, D)."""
    dtype = json.loads((group / "zarr.json").read_text())["attributes"]["logical_dtype"]
    tokens = open_array(group / "tokens")
    reads = [tokens[window].read() for window in windows]
    stored = np.stack([read.result() for read in reads])
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    values = stored.astype(np.float32)
    if dtype == "int8":
        scales = open_array(group / "token_scale").read().result()[windows]
        values *= scales.astype(np.float32)[..., None]
        values *= open_array(group / "channel_scale").read().result()
    return values


def main(cache: str) -> np.ndarray:
    """All tokens of a cache."""
    shards = []
    for group in sorted(Path(cache, "shards").glob("*.zarr")):
        num_windows = open_array(group / "tokens").shape[0]
        shards.append(read_windows(group, list(range(num_windows))))
        print(f"{group.name}: {shards[-1].shape}")
    return np.concatenate(shards)


if __name__ == "__main__":
    main(sys.argv[1])
