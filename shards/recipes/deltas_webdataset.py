"""Delta tokens with webdataset: blocks streamed, unpacked to windows and shuffled in a buffer.

python deltas_webdataset.py cache/deltas
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import webdataset


def windows_of(blocks: Iterable[dict]) -> Iterator[dict]:
    """One sample a window from one sample a block."""
    for block in blocks:
        columns = block["tokens.npy"], block["timestamps.npy"], block["windows.json"]
        for tokens, seconds, window in zip(*columns, strict=True):
            yield {"tokens": tokens, "seconds": seconds, **window}


def stream(cache: str, *, shuffle: int = 0) -> Iterable[dict]:
    """tokens float16 (T, D), seconds float32 (T,), clip, frames, crop, flipped of each window."""
    tars = [str(path) for path in sorted(Path(cache, "shards").glob("*.tar"))]
    dataset = webdataset.WebDataset(tars, shardshuffle=len(tars) if shuffle else False)
    dataset = dataset.decode().compose(windows_of)
    return dataset.shuffle(shuffle) if shuffle else dataset


def main(cache: str) -> np.ndarray:
    """All tokens of a cache, in order."""
    windows = list(stream(cache))
    print(f"{len(windows)} windows of {windows[0]['tokens'].shape}, first {windows[0]['clip']}")
    first = next(iter(stream(cache, shuffle=10_000)))
    print(f"shuffled, the first is {first['clip']} at {first['seconds']} s")
    return np.stack([window["tokens"] for window in windows])


if __name__ == "__main__":
    main(sys.argv[1])
