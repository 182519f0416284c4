"""Which windows and pairs a step sees, on any rank, at any step, from memory or from the files."""

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from deltatok.shards import DeltaShards, PatchShards, UsageError
from deltatok.train.data import residency as memory
from deltatok.train.data.batches import (
    Batch,
    Prefetcher,
    TokenizerBatches,
    WindowBatches,
    check_frames,
)
from deltatok.train.data.order import (
    BatchOrder,
    RankSlice,
    seed_for,
    shuffled,
    split_windows,
    spread,
    uniforms,
)
from deltatok.train.data.residency import window_source
from deltatok.train.engine.loop import is_time

ONE = RankSlice()


def tokenizer_batches(
    shards: PatchShards,
    *,
    batch_size: int = 9,
    ranks: RankSlice = ONE,
    wide: float = 0.0,
    residency: str = "map",
) -> TokenizerBatches:
    return TokenizerBatches(
        window_source(shards, residency=residency),
        np.arange(len(shards)),
        num_frames=shards.shape[0],
        batch_size=batch_size,
        seed=0,
        ranks=ranks,
        wide_pair_fraction=wide,
    )


def frames_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    row, previous, current = batch.tensors["pairs"].T
    frames = batch.tensors["frames"]
    return frames[row, previous], frames[row, current]


def test_draws_are_fixed_for_ever() -> None:
    assert seed_for("x", 1) == 1932608560750457597
    assert shuffled(np.arange(6), 6, 0, "order", 0).tolist() == [0, 1, 5, 4, 3, 2]
    assert shuffled(np.arange(3), 10**8, 0, "order", 0).tolist() == [53896265, 62305533, 14832852]
    assert uniforms(2, 0, "u").round(12).tolist() == [0.616845987287, 0.301734884751]


SIZES = [*range(1, 130), 1021, 4093, 65521, *(2**k + d for k in (8, 10, 16) for d in (-1, 0, 1))]


def test_order_is_a_permutation_of_any_size() -> None:
    for size in SIZES:
        assert np.array_equal(np.sort(shuffled(np.arange(size), size, 5)), np.arange(size)), size


def test_orders_differ_by_seed_and_epoch() -> None:
    drawn = {
        tuple(shuffled(np.arange(64), 64, seed, "order", epoch).tolist())
        for seed in range(20)
        for epoch in range(20)
    }
    assert len(drawn) == 400


def chi_squared_z(values: np.ndarray, cells: int) -> float:
    """By how many standard deviations chi-squared exceeds that of uniform `values` 0..cells-1."""
    counts = np.bincount(values.ravel(), minlength=cells)
    expected = values.size / cells
    chi_squared = ((counts - expected) ** 2).sum() / expected
    return float((chi_squared - (cells - 1)) / np.sqrt(2 * (cells - 1)))


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_order_of_a_few_windows_comes_out_as_often(size: int) -> None:
    num_orders = math.factorial(size)
    orders = [shuffled(np.arange(size), size, key) for key in range(30 * num_orders)]
    codes = np.stack(orders) @ size ** np.arange(size)
    _, which = np.unique(codes, return_inverse=True)
    assert abs(chi_squared_z(which, num_orders)) < 4


