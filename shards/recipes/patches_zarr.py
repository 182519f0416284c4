"""Patch tokens with zarr.

python patches_zarr.py cache/patches
"""

import sys
import zipfile
from pathlib import Path

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore


def open_shard(path: Path) -> zarr.Group:
    """The group of a shard, its members mapped from the file.

    `zarr.open_group(zarr.storage.ZipStore(path), mode="r")` gives the same numbers, and reads whole
    arrays as fast; but to get at a frame Python's zipfile reads all that is before it (up to 3.11).
    """
    data, buffer = np.memmap(path, np.uint8, "r"), default_buffer_prototype().buffer
    members = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            # Lengths of the name and of the padding, in the 30 bytes before them.
            lengths = data[info.header_offset + 26 :][:4].view("<u2")
            start = info.header_offset + 30 + int(lengths.sum())
            member = np.asarray(data[start : start + info.file_size])
            members[info.filename] = buffer.from_array_like(member)
    return zarr.open_group(MemoryStore(members), mode="r")


def read_shard(path: Path) -> np.ndarray:
    """All tokens of a shard, float32 (W, T, N, D). A slice of `tokens` reads only its frames."""
    group = open_shard(path)
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
        group = open_shard(path)
        shards.append(read_shard(path))
        seconds = np.asarray(group["timestamps_s"][0])
        clip = group.attrs["keys"][int(group["clip"][0])]
        print(f"{path.name}: {shards[-1].shape}; window 0 is {clip} at {seconds} s")
    return np.concatenate(shards)


if __name__ == "__main__":
    main(sys.argv[1])
