"""Streaming: whole blocks in a random order; the same windows as read directly, mixed well."""

import itertools
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltatok.shards import DeltaShards, PatchShards, read_cache_info
from deltatok.shards.errors import CacheMismatch
from deltatok.shards.tools.export import export_cache
from deltatok.train.data import residency as sources
from deltatok.train.data.batches import Prefetcher
from deltatok.train.data.order import StreamOrder
from deltatok.train.data.residency import choose_place, window_source
from deltatok.train.data.stream import (
    NUM_BUFFERS,
    BufferRing,
    DeltaBlocks,
    PatchBlocks,
    StreamRows,
)
from deltatok.train.world import train_world

sys.path.append(str(Path(__file__).parent))
from shuffling import same_block_share


def order_of(num_windows: int, block: int, **changes: Any) -> StreamOrder:
    starts = np.append(np.arange(0, num_windows, block), num_windows)
    fields = {"per_batch": 10, "seed": 3, "group_windows": 4 * block} | changes
    windows = fields.pop("windows", np.arange(num_windows))
    return StreamOrder(
        windows,
        fields["per_batch"],
        fields["seed"],
        block_starts=starts,
        group_windows=fields["group_windows"],
    )


@pytest.mark.parametrize("epoch", [0, 1])
def test_epoch_has_every_window_at_most_once_and_drops_the_last_batch(epoch: int) -> None:
    order = order_of(205, 7)
    assert order.steps_per_epoch == 20
    steps = range(20 * epoch, 20 * (epoch + 1))
    seen = np.concatenate([order.at(step) for step in steps])
    assert len(np.unique(seen)) == 200


def test_windows_kept_for_validation_are_left_out() -> None:
    training = np.flatnonzero(np.arange(200) % 5)
    order = order_of(200, 8, windows=training)
    seen = np.concatenate([order.at(step) for step in range(order.steps_per_epoch)])
    assert set(seen.tolist()) == set(training.tolist())


def test_a_group_is_used_up_before_the_next_is_begun() -> None:
    order = order_of(320, 8)
    seen = np.concatenate([order.at(step) for step in range(32)])
    groups = (seen // 8).reshape(10, 32)
    assert all(len(np.unique(group)) == 4 for group in groups)
    assert any(not np.array_equal(group, np.sort(group)) for group in groups)


def test_blocks_of_any_sizes_some_without_windows_give_each_window_once() -> None:
    rng = np.random.default_rng(7)
    starts = np.append(0, np.cumsum(rng.integers(1, 20, 60)))
    training = np.flatnonzero(np.repeat(rng.random(60) < 0.6, np.diff(starts)))  # whole blocks
    for group_windows in (1, 100, 10**6):
        order = StreamOrder(
            training, 1, 0, block_starts=starts, group_windows=group_windows
        )  # batches of one: none is dropped
        for epoch in range(2):
            steps = range(epoch * len(training), (epoch + 1) * len(training))
            assert np.array_equal(np.sort([order.at(step)[0] for step in steps]), training)


def test_of_a_large_cache_an_epoch_of_blocks_is_drawn_in_small_memory() -> None:
    starts = np.append(np.arange(0, 4_000_000, 4), 4_000_000)  # a million blocks
    order = order_of(4_000_000, 4, per_batch=1024, group_windows=4096)
    assert len(order.block_starts) == len(starts)
    order.at(0)  # how many windows lie before every block: once a run
    tracemalloc.start()
    batch = order.at(order.steps_per_epoch + 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(batch)) == 1024
    assert peak < 6e6  # 65,536 blocks at a time; 32 MB would be a table of the windows


def test_epochs_and_seeds_differ_and_steps_are_reproducible() -> None:
    order = order_of(320, 8)
    assert np.array_equal(order.at(5), order_of(320, 8).at(5))
    assert not np.array_equal(order.at(5), order.at(5 + 32))
    assert not np.array_equal(order.at(5), order_of(320, 8, seed=4).at(5))


def test_larger_groups_mix_better() -> None:
    shares = [
        np.mean([same_block_share(order_of(3200, 8, group_windows=g), s)[0] for s in range(20)])
        for g in (16, 160, 3200)
    ]
    ideal = same_block_share(order_of(3200, 8), 0)[1]
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] == pytest.approx(ideal, abs=0.003)


