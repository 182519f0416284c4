"""Writing patch-token shards: the order, the bytes, the largest value, and what is refused."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import CacheMismatch, DeltatokError, PatchShards
from deltatok.shards.files import sha256_file
from deltatok.shards.patches.layout import from_stored, to_bfloat16_bits
from deltatok.shards.patches.writer import write_patch_shard
from deltatok.shards.plan import window_order
from deltatok.shards.records import read_done
from deltatok.shards.tools.verify import verify_cache


def test_bfloat16_bits_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch's own rounding is the reference")
    special = np.array([0.0, -0.0, 1e-45, 3e-39, np.inf, -np.inf, np.nan], dtype=np.float32)
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = (np.arange(2000, dtype=np.uint32) << 16) + np.uint32(0x3F808000)
    values = np.concatenate([special, bits.view(np.float32), ties.view(np.float32)])
    got = from_stored(to_bfloat16_bits(values), "bfloat16")
    wanted = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(got, wanted)


def test_writing_twice_gives_the_same_bytes(little: Any, tmp_path: Path) -> None:
    first = little.make_patches(tmp_path / "first").folder
    second = little.make_patches(tmp_path / "second").folder
    files = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    assert len(files) == 2 * 2 + 7
    for name in files:
        assert sha256_file(first / name) == sha256_file(second / name), name


def test_windows_of_a_shard_are_permuted_by_seed_and_shard() -> None:
    orders = [window_order(64, seed=seed, shard=shard) for seed, shard in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert sorted(order.tolist()) == list(range(64))
    assert len({tuple(order) for order in (*orders, np.arange(64))}) == 4


def test_window_order_is_the_same_for_ever() -> None:
    """Pinned: another order would make a resumed cache differ from a finished one."""
    assert window_order(8, seed=7, shard=0).tolist() == [3, 0, 1, 6, 2, 4, 7, 5]


def test_done_record_has_the_largest_stored_value(patches: Any) -> None:
    record = read_done(patches.folder, 1)
    assert record is not None
    stored = patches.expected["tokens"][5:].astype(np.float16).astype(np.float64)
    assert (record.abs_max, record.beyond_float16) == (np.abs(stored).max(), 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 70000.0, -65505.0])
@pytest.mark.parametrize("window", [0, 3])
def test_writer_refuses_values_float16_cannot_hold_and_names_the_clip(
    patches: Any, value: float, window: int
) -> None:
    rows = copy.deepcopy(patches.rows[0])
    rows.tokens[window, 1, 2, 3] = value
    key = rows.keys[rows.clip[window]]
    with pytest.raises(DeltatokError, match=f"shard 000000: clip '{key}'"):
        write_patch_shard(patches.folder, 0, rows, dtype="float16", seed=7)
    assert verify_cache(patches.folder, deep=True).problems == []


def test_bfloat16_holds_what_float16_cannot(little: Any, tmp_path: Path) -> None:
    cache = little.make_patches(tmp_path / "cache", dtype="bfloat16")
    rows = copy.deepcopy(cache.rows[0])
    rows.tokens[:] = 2.0**100
    write_patch_shard(cache.folder, 0, rows, dtype="bfloat16", seed=7)
    assert (PatchShards(cache.folder).tokens([0]) == 2.0**100).all()


def test_huge_bfloat16_values_are_counted(little: Any, tmp_path: Path) -> None:
    cache = little.make_patches(tmp_path / "cache", dtype="bfloat16")
    rows = copy.deepcopy(cache.rows[0])
    rows.tokens[:3] = 2.0**126
    rows.tokens[3:] = -(2.0**126)
    record = write_patch_shard(cache.folder, 0, rows, dtype="bfloat16", seed=7)
    assert (record.abs_max, record.beyond_float16) == (2.0**126, rows.tokens.size)


def test_float16_rows_are_stored_as_they_are(patches: Any) -> None:
    rows = patches.rows[0]
    before = sha256_file(patches.folder / "shards/000000.json")
    rows = replace(rows, tokens=rows.tokens.astype(np.float16))
    write_patch_shard(patches.folder, 0, rows, dtype="float16", seed=7)
    assert sha256_file(patches.folder / "shards/000000.json") == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": np.zeros((5, 3, 4, 7), np.float32)}, r"tokens float32 \(5, 3, 4, 7\), wanted"),
        ({"tokens": np.zeros((5, 3, 4, 6), np.float64)}, "tokens float64"),
        ({"crop": np.zeros((5, 3), np.float32)}, r"crop is float32 \(5, 3\), wanted"),
        ({"frame_index": np.zeros((5, 3), np.int64)}, "frame_index is int64"),
        ({"clip": np.full(5, 3, np.int32)}, "outside of the 3 keys"),
        ({"clip": np.full(5, -1, np.int32)}, "outside of the 3 keys"),
    ],
)
def test_writer_refuses_rows_of_another_shape(
    patches: Any, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(CacheMismatch, match=words):
        write_patch_shard(
            patches.folder, 0, replace(patches.rows[0], **change), dtype="float16", seed=7
        )


def test_writer_refuses_another_dtype_than_the_caches(patches: Any) -> None:
    with pytest.raises(CacheMismatch, match=r"dtype bfloat16, cache\.json says float16"):
        write_patch_shard(patches.folder, 0, patches.rows[0], dtype="bfloat16", seed=7)


def test_shard_without_windows_is_only_a_done_record(little: Any, patches: Any) -> None:
    rows = replace(little.patch_rows(0, [], seed=0), quarantined=little.lost(patches.rows[0].keys))
    record = write_patch_shard(patches.folder, 0, rows, dtype="float16", seed=7)
    assert (record.rows, record.file) == (0, None)
    assert not (patches.folder / "shards/000000.zarr.zip").exists()
    little.finish_cache(patches.folder)
    np.testing.assert_array_equal(
        PatchShards(patches.folder).load(), patches.expected["tokens"][5:].astype(np.float16)
    )
