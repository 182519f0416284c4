"""Patch-token shards: what is written comes back, by our reader and by others'."""

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatok.shards import (
    CacheInfo,
    CacheMismatch,
    CacheShape,
    DamagedShard,
    DeltatokError,
    PatchRows,
    PatchShards,
    UsageError,
    open_cache,
    read_done,
    verify_cache,
    window_order,
    write_patch_shard,
)
from deltatok.shards.dtypes import from_stored, to_bfloat16_bits
from deltatok.shards.files import sha256_file


def test_float16_tokens_come_back_as_their_nearest_float16(patches: Any) -> None:
    wanted = patches.expected["tokens"].astype(np.float16)
    np.testing.assert_array_equal(PatchShards(patches.folder).load(), wanted)


def test_tokens_come_in_the_order_asked_across_shards_and_twice_if_asked(patches: Any) -> None:
    windows = np.array([10, 0, 7, 7, 3])
    got = PatchShards(patches.folder).tokens(windows)
    assert got.dtype == np.float32
    wanted = patches.expected["tokens"][windows].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(got, wanted)


def test_columns_come_back_with_their_windows(patches: Any) -> None:
    reader = PatchShards(patches.folder)
    windows = np.arange(11)[::-1]
    for name in ("timestamps_s", "frame_index"):
        np.testing.assert_array_equal(
            getattr(reader, name)(windows), patches.expected[name][windows]
        )
    np.testing.assert_array_equal(reader.crop, patches.expected["crop"])
    np.testing.assert_array_equal(reader.flipped, patches.expected["flipped"])
    assert [reader.keys[clip] for clip in reader.clip_index] == patches.expected["key"].tolist()


def test_reader_tells_what_the_cache_holds(patches: Any) -> None:
    reader = PatchShards(patches.folder, verify="sha256")
    assert (len(reader), reader.shape, reader.grid) == (11, (3, 4, 6), (2, 2))
    assert reader.fingerprint == patches.info.fingerprint
    assert sorted(reader.keys) == sorted(entry.key for entry in patches.plan)
    assert reader.size_bytes == reader.load().nbytes
    np.testing.assert_array_equal(reader.black, np.full((4, 6), 0.25, dtype=np.float32))


def test_bfloat16_tokens_come_back_rounded_to_nearest_even(little: Any, tmp_path: Path) -> None:
    cache = little.make_patches(tmp_path / "cache", dtype="bfloat16")
    reader = PatchShards(cache.folder)
    wanted = from_stored(to_bfloat16_bits(cache.expected["tokens"]), "bfloat16")
    np.testing.assert_array_equal(reader.load(), wanted)
    np.testing.assert_array_equal(reader.tokens(np.arange(11)), wanted)
    assert reader.stored_tokens([0]).dtype == np.uint16
    assert reader.load().nbytes == reader.size_bytes
    relative = np.abs(wanted / cache.expected["tokens"] - 1)
    assert relative.max() <= 2**-8


def test_bfloat16_bits_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch's own rounding is the reference")
    special = np.array([0.0, -0.0, 1e-45, 3e-39, np.inf, -np.inf, np.nan], dtype=np.float32)
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = (np.arange(2000, dtype=np.uint32) << 16) + np.uint32(0x3F808000)
    values = np.concatenate([special, bits.view(np.float32), ties.view(np.float32)])
    got = from_stored(to_bfloat16_bits(values), "bfloat16")
    wanted = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(got, wanted)


def test_out_is_filled_and_returned(patches: Any) -> None:
    reader = PatchShards(patches.folder)
    out = np.empty((2, 3, 4, 6), dtype=np.float32)
    assert reader.tokens([1, 2], out=out) is out
    np.testing.assert_array_equal(out, reader.tokens([1, 2]))
    with pytest.raises(ValueError, match="wanted C-contiguous float32"):
        reader.tokens([1], out=out)


