"""Patch tokens with zarr.

python patches_zarr.py cache/patches
"""

import sys
from pathlib import Path

import numpy as np
import zarr
from zarr.storage import ZipStore


def read_shard(path: Path) -> np.ndarray:
    """All tokens of a shard, float32 (W, T, N, D). A slice of `tokens` reads only its frames."""
    group = zarr.open_group(ZipStore(path), mode="r")
    stored = np.asarray(group["tokens"][...])
    if group.attrs["logical_dtype"] == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    values = stored.astype(np.float32)
    if group.attrs["logical_dtype"] == "int8":
        values *= np.asarray(group["token_scale"][...]).astype(np.float32)[..., None]
        values *= np.asarray(group["channel_scale"][...])
    return values


def main(cache: str) -> np.ndarray:
    """All tokens of a cache."""
    shards = []
    for path in sorted(Path(cache, "shards").glob("*.zarr.zip")):
        group = zarr.open_group(ZipStore(path), mode="r")
        shards.append(read_shard(path))
        seconds = np.asarray(group["timestamps_s"][0])
        clip = group.attrs["keys"][int(group["clip"][0])]
        print(f"{path.name}: {shards[-1].shape}; window 0 is {clip} at {seconds} s")
    return np.concatenate(shards)


if __name__ == "__main__":
    main(sys.argv[1])
