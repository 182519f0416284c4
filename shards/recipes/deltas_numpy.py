"""Delta tokens with NumPy and the standard library: arrays mapped where they lie in the tars.

python deltas_numpy.py cache/deltas
"""

import json
import sys
import tarfile
from pathlib import Path

import numpy as np


def map_blocks(path: Path, part: str) -> list[np.ndarray]:
    """The arrays BBBBBB.`part` of a tar, mapped and not read: tokens.npy or timestamps.npy."""
    blocks = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.name.endswith(part):
                continue
            file = tar.extractfile(member)
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            start = member.offset_data + file.tell()
            blocks.append(np.memmap(path, dtype, "r", offset=start, shape=shape))
    return blocks


def read_windows(path: Path) -> list[dict]:
    """clip, frames, crop and flipped of every window of a tar."""
    with tarfile.open(path, "r:") as tar:
        names = [name for name in tar.getnames() if name.endswith(".windows.json")]
        return [window for name in names for window in json.load(tar.extractfile(name))]


def main(cache: str) -> np.ndarray:
    """All tokens of a cache, float16 (W, T, D). A tar has no checksums: sizes are checked here,
    `sha256` is in the done-record too."""
    blocks: list[np.ndarray] = []
    for path in sorted(Path(cache, "shards").glob("*.tar")):
        done = json.loads(path.with_suffix(".json").read_text())
        if path.stat().st_size != done["file"]["bytes"]:
            raise SystemExit(f"{path}: not the file that was written")
        mapped, seconds = map_blocks(path, "tokens.npy"), map_blocks(path, "timestamps.npy")
        first = read_windows(path)[0]
        print(
            f"{path.name}: {done['rows']} windows in {len(mapped)} blocks; the first is "
            f"{first['clip']} at {seconds[0][0]} s"
        )
        blocks += mapped
    return np.concatenate(blocks)


if __name__ == "__main__":
    main(sys.argv[1])