@pytest.mark.parametrize("windows", [[11], [-1], [0, 99]])
def test_reader_refuses_windows_that_are_not_there(patches: Any, windows: list[int]) -> None:
    with pytest.raises(IndexError, match=r"cache has 0\.\.10"):
        PatchShards(patches.folder).tokens(windows)


@pytest.mark.parametrize("windows", [[0.5], [[1, 2]], [True], ["0"]])
def test_reader_refuses_what_is_no_window_number(patches: Any, windows: list[Any]) -> None:
    with pytest.raises(TypeError, match="wanted integers"):
        PatchShards(patches.folder).tokens(windows)


def test_no_windows_give_an_empty_array(patches: Any) -> None:
    assert PatchShards(patches.folder).tokens([]).shape == (0, 3, 4, 6)


def test_reader_gives_what_plain_zarr_gives(patches: Any) -> None:
    reader = PatchShards(patches.folder)
    groups = [
        zarr.open_group(str(patches.folder / f"shards/00000{n}.zarr"), mode="r") for n in (0, 1)
    ]
    tokens = np.concatenate([np.asarray(group["tokens"][...]) for group in groups])
    np.testing.assert_array_equal(reader.load(), tokens)
    for name in ("timestamps_s", "frame_index"):
        plain = np.concatenate([np.asarray(group[name][...]) for group in groups])
        np.testing.assert_array_equal(getattr(reader, name)(np.arange(11)), plain)


def test_reader_reads_a_shard_that_zarr_encoded_itself(patches: Any) -> None:
    """Zarr puts the chunks of a shard in another order than ours; the index says where."""
    path = patches.folder / "shards/000001.zarr"
    before = PatchShards(patches.folder).load()
    array = zarr.open_group(str(path), mode="r+")["tokens"]
    tokens_file = path / "tokens/c/0/0/0/0"
    ours = tokens_file.read_bytes()
    array[...] = np.asarray(array[...])
    assert tokens_file.read_bytes() != ours
    assert tokens_file.stat().st_size == len(ours)
    np.testing.assert_array_equal(PatchShards(patches.folder).load(), before)


def test_shard_reads_with_plain_zarr_alone(
    patches: Any, run_script: Callable[..., str], tmp_path: Path
) -> None:
    np.save(tmp_path / "wanted.npy", patches.expected["tokens"][:5].astype(np.float16))
    run_script(
        """
import sys, numpy, zarr
group = zarr.open(sys.argv[1], mode="r")
tokens = group["tokens"]
assert tokens.shape == (5, 3, 4, 6) and tokens.dtype == "float16", tokens
assert tokens.chunks == (1, 1, 4, 6) and tokens.shards == tokens.shape, tokens
assert (tokens[...] == numpy.load(sys.argv[2])).all()
assert (tokens[3, 1] == numpy.load(sys.argv[2])[3, 1]).all()
assert group["timestamps_s"].attrs["unit"] == "s"
assert group["crop"].shape == (5, 4) and group["flipped"].dtype == bool
assert [group.attrs["keys"][clip] for clip in group["clip"][...]]
assert group.attrs["licence"] == "DINOv3 License"
assert "deltatok" not in sys.modules
""",
        patches.folder / "shards/000000.zarr",
        tmp_path / "wanted.npy",
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shard_reads_with_tensorstore(little: Any, tmp_path: Path, dtype: str) -> None:
    tensorstore = pytest.importorskip("tensorstore", reason="another reader, not a dependency")
    cache = little.make_patches(tmp_path / "cache", dtype=dtype)
    group = cache.folder / "shards/000000.zarr"

    def read(name: str) -> np.ndarray:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{group / name}/"}}
        return np.asarray(tensorstore.open(spec, open=True).result().read().result())

    reader = PatchShards(cache.folder)
    np.testing.assert_array_equal(read("tokens"), reader.stored_tokens(np.arange(5)))
    np.testing.assert_array_equal(read("timestamps_s"), reader.timestamps_s(np.arange(5)))
    np.testing.assert_array_equal(read("flipped"), reader.flipped[:5])


def test_writing_twice_gives_the_same_bytes(little: Any, tmp_path: Path) -> None:
    first = little.make_patches(tmp_path / "first").folder
    second = little.make_patches(tmp_path / "second").folder
    files = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    assert len(files) == 2 * 14 + 4
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


def test_done_record_has_statistics_of_the_stored_values(patches: Any) -> None:
    record = read_done(patches.folder, 1)
    assert record is not None
    stored = patches.expected["tokens"][5:].astype(np.float16).astype(np.float64).reshape(-1, 6)
    np.testing.assert_allclose(record.statistics["channel_mean"], stored.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(record.statistics["channel_std"], stored.std(axis=0), rtol=1e-5)
    assert record.statistics["abs_max"] == np.abs(stored).max()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 70000.0, -65505.0])
