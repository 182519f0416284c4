"""Patch tokens with NumPy and the standard library: any frame of a shard by its offset.

    python patches_numpy.py cache/patches

Uncompressed shards (the default) of any dtype. Written from ../FORMAT.md.
"""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np

STORED = {"float16": "<f2", "bfloat16": "<u2", "int8": "i1"}


def map_members(path: Path) -> dict[str, np.ndarray]:
    """The members of a shard's zip, uint8 (bytes,) each: views into the mapped file."""
    data = np.memmap(path, np.uint8, "r")
    members = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            # Lengths of the name and of the padding, in the 30 bytes before them.
            lengths = data[info.header_offset + 26 :][:4].view("<u2")
            start = info.header_offset + 30 + int(lengths.sum())
            members[info.filename] = data[start : start + info.file_size]
    return members


def open_chunks(members: dict[str, np.ndarray], name: str) -> tuple[list, np.ndarray, np.ndarray]:
    """Shape, data, and the index: uint64 (W, T, 2), offset and bytes of a frame."""
    shape = json.loads(members[f"{name}/zarr.json"].tobytes())["shape"]
    data = members["/".join([name, "c", *["0"] * len(shape)])]
    index_bytes = shape[0] * shape[1] * 16
    index = data[-4 - index_bytes : -4].view("<u8").reshape(shape[0], shape[1], 2)
    return shape, data, index


def frame(chunks: tuple[list, np.ndarray, np.ndarray], dtype: str, at: tuple) -> np.ndarray:
    """The stored numbers of frame `at` (window, frame): a view into the mapped file."""
    (_, _, *shape), data, index = chunks
    offset, size = (int(number) for number in index[at])
    if size != int(np.prod(shape)) * np.dtype(dtype).itemsize + 4:  # 4: the crc32c after it
        raise SystemExit("the shard is compressed: read it with zarr or tensorstore")
    return data[offset : offset + size - 4].view(dtype).reshape(shape)


def read_shard(path: Path) -> np.ndarray:
    """All tokens of a shard, float32 (W, T, N, D)."""
    members = map_members(path)
    dtype = json.loads(members["zarr.json"].tobytes())["attributes"]["logical_dtype"]
    tokens = open_chunks(members, "tokens")
    values = np.empty(tokens[0], np.float32)
    for at in np.ndindex(values.shape[:2]):
        stored = frame(tokens, STORED[dtype], at)
        if dtype == "bfloat16":
            values[at] = (stored.astype(np.uint32) << 16).view(np.float32)
        else:
            values[at] = stored
    if dtype == "int8":
        scales = open_chunks(members, "token_scale")
        for at in np.ndindex(values.shape[:2]):
            values[at] *= frame(scales, "<f2", at).astype(np.float32)[:, None]
        values *= members["channel_scale/c/0"][:-4].view("<f4")
    return values


def main(cache: str) -> np.ndarray:
    """All tokens of a cache, shard by shard as the done-records promise them."""
    shards = []
    for record in sorted(Path(cache, "shards").glob("*.json")):
        done = json.loads(record.read_text())
        if done["rows"]:
            path = record.with_suffix(".zarr.zip")
            if path.stat().st_size != done["file"]["bytes"]:
                raise SystemExit(f"{path}: not the file that was written")
            shards.append(read_shard(path))
            print(f"{record.stem}: {shards[-1].shape}, {done['clips']} clips")
    return np.concatenate(shards)


if __name__ == "__main__":
    main(sys.argv[1])
