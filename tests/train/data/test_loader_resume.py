"""Interrupted at any step, on any number of ranks: the same global batches, values compared."""

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from deltatok.shards import DeltaShards, PatchShards
from deltatok.train.data.batches import Batch, Prefetcher, TokenizerBatches, WindowBatches
from deltatok.train.data.order import RankSlice
from deltatok.train.data.residency import window_source

Reader = Callable[[int], Batch]
Values = list[tuple[torch.Tensor, ...]]
BATCH_SIZE = 4


def world_reader(folder: Path, ranks: RankSlice, residency: str) -> tuple[Reader, int]:
    shards = DeltaShards(folder)
    batches = WindowBatches(
        shards,
        window_source(shards, residency=residency),
        np.arange(len(shards)),
        batch_size=BATCH_SIZE,
        seed=5,
        ranks=ranks,
    )
    return batches.read, batches.order.steps_per_epoch


def tokenizer_reader(folder: Path, ranks: RankSlice, residency: str) -> tuple[Reader, int]:
    shards = PatchShards(folder)
    batches = TokenizerBatches(
        window_source(shards, residency=residency),
        np.arange(len(shards)),
        num_frames=shards.shape[0],
        batch_size=BATCH_SIZE,
        seed=5,
        ranks=ranks,
        wide_pair_fraction=0.5,
    )
    return batches.read, batches.order.steps_per_epoch


def samples_of(batch: Batch) -> tuple[torch.Tensor, ...]:
    if "tokens" in batch.tensors:  # in buffers that later batches are read into
        return batch.tensors["tokens"].clone(), batch.tensors["timestamps"].clone()
    row, previous, current = batch.tensors["pairs"].T
    frames = batch.tensors["frames"].float()
    return frames[row, previous], frames[row, current]


def run(make: Callable[[RankSlice], Reader], ranks: int, stops: Sequence[int]) -> Values:
    """The global batches of a run from stops[0] to stops[-1], started anew at each stop between."""
    values: Values = []
    for start, stop in pairwise(stops):
        readers = [make(RankSlice(rank=rank, num_ranks=ranks)) for rank in range(ranks)]
        parts: list[Values] = []
        for reader in readers:
            with Prefetcher(reader, start=start, stop=stop) as ahead:
                parts.append([samples_of(ahead.next()) for _ in range(start, stop)])
        for of_ranks in zip(*parts, strict=True):  # strict: equal steps on all ranks
            values.append(tuple(torch.cat(tensors) for tensors in zip(*of_ranks, strict=True)))
    return values


@pytest.mark.parametrize("residency", ["device", "memory", "map", "stream"])
@pytest.mark.parametrize("kind", ["world", "tokenizer"])
def test_interruptions_at_every_step_leave_the_global_batches_as_they_were(
    patches: Path, deltas: Path, kind: str, residency: str
) -> None:
    readers: dict[tuple[int, int], Reader] = {}
    steps = 0

    def make(ranks: RankSlice) -> Reader:
        nonlocal steps
        key = (ranks.rank, ranks.num_ranks)
        if key not in readers:  # reading keeps no state; opening the files is what takes time
            build, folder = (
                (world_reader, deltas) if kind == "world" else (tokenizer_reader, patches)
            )
            readers[key], steps = build(folder, ranks, residency)
        return readers[key]

    make(RankSlice())
    last = min(2 * steps, 6)
    truth = run(make, 1, [0, last])
    assert len(truth) == last >= 4
    assert any(not torch.equal(truth[0][0], later[0]) for later in truth[1:])
    for ranks in (1, 2, 4):
        for count in (1, 3):
            for stops in combinations(range(1, last), count):
                values = run(make, ranks, [0, *stops, last])
                assert len(values) == len(truth)
                for got, wanted in zip(values, truth, strict=True):
                    assert all(map(torch.equal, got, wanted)), (ranks, stops)


@pytest.mark.parametrize("kind", ["world", "tokenizer"])
def test_every_residency_gives_the_same_batches(patches: Path, deltas: Path, kind: str) -> None:
    build, folder = (world_reader, deltas) if kind == "world" else (tokenizer_reader, patches)
    by_residency = []
    for residency in ("device", "memory", "map"):
        reader, _ = build(folder, RankSlice(), residency)
        by_residency.append([samples_of(reader(step)) for step in range(5)])
    for other in by_residency[1:]:
        for got, wanted in zip(other, by_residency[0], strict=True):
            assert all(map(torch.equal, got, wanted))