@pytest.mark.parametrize("window", [0, 3])
def test_writer_refuses_values_float16_cannot_hold_and_names_the_clip(
    patches: Any, value: float, window: int
) -> None:
    rows = copy.deepcopy(patches.rows[0])
    rows.tokens[window, 1, 2, 3] = value
    key = rows.keys[rows.clip[window]]
    with pytest.raises(DeltatokError, match=f"shard 000000: clip '{key}'") as caught:
        write_patch_shard(patches.folder, 0, rows, dtype="float16", seed=7)
    counts = "1 of 72 token values are not finite and 0"
    if np.isfinite(value):
        counts = "0 of 72 token values are not finite and 1"
    assert counts in str(caught.value)
    assert verify_cache(patches.folder).problems == []


def test_bfloat16_holds_what_float16_cannot(little: Any, tmp_path: Path) -> None:
    cache = little.make_patches(tmp_path / "cache", dtype="bfloat16")
    rows = copy.deepcopy(cache.rows[0])
    rows.tokens[:] = 2.0**100
    write_patch_shard(cache.folder, 0, rows, dtype="bfloat16", seed=7)
    assert (PatchShards(cache.folder).tokens([0]) == 2.0**100).all()


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
    with pytest.raises(UsageError, match="wanted one of float16, bfloat16"):
        write_patch_shard(patches.folder, 0, patches.rows[0], dtype="int4", seed=7)


def test_shard_without_windows_is_only_a_done_record(little: Any, patches: Any) -> None:
    rows = little.patch_rows(0, [], seed=0)
    record = write_patch_shard(patches.folder, 0, rows, dtype="float16", seed=7)
    assert (record.rows, record.files) == (0, {})
    assert not (patches.folder / "shards/000000.zarr").exists()
    little.finish_cache(patches.folder, {})
    np.testing.assert_array_equal(
        PatchShards(patches.folder).load(), patches.expected["tokens"][5:].astype(np.float16)
    )


def test_threads_may_read_together(patches: Any) -> None:
    reader = PatchShards(patches.folder)
    wanted = patches.expected["tokens"].astype(np.float16)
    wrong: list[int] = []

    def read(seed: int) -> None:
        windows = np.random.default_rng(seed).integers(0, 11, 200)
        if not np.array_equal(reader.stored_tokens(windows), wanted[windows]):
            wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_may_go_on_reading_with_an_open_reader(
    patches: Any, run_script: Callable[..., str], method: str
) -> None:
    """Half of the reading is done before the processes start, half in them."""
    run_script(
        """
import multiprocessing, sys
from deltatok.shards import PatchShards

def total(reader):
    return float(reader.tokens(range(len(reader))).astype("float64").sum())

if __name__ == "__main__":
    reader = PatchShards(sys.argv[1])
    wanted = total(reader)
    context = multiprocessing.get_context(sys.argv[2])
    with context.Pool(2) as pool:
        assert pool.map(total, [reader] * 4, chunksize=1) == [wanted] * 4
    process = context.Process(target=total, args=(reader,))
    process.start()
    process.join()
    assert process.exitcode == 0 and total(reader) == wanted
    assert not {"zarr", "torch"} & set(sys.modules)
""",
        patches.folder,
        method,
    )


