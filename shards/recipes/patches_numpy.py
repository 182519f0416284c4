"""Patch tokens with NumPy alone: any frame of a shard by its offset, nothing else read.

    python patches_numpy.py cache/patches

Uncompressed shards (the default) of any dtype. Written from ../FORMAT.md.
"""

import json
import sys
from pathlib import Path

import numpy as np

STORED = {"float16": "<f2", "bfloat16": "<u2", "int8": "i1"}


def open_chunks(array: Path) -> tuple[dict, np.memmap, np.ndarray]:
    """Metadata, mapped shard file, and the index: uint64 (W, T, 2), offset and bytes of a frame."""
    metadata = json.loads((array / "zarr.json").read_text())
    shape = metadata["shape"]
    data = np.memmap(array.joinpath("c", *["0"] * len(shape)), np.uint8, "r")
    index_bytes = shape[0] * shape[1] * 16
    index = data[-4 - index_bytes : -4].view("<u8").reshape(shape[0], shape[1], 2)
    return metadata, data, index


def frame(
    chunks: tuple[dict, np.memmap, np.ndarray], dtype: str, at: tuple[int, int]
) -> np.ndarray:
    """The stored numbers of frame `at` (window, frame): a view into the mapped file."""
    metadata, data, index = chunks
    shape = metadata["shape"][2:]
    offset, size = (int(number) for number in index[at])
    if size != int(np.prod(shape)) * np.dtype(dtype).itemsize + 4:  # 4: the crc32c after it
        raise SystemExit("the shard is compressed: read it with zarr or tensorstore")
    return data[offset : offset + size - 4].view(dtype).reshape(shape)


def read_shard(group: Path) -> np.ndarray:
    """All tokens of a shard, float32 (W, T, N, D)."""
    dtype = json.loads((group / "zarr.json").read_text())["attributes"]["logical_dtype"]
    tokens = open_chunks(group / "tokens")
    values = np.empty(tokens[0]["shape"], np.float32)
    for at in np.ndindex(values.shape[:2]):
        stored = frame(tokens, STORED[dtype], at)
        if dtype == "bfloat16":
            values[at] = (stored.astype(np.uint32) << 16).view(np.float32)
        else:
            values[at] = stored
    if dtype == "int8":
        scales = open_chunks(group / "token_scale")
        for at in np.ndindex(values.shape[:2]):
            values[at] *= frame(scales, "<f2", at).astype(np.float32)[:, None]
        values *= np.fromfile(group / "channel_scale/c/0", "<f4", count=values.shape[-1])
    return values


def main(cache: str) -> np.ndarray:
    """All tokens of a cache, shard by shard as the done-records promise them."""
    shards = []
    for record in sorted(Path(cache, "shards").glob("*.json")):
        done = json.loads(record.read_text())
        for name, promised in done["files"].items():
            if Path(cache, name).stat().st_size != promised["bytes"]:
                raise SystemExit(f"{name}: not the file that was written")
        if done["rows"]:
            shards.append(read_shard(record.with_suffix(".zarr")))
            print(f"{record.stem}: {shards[-1].shape}, {len(done['keys'])} clips")
    return np.concatenate(shards)


if __name__ == "__main__":
    main(sys.argv[1])
