"""Patch-token shards: what is written comes back through the reader."""

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatok.shards import (
    CacheInfo,
    CacheMismatch,
    CacheShape,
    DamagedShard,
    PatchShards,
)
from deltatok.shards.cache import open_cache
from deltatok.shards.patches.layout import from_stored, to_bfloat16_bits
from deltatok.shards.patches.writer import write_patch_shard
from deltatok.shards.plan import PlanEntry, window_order, write_plan
from deltatok.shards.windows import ShardRows


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
    monkeypatch.setattr("deltatok.shards.patches.reader.MAX_OPEN_FILES", 1)
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
    rows = ShardRows(
        tokens=tokens * np.float32(10.0 ** rng.integers(-9, 4)),
        timestamps_s=rng.random((windows, frames)).astype(np.float32),
        frame_index=rng.integers(0, 9, (windows, frames)).astype(np.int32),
        crop=rng.random((windows, 4)).astype(np.float32),
        flipped=rng.random(windows) < 0.5,
        clip=np.zeros(windows, np.int32),
        keys=["é☃.mp4"],
    )
    clips = [PlanEntry(key=f"{n}.mp4", source="", size_bytes=1, shard=n) for n in range(3)]
    write_plan(folder, [*clips, PlanEntry(key=rows.keys[0], source="", size_bytes=1, shard=3)])
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
        (patches.folder / f"{name}.zarr.zip").rename(tmp_path / "other" / f"{name}.zarr.zip")
        (patches.folder / f"{name}.json").rename(tmp_path / "other" / f"{name}.json")
    reader = PatchShards(tmp_path / "other", allow_incomplete=True)
    with pytest.raises(CacheMismatch, match=r"attribute fingerprint is not that of cache\.json"):
        reader.timestamps_s([0])


def test_reader_refuses_black_tokens_that_changed(little: Any, patches: Any) -> None:
    little.flip_byte(patches.folder / "black.npy", -1)
    with pytest.raises(DamagedShard, match=r"black\.npy: was changed"):
        _ = PatchShards(patches.folder).black