@pytest.mark.parametrize("size", [64, 1000, 1024, 4093])
def test_places_and_neighbours_are_uniform(size: int) -> None:
    rows = np.stack([shuffled(np.arange(size), size, "test", key) for key in range(1000)])
    for position in (0, 1, size // 2, size - 1):
        assert abs(chi_squared_z(rows[:, position], size)) < 4
    for distance in (1, 2, math.isqrt(size - 1) + 1, size // 2):
        steps = (rows[:, distance:] - rows[:, :-distance]) % size  # never 0
        assert abs(chi_squared_z(steps - 1, size - 1)) < 4, distance


@pytest.mark.parametrize("size", [4093, 10**6, 10**8, 2**40])
def test_positions_are_not_correlated_with_what_stands_there(size: int) -> None:
    positions = np.arange(min(size, 200_000))
    for epoch in range(3):
        drawn = shuffled(positions, size, 1, "order", epoch) / size - 0.5
        limit = 4 / math.sqrt(len(drawn))  # four standard deviations
        assert abs(12 * (drawn[1:] * drawn[:-1]).mean()) < limit  # neighbours
        assert abs(np.corrcoef(positions, drawn)[0, 1]) < limit
        other = shuffled(positions, size, 1, "order", epoch + 3) / size - 0.5
        assert abs(12 * (drawn * other).mean()) < limit  # epochs
        assert chi_squared_z(((drawn + 0.5) * 1000).astype(int), 1000) < 4  # none comes twice: less


def test_a_batch_of_a_hundred_million_windows_takes_memory_of_a_few_batches() -> None:
    order = BatchOrder(np.broadcast_to(np.int64(7), (100_000_000,)), per_batch=1024, seed=3)
    order.at(0)
    tracemalloc.start()
    batch = order.at(12_345_678)  # in epoch 126
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch.tolist() == [7] * 1024
    assert peak < 1e6  # of 8,192 positions, some arrays of 64 kB


def test_epoch_gives_every_window_at_most_once_and_drops_the_rest() -> None:
    order = BatchOrder(np.arange(100, 123), per_batch=5, seed=3)
    assert order.steps_per_epoch == 4
    first = np.concatenate([order.at(step) for step in range(4)])
    second = np.concatenate([order.at(step) for step in range(4, 8)])
    assert len(set(first)) == len(set(second)) == 20
    assert first.tolist() != second.tolist()
    assert set(first) <= set(range(100, 123))


def test_order_depends_on_step_and_seed_alone() -> None:
    order = BatchOrder(np.arange(50), per_batch=7, seed=1)
    batch = order.at(1000).tolist()
    for step in (3, 999, 0):
        order.at(step)
    assert BatchOrder(np.arange(50), per_batch=7, seed=1).at(1000).tolist() == batch
    assert BatchOrder(np.arange(50), per_batch=7, seed=2).at(1000).tolist() != batch


def test_batches_drawn_together_are_those_of_the_one_permutation() -> None:
    order = BatchOrder(np.arange(20_000), per_batch=3000, seed=1)  # two at once
    permutation = shuffled(np.arange(20_000), 20_000, 1, "order", 1)
    for batch in (5, 0, 1, 2):
        expected = permutation[3000 * batch : 3000 * (batch + 1)]
        assert np.array_equal(order.at(order.steps_per_epoch + batch), expected)


def test_fewer_windows_than_a_batch_are_refused() -> None:
    with pytest.raises(UsageError, match=r"6 training windows .* one batch takes 7: set a smaller"):
        BatchOrder(np.arange(6), per_batch=7, seed=0)


def test_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(UsageError, match="batch_size 9 on 2 processes: wanted a multiple of 2"):
        RankSlice(rank=0, num_ranks=2).of(9)


def test_split_is_by_clip_and_keeps_a_clips_side_when_the_cache_grows() -> None:
    keys = [f"clip{index}" for index in range(200)]
    clip_index = np.repeat(np.arange(200), 3)
    split = split_windows(keys, clip_index, 0.1)
    sides = {clip_index[window] for window in split.validation}
    assert sides.isdisjoint(clip_index[split.training])
    assert 5 < len(sides) < 40
    fewer = split_windows(keys[:100], clip_index[:300], 0.1)
    assert set(fewer.validation) == {window for window in split.validation if window < 300}


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_split_keeps_a_clip_on_either_side(fraction: float) -> None:
    split = split_windows(["a", "b", "c"], np.array([0, 0, 1, 2]), fraction)
    assert len(split.training) > 0
    assert len(split.validation) > 0


def test_split_of_nothing_or_of_one_clip_keeps_all_for_training() -> None:
    assert len(split_windows(["a", "b"], np.array([0, 1]), 0).validation) == 0
    assert len(split_windows(["a"], np.array([0, 0]), 0.5).validation) == 0


def test_evenly_spreads_over_all_windows() -> None:
    assert spread(np.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert spread(np.arange(3), 4).tolist() == [0, 1, 2]


def test_batch_holds_exactly_the_consecutive_pairs_of_its_windows(patches: Path) -> None:
    shards = PatchShards(patches)
    batches = tokenizer_batches(shards, batch_size=8)
    numbers, windows, frames = batches.pairs(5)
    assert batches.order.per_batch == 3
    assert numbers.tolist() == list(range(8))
    assert frames.tolist() == [[0, 1], [1, 2], [2, 3]] * 2 + [[0, 1], [1, 2]]
    batch = batches.read(5)
    previous, current = frames_of(batch)
    truth = torch.from_numpy(shards.tokens(windows))
    assert torch.equal(previous.float(), truth[torch.arange(8), frames[:, 0]])
    assert torch.equal(current.float(), truth[torch.arange(8), frames[:, 1]])
    assert batch.windows.tolist() == windows.tolist()


def test_ranks_together_read_the_batch_of_one_process(patches: Path) -> None:
    shards = PatchShards(patches)
    whole = tokenizer_batches(shards, batch_size=8, wide=0.5).read(3)
    parts = [
        tokenizer_batches(
            shards, batch_size=8, wide=0.5, ranks=RankSlice(rank=rank, num_ranks=4)
        ).read(3)
        for rank in range(4)
    ]
    assert np.concatenate([part.windows for part in parts]).tolist() == whole.windows.tolist()
    assert np.concatenate([part.samples for part in parts]).tolist() == whole.samples.tolist()
    for index in range(2):
        together = torch.cat([frames_of(part)[index] for part in parts])
        assert torch.equal(together, frames_of(whole)[index])


def test_wide_pairs_have_the_asked_share_and_stay_in_their_window(patches: Path) -> None:
    batches = tokenizer_batches(PatchShards(patches), batch_size=60, wide=0.4)
    gaps = np.concatenate([np.diff(batches.pairs(step)[2])[:, 0] for step in range(20)])
    assert 0.35 < (gaps > 1).mean() < 0.45
    assert set(gaps) == {1, 2, 3}


def test_too_short_windows_are_refused() -> None:
    with pytest.raises(UsageError, match=r"2 frames a window, wanted 3 .*wide_pair_fraction"):
        check_frames(2, least=3, why="wide_pair_fraction above 0")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_memory_gives_the_same_batch_as_the_files(
    make_patches: object, tmp_path: Path, dtype: str
) -> None:
    assert callable(make_patches)
    shards = PatchShards(make_patches(tmp_path / "patches", dtype=dtype))
    mapped, loaded = (
        tokenizer_batches(shards, residency=residency).read(4).tensors["frames"].float()
        for residency in ("map", "memory")
    )
    assert torch.equal(mapped, loaded)


def test_world_memory_gives_the_same_batch_as_the_files(deltas: Path) -> None:
    shards = DeltaShards(deltas)
    batches = [
        WindowBatches(
            shards,
            window_source(shards, residency=residency),
            np.arange(len(shards)),
            batch_size=8,
            seed=0,
            ranks=RankSlice(rank=1, num_ranks=2),
        ).read(4)
        for residency in ("map", "memory")
    ]
    for name in ("tokens", "timestamps"):
        assert torch.equal(batches[0].tensors[name], batches[1].tensors[name])
    assert batches[0].samples.tolist() == [4, 5, 6, 7]


def test_auto_residency_follows_the_free_memory(
    patches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = PatchShards(patches)
    loads: list[int] = []
    monkeypatch.setattr(
        shards, "load", lambda: loads.append(1) or PatchShards.load(shards), raising=True
    )
    for free, loaded in ((2 * shards.size_bytes, 1), (2 * shards.size_bytes - 2, 1)):
        monkeypatch.setattr(memory, "available_bytes", lambda free=free: free)
        window_source(shards, residency="auto")
        assert len(loads) == loaded


def test_container_limit_bounds_the_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available_bytes() == 600


def test_prefetcher_keeps_order_and_passes_errors_on() -> None:
    def read(step: int) -> int:
        if step == 5:
            raise UsageError("bad batch")
        return step

    with Prefetcher(read, start=2, stop=7) as batches:
        assert [batches.next() for _ in range(3)] == [2, 3, 4]
        with pytest.raises(UsageError, match="bad batch"):
            batches.next()


def test_time_comes_every_so_many_steps_and_at_the_end() -> None:
    assert [step for step in range(1, 8) if is_time(step, every=3, last=7)] == [3, 6, 7]
