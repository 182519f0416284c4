"""Loaders and readers beside memory, memory-map, webdataset, zarr and tensorstore.

    python tests/benchmarks/loaders.py --folder BIG_DISK --json FILE

Makes synthetic caches with the real writers in a temporary folder below --folder: delta tokens of
8 x 768 in many shards, patch tokens of 256 and of 1,024 a frame; measures them by `deltatok-shards
bench`'s own code, warm and cold, and the plain libraries on the same files. Goals:
loader_over_memory >= 0.8 (deltas), loader_over_memmap >= 0.8 (patches), stream from cold files
above 50,000 windows/s or 0.8 of a sequential read. All ratios are of one run; rates are medians.
"""

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from deltatok.pipeline.bench import bench_cache
from deltatok.pipeline.commands.shards import BenchConfig
from deltatok.shards import CacheInfo, CacheShape, DeltaShards, PatchShards
from deltatok.shards.cache import finish_cache, open_cache
from deltatok.shards.deltas.writer import write_delta_shard
from deltatok.shards.patches.writer import write_black, write_patch_shard
from deltatok.shards.plan import PlanEntry, write_plan
from deltatok.shards.windows import ShardRows
from deltatok.train.data.order import StreamOrder
from deltatok.train.data.stream import DeltaBlocks, windows_of_group

sys.path.append(str(Path(__file__).parents[1] / "train" / "data"))
from shuffling import same_block_share

NUM_FRAMES, SIZE = 8, 768


