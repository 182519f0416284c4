"""Delta tokens with Hugging Face datasets, streamed from the tars; no network is used.

python deltas_datasets.py cache/deltas
"""

import sys
from pathlib import Path

import numpy as np
from datasets import load_dataset


def main(cache: str) -> np.ndarray:
    """All tokens of a cache, float16 (W, T, D), in order."""
    tars = [str(path) for path in sorted(Path(cache, "shards").glob("*.tar"))]
    blocks = load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=True)
    parts = []
    for block in blocks:  # one block of up to 256 windows
        tokens = np.asarray(block["tokens.npy"], np.float16)
        seconds = np.asarray(block["timestamps.npy"], np.float32)
        clip = block["windows.json"][0]["clip"]
        print(f"{block['__key__']}: {tokens.shape}, the first is {clip} at {seconds[0]} s")
        parts.append(tokens)
    return np.concatenate(parts)


if __name__ == "__main__":
    main(sys.argv[1])