def test_a_pickled_reader_opens_the_same_cache(patches: Any) -> None:
    reader = pickle.loads(pickle.dumps(PatchShards(patches.folder)))
    np.testing.assert_array_equal(reader.load(), PatchShards(patches.folder).load())


def test_reader_keeps_few_files_open(patches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltatok.shards.patches.MAX_OPEN_FILES", 1)
    reader = PatchShards(patches.folder)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for window in (0, 10, 0, 10):
        reader.tokens([window])
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    del reader
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@settings(deadline=None, max_examples=25)
@given(
    windows=st.integers(1, 4),
    frames=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    channels=st.integers(1, 5),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_any_shape_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    windows: int,
    frames: int,
    grid: tuple[int, int],
    channels: int,
    dtype: str,
    seed: int,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    num_tokens = grid[0] * grid[1]
    shape = CacheShape(num_frames=frames, num_tokens=num_tokens, grid=grid, hidden_size=channels)
    identity = {"storage": {"dtype": dtype}}
    open_cache(folder, CacheInfo(format="deltatok-patches", identity=identity, shape=shape))
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((windows, frames, num_tokens, channels)).astype(np.float32)
    rows = PatchRows(
        tokens=tokens * np.float32(10.0 ** rng.integers(-9, 4)),
        timestamps_s=rng.random((windows, frames)).astype(np.float32),
        frame_index=rng.integers(0, 9, (windows, frames)).astype(np.int32),
        crop=rng.random((windows, 4)).astype(np.float32),
        flipped=rng.random(windows) < 0.5,
        clip=np.zeros(windows, np.int32),
        keys=["é☃.mp4"],
    )
    write_patch_shard(folder, 3, rows, dtype=dtype, seed=seed)
    reader = PatchShards(folder, allow_incomplete=True)
    asked = data.draw(st.lists(st.integers(0, windows - 1), max_size=6))
    stored = rows.tokens[window_order(windows, seed=seed, shard=3)]
    if dtype == "float16":
        wanted = stored.astype(np.float16).astype(np.float32)
    else:
        wanted = from_stored(to_bfloat16_bits(stored), "bfloat16")
    np.testing.assert_array_equal(reader.tokens(asked), wanted[np.array(asked, dtype=int)])
    assert reader.keys == ["é☃.mp4"]


def test_importing_shards_imports_no_torch_zarr_or_webdataset(
    run_script: Callable[..., str],
) -> None:
    run_script(
        "import sys, deltatok.shards\n"
        "loaded = {'torch', 'zarr', 'webdataset'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )


def test_reader_refuses_a_shard_of_another_cache(little: Any, patches: Any, tmp_path: Path) -> None:
    other = open_cache(
        tmp_path / "other", little.patch_info(identity={"storage": {"dtype": "float16"}})
    )
    assert other.fingerprint != patches.info.fingerprint
    for shard in range(2):
        name = f"shards/00000{shard}"
        (patches.folder / f"{name}.zarr").rename(tmp_path / "other" / f"{name}.zarr")
        (patches.folder / f"{name}.json").rename(tmp_path / "other" / f"{name}.json")
    reader = PatchShards(tmp_path / "other", allow_incomplete=True)
    with pytest.raises(CacheMismatch, match=r"attribute fingerprint is not that of cache\.json"):
        reader.timestamps_s([0])


def test_reader_refuses_black_tokens_that_changed(little: Any, patches: Any) -> None:
    little.flip_byte(patches.folder / "black.npy", -1)
    with pytest.raises(DamagedShard, match=r"black\.npy: was changed"):
        _ = PatchShards(patches.folder).black