@pytest.mark.parametrize("group_windows", [1, 3, 1000])
def test_blocks_give_the_windows_that_the_reader_gives(
    deltas: Path, patches: Path, group_windows: int
) -> None:
    rng = np.random.default_rng(0)
    delta_shards, patch_shards = DeltaShards(deltas), PatchShards(patches)
    delta_rows = StreamRows(DeltaBlocks(delta_shards), group_windows=group_windows)
    patch_rows = StreamRows(PatchBlocks(patch_shards), group_windows=group_windows)
    for _ in range(20):
        windows = rng.integers(0, len(delta_shards), 9)
        tokens, times = delta_rows(windows)
        assert np.array_equal(tokens.numpy(), delta_shards.tokens(windows))
        assert np.array_equal(times.numpy(), delta_shards.timestamps_s(windows))
        windows = rng.integers(0, len(patch_shards), 9)
        assert np.array_equal(patch_rows(windows)[0].numpy(), patch_shards.stored_tokens(windows))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_blocks_of_other_dtypes_give_values(
    make_patches: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    shards = PatchShards(make_patches(tmp_path / "patches", dtype=dtype))
    rows = StreamRows(PatchBlocks(shards), group_windows=4)
    windows = np.array([5, 0, 17, 5])
    assert np.array_equal(rows(windows)[0].numpy(), shards.tokens(windows))


def test_blocks_of_a_delta_cache_are_read_whole(deltas: Path) -> None:
    shards = DeltaShards(deltas)
    starts = shards.block_starts
    assert starts[0] == 0 and starts[-1] == len(shards)
    for block, (start, stop) in enumerate(itertools.pairwise(starts)):
        wanted = shards.tokens(np.arange(start, stop))
        assert np.array_equal(shards.read_block(block), wanted)


@pytest.mark.parametrize("residency", ["device", "memory", "map", "stream"])
def test_a_batch_is_valid_until_so_many_further_ones_are_asked_for(
    deltas: Path, residency: Any
) -> None:
    shards = DeltaShards(deltas)
    for name in ("read", "read_any"):
        read = getattr(window_source(shards, residency=residency), name)
        held: deque[tuple[int, tuple[torch.Tensor, ...]]] = deque(maxlen=NUM_BUFFERS)
        for step in range(20):
            held.append((step, read(np.arange(step, step + 4))))
            for first, (tokens, times) in held:
                windows = np.arange(first, first + 4)
                assert np.array_equal(tokens.numpy(), shards.tokens(windows))
                assert np.array_equal(times.numpy(), shards.timestamps_s(windows))


@pytest.mark.parametrize("residency", ["device", "memory", "map", "stream"])
def test_what_is_read_to_be_kept_is_never_written_over_nor_costs_a_batch(
    deltas: Path, residency: Any
) -> None:
    shards = DeltaShards(deltas)
    source = window_source(shards, residency=residency)
    batch = source.read(np.arange(4))
    kept = [source.read_to_keep(np.arange(step, step + 4)) for step in range(20)]
    assert np.array_equal(batch[0].numpy(), shards.tokens(np.arange(4)))
    for step in range(20):
        source.read(np.arange(step, step + 4))
    for step, (tokens, times) in enumerate(kept):
        assert np.array_equal(tokens.numpy(), shards.tokens(np.arange(step, step + 4)))
        assert np.array_equal(times.numpy(), shards.timestamps_s(np.arange(step, step + 4)))


def test_no_batch_is_written_over_while_it_is_computed_on() -> None:
    """A step looks at its batch as long as it can."""
    ring, delays = BufferRing(NUM_BUFFERS), np.random.default_rng(0)

    def read(step: int) -> torch.Tensor:
        batch = ring.take((1000,), np.dtype(np.int64))
        time.sleep(delays.uniform(0, 1e-3))
        return batch.fill_(step)

    with Prefetcher(read, start=0, stop=200) as batches:
        for step in range(200):
            batch = batches.next()
            time.sleep(delays.uniform(0, 1e-3))
            assert (batch == step).all()


def test_buffers_are_handed_out_in_turn_and_grow_to_the_largest() -> None:
    ring, dtype = BufferRing(2), np.dtype(np.float16)
    first, second = (ring.take((4, 5), dtype) for _ in range(2))
    third = ring.take((5, 2), np.dtype(np.float32))
    assert third.data_ptr() == first.data_ptr() and third.dtype == torch.float32
    assert second.data_ptr() != first.data_ptr()
    larger = ring.take((40, 5), dtype)
    assert larger.shape == (40, 5) and larger.data_ptr() != second.data_ptr()
    ring.take((1,), dtype)
    assert ring.take((4, 5), dtype).data_ptr() == larger.data_ptr()
    assert ring.take((0, 5), dtype).shape == (0, 5)


def test_a_cache_without_windows_gives_none() -> None:
    class Nothing:
        starts = np.zeros(1, dtype=np.int64)
        row_bytes = 8

        def buffers(self, num_windows: int) -> list[torch.Tensor]:
            return [torch.empty((num_windows, 4), dtype=torch.float16)]

        def read(self, block: int, out: Sequence[torch.Tensor]) -> None:
            raise AssertionError("there is no block")

    (rows,) = StreamRows(Nothing(), group_windows=4)(np.array([], dtype=np.int64))
    assert rows.shape == (0, 4)


@pytest.mark.parametrize(
    ("free", "place"), [(1000, "memory"), (600, "map"), (100, "stream"), (0, "stream")]
)
def test_auto_takes_the_first_place_with_room(
    monkeypatch: pytest.MonkeyPatch, free: int, place: str
) -> None:
    monkeypatch.setattr(sources, "available_bytes", lambda: free)
    assert choose_place(500, residency="auto") == place
    assert choose_place(500, residency="map") == "map"


def test_a_run_goes_on_in_the_order_it_began_with(world_config: Callable[..., Any]) -> None:
    train_world(world_config(residency="stream", steps=2))
    with pytest.raises(CacheMismatch, match="data order is 'shuffled blocks'"):
        train_world(world_config(residency="memory", steps=4))
    train_world(world_config(residency="stream", steps=4))


def test_a_run_goes_on_only_with_the_windows_under_the_same_numbers(
    world_config: Callable[..., Any], deltas: Path, tmp_path: Path
) -> None:
    train_world(world_config(steps=2))
    export_cache([deltas], tmp_path / "again", clips_per_shard=1)
    assert read_cache_info(tmp_path / "again").fingerprint == read_cache_info(deltas).fingerprint
    with pytest.raises(CacheMismatch, match="data windows is 'sha256:"):
        train_world(world_config(deltas=str(tmp_path / "again"), steps=4))


def test_patch_source_streams_in_blocks_within_a_shard(patches: Path) -> None:
    shards = PatchShards(patches)
    order = window_source(shards, residency="stream").order(np.arange(len(shards)), 4, 0)
    assert isinstance(order, StreamOrder)
    assert set(shards.shard_starts.tolist()) <= set(order.block_starts.tolist())