def main() -> None:
    """Runs the benchmark; prints the result and writes it to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the caches are made")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--windows", type=int, default=300_000, help="delta windows [300000]")
    parser.add_argument("--shard-windows", type=int, default=4096, help="in a delta shard [4096]")
    parser.add_argument("--patch-gb", type=float, default=1.0, help="of each patch cache [1.0]")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with TemporaryDirectory(dir=arguments.folder) as name:
        result = _measure(Path(name), arguments)
    arguments.json.write_text(f"{json.dumps(result, indent=1)}\n")
    print(json.dumps(result, indent=1))


def _measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    deltas = make_deltas(folder / "deltas", arguments.windows, arguments.shard_windows)
    where = str(deltas)
    warm = bench_cache(BenchConfig(dir=where, residency=("memory", "map", "stream"), rounds=7))
    cold = bench_cache(
        BenchConfig(dir=where, residency=("stream", "map"), rounds=3, seconds=4.0, cold=True)
    )
    stream, disk = cold["rates"]["loader:stream"], cold["rates"]["disk"]
    result: dict[str, Any] = {
        "loader_over_memory": warm["loader_over_memory"],
        "stream_cold_windows_per_s": stream,
        "stream_cold_over_sequential_read": stream / disk,
        "webdataset_windows_per_s": webdataset_rate(deltas),
        "stream_shuffle": shuffle_figures(deltas),
        "deltas_warm": warm,
        "deltas_cold": cold,
    }
    for side in (16, 32):
        patches = make_patches(folder / f"patches-{side}", side, arguments.patch_gb)
        batch_size = 448 if side == 16 else 112
        found = bench_cache(
            BenchConfig(dir=str(patches), batch_size=batch_size, residency=("map",), rounds=7)
        )
        rates = found["rates"]
        result[f"patches_{side * side}"] = {
            "loader_over_memmap": found["loader_over_memmap"],
            "random_pairs_over_memmap": rates["reader_random_pairs"] / rates["memmap_random_pairs"],
            **plain_rates(patches),
            **found,
        }
    return result


def make_deltas(folder: Path, num_windows: int, shard_windows: int, *, size: int = SIZE) -> Path:
    """A finished delta cache of random tokens, of `size` channels."""
    num_shards = -(-num_windows // shard_windows)
    info = CacheInfo(
        format="deltatok-deltas",
        identity={"made": "at random"},
        shape=CacheShape(num_frames=NUM_FRAMES, num_tokens=None, grid=None, hidden_size=size),
    )
    open_cache(folder, info)
    keys = [f"clip{shard:06d}.mp4" for shard in range(num_shards)]
    entries = [PlanEntry(key=k, source=k, size_bytes=1, shard=i) for i, k in enumerate(keys)]
    write_plan(folder, entries)
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((shard_windows, NUM_FRAMES, size), dtype=np.float32)
    for shard, key in enumerate(keys):
        count = min(shard_windows, num_windows - shard * shard_windows)
        times = np.tile(np.arange(NUM_FRAMES, dtype=np.float32) / 5, (count, 1))
        rows = ShardRows(
            tokens=np.roll(tokens, shard, axis=0)[:count].astype(np.float16),
            timestamps_s=times,
            frame_index=np.tile(np.arange(NUM_FRAMES, dtype=np.int32), (count, 1)),
            crop=np.tile(np.array([0, 0, 8, 8], dtype=np.float32), (count, 1)),
            flipped=np.zeros(count, dtype=np.bool_),
            clip=np.zeros(count, dtype=np.int32),
            keys=[key],
        )
        write_delta_shard(folder, shard, rows)
    finish_cache(folder)
    return folder


def make_patches(folder: Path, side: int, gigabytes: float, *, size: int = SIZE) -> Path:
    """A finished float16 patch cache of random tokens, side x side a frame, of `size` channels."""
    shape = CacheShape(
        num_frames=NUM_FRAMES, num_tokens=side * side, grid=(side, side), hidden_size=size
    )
    identity = {"storage": {"dtype": "float16"}, "made": "at random"}
    open_cache(folder, CacheInfo(format="deltatok-patches", identity=identity, shape=shape))
    write_black(folder, np.zeros((side * side, size), dtype=np.float32))
    window_bytes = NUM_FRAMES * side * side * size * 2
    shard_windows = 512 // NUM_FRAMES if side == 16 else 128 // NUM_FRAMES
    num_shards = max(2, round(gigabytes * 1e9 / (window_bytes * shard_windows)))
    keys = [f"clip{shard:06d}.mp4" for shard in range(num_shards)]
    entries = [PlanEntry(key=k, source=k, size_bytes=1, shard=i) for i, k in enumerate(keys)]
    write_plan(folder, entries)
    rng = np.random.default_rng(0)
    tokens_shape = (shard_windows, NUM_FRAMES, side * side, size)
    tokens = rng.standard_normal(tokens_shape, dtype=np.float32).astype(np.float16)
    for shard, key in enumerate(keys):
        rows = ShardRows(
            tokens=np.roll(tokens, shard, axis=0),
            timestamps_s=np.tile(np.arange(NUM_FRAMES, dtype=np.float32) / 5, (shard_windows, 1)),
            frame_index=np.tile(np.arange(NUM_FRAMES, dtype=np.int32), (shard_windows, 1)),
            crop=np.tile(np.array([0, 0, 8, 8], dtype=np.float32), (shard_windows, 1)),
            flipped=np.zeros(shard_windows, dtype=np.bool_),
            clip=np.zeros(shard_windows, dtype=np.int32),
            keys=[key],
        )
        write_patch_shard(folder, shard, rows, dtype="float16", seed=0)
    finish_cache(folder)
    return folder


def webdataset_rate(folder: Path) -> float:
    """Windows/s of plain webdataset over the same tars, arrays decoded."""
    import webdataset  # here: training.py and tests/gpu take the caches alone

    urls = [str(path) for path in sorted(folder.glob("shards/*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("tokens.npy")
    count, start_s = 0, time.perf_counter()
    for (tokens,) in dataset:
        count += len(tokens)
        if time.perf_counter() - start_s > 5:
            break
    return count / (time.perf_counter() - start_s)


def shuffle_figures(folder: Path) -> dict[str, float]:
    """How well `stream` mixes: see same_block_share."""
    shards = DeltaShards(folder, verify="size")
    blocks = DeltaBlocks(shards)
    order = StreamOrder(
        np.arange(shards.num_windows),
        1024,
        0,
        block_starts=blocks.starts,
        group_windows=windows_of_group(blocks),
    )
    got, ideal = same_block_share(order, 3)
    return {
        "pairs_of_a_batch_from_one_block": got,
        "the_same_of_a_global_shuffle": ideal,
        "windows_mixed": float(windows_of_group(blocks)),
    }


def plain_rates(folder: Path) -> dict[str, float]:
    """Random consecutive pairs/s of zarr and tensorstore, by the recipes, on the same shards, and
    of this reader."""
    import tensorstore

    from deltatok.shards.recipes import patches_tensorstore, patches_zarr

    shards = PatchShards(folder)
    paths = sorted(folder.glob("shards/*.zarr.zip"))
    arrays = [patches_zarr.open_shard(path)["tokens"] for path in paths]
    stores = [
        tensorstore.KvStore.open(patches_tensorstore.open_zip(path)).result() for path in paths
    ]
    per_shard = shards.num_windows // len(paths)
    frame_bytes = math.prod(shards.shape[1:]) * 2
    rng = np.random.default_rng(1)

    def draw() -> tuple[int, int, int]:
        window = int(rng.integers(shards.num_windows))
        return window // per_shard, window % per_shard, int(rng.integers(NUM_FRAMES - 1))

    def by_zarr() -> None:
        shard, window, frame = draw()
        arrays[shard][window, frame : frame + 2]

    def by_tensorstore() -> None:
        shard, window, frame = draw()
        at = (window * NUM_FRAMES + frame) * (frame_bytes + 4)  # 4: the crc32c after each
        both = slice(at, at + 2 * frame_bytes + 4)
        stores[shard].read(patches_tensorstore.TOKENS, byte_range=both).result()

    def by_reader() -> None:
        shard, window, frame = draw()
        shards.stored_tokens([shard * per_shard + window], frames=[[frame, frame + 1]])

    contestants = {"zarr": by_zarr, "tensorstore": by_tensorstore, "deltatok": by_reader}
    return {f"single_random_pairs_per_s_{name}": rate for name, rate in _rates(contestants).items()}


def _rates(contestants: dict[str, Callable[[], None]]) -> dict[str, float]:
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(6):
        for name, contestant in contestants.items():
            count, start_s = 0, time.perf_counter()
            while time.perf_counter() - start_s < 0.4:
                contestant()
                count += 1
            rates[name].append(count / (time.perf_counter() - start_s))
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


if __name__ == "__main__":
    main()
