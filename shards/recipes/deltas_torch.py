"""Delta tokens in a torch DataLoader: random windows from mapped tars, any number of workers.

python deltas_torch.py cache/deltas
"""

import sys
from pathlib import Path

import numpy as np
import torch
from deltas_numpy import map_blocks
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler


class DeltaTokens(Dataset):
    """Batches by window numbers: {"tokens": float16 (B, T, D), "seconds": float32 (B, T)}.

    Opened when first read, so that a worker maps the files itself, forked or spawned.
    """

    def __init__(self, cache: str) -> None:
        self.tars = sorted(Path(cache, "shards").glob("*.tar"))
        sizes = [len(block) for tar in self.tars for block in map_blocks(tar, "tokens.npy")]
        self.starts = np.cumsum([0, *sizes])
        self.columns: dict[str, list[np.ndarray]] | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, windows: list[int]) -> dict[str, torch.Tensor]:
        if self.columns is None:
            parts = {"tokens": "tokens.npy", "seconds": "timestamps.npy"}
            self.columns = {
                name: [block for tar in self.tars for block in map_blocks(tar, part)]
                for name, part in parts.items()
            }
        blocks = np.searchsorted(self.starts, windows, side="right") - 1
        places = list(zip(blocks, windows - self.starts[blocks], strict=True))
        return {
            name: torch.from_numpy(np.stack([column[block][row] for block, row in places]))
            for name, column in self.columns.items()
        }


def loader(cache: str, *, batch: int, workers: int = 0, seed: int = 0) -> DataLoader:
    """All windows once, in random order. The sampler makes batches: `batch_size` is None."""
    dataset = DeltaTokens(cache)
    order = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    sampler = BatchSampler(order, batch_size=batch, drop_last=False)
    return DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=workers)


def main(cache: str) -> np.ndarray:
    """All tokens of a cache, in order."""
    for batch in loader(cache, batch=4, workers=1):
        print({name: tuple(values.shape) for name, values in batch.items()})
    dataset = DeltaTokens(cache)
    return dataset[list(range(len(dataset)))]["tokens"].numpy()


if __name__ == "__main__":
    main(sys.argv[1])
