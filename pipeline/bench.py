"""How fast a cache is read, beside what limits it, measured in one run: `deltatok-shards bench`.

All contestants take turns in short rounds on the same order of windows, and the median of a
contestant's rounds counts: machines are noisy, only the ratios mean something. Beside
them stands what no reader of a cache can beat: its files mapped raw, and read from end to end.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..evaluate.tables import markdown_table
from ..shards.cache import PATCHES, read_cache_info
from ..shards.deltas.reader import DeltaShards
from ..shards.errors import CacheMismatch, UsageError
from ..shards.patches.archive import ShardFile
from ..shards.patches.layout import SUFFIX, TOKENS_CHUNK, member_names
from ..shards.patches.reader import PatchShards
from ..train.data.batches import TokenizerBatches, WindowBatches
from ..train.data.order import BatchOrder, RankSlice
from ..train.data.residency import choose_place, fits_in_memory, window_source
from .commands.shards import BenchConfig

READ_BYTES = 8 * 2**20
"""Of one read of a file from end to end."""

Contestant = Callable[[int], float]
"""A step -> the windows (or pairs) that were read."""


def bench_cache(config: BenchConfig) -> dict[str, Any]:
    """Windows/s of a delta-token cache, pairs of frames/s of a patch-token cache: "rates" of every
    contestant, that of the loader in the headline and its ratio to what limits it.

    Raises what opening the cache does, CacheMismatch for one that is not finished, UsageError for
    one that holds nothing to measure.
    """
    info = read_cache_info(config.dir)
    if not info.complete:
        raise CacheMismatch(
            f"{config.dir}: is not finished: first let the command that makes it come to its end"
        )
    if info.counts.get("windows", 0) == 0:
        raise UsageError(f"{config.dir}: holds no windows, so there is nothing to measure")
    if info.format == PATCHES:
        return _bench_patches(PatchShards(config.dir), config)
    return _bench_deltas(DeltaShards(config.dir, verify="size"), config)


def _bench_deltas(shards: DeltaShards, config: BenchConfig) -> dict[str, Any]:
    windows = np.arange(shards.num_windows)
    batch_size = min(config.batch_size or 1024, len(windows))
    order = BatchOrder(windows, batch_size, 0)
    num_frames, size = shards.shape
    files = sorted(shards.folder.glob("shards/*.tar"))
    contestants: dict[str, Contestant] = {}
    if fits_in_memory(shards.size_bytes):
        tokens, times = (torch.from_numpy(array) for array in shards.load())
        gathered = torch.empty((batch_size, num_frames, size), dtype=torch.float16)

        def gather(step: int) -> float:
            chosen = torch.from_numpy(order.at(step))
            torch.index_select(times, 0, chosen)
            return len(torch.index_select(tokens, 0, chosen, out=gathered))

        contestants["in_memory"] = gather
    contestants["reader"] = lambda step: len(shards.tokens(order.at(step)))
    contestants["disk"] = _end_to_end(files, window_bytes=num_frames * size * 2)
    for residency in (places := _places(shards, config)):
        batches = WindowBatches(
            shards,
            window_source(shards, residency=residency),
            windows,
            batch_size=batch_size,
            seed=0,
            ranks=RankSlice(),
        )
        contestants[f"loader:{residency}"] = _counted(batches.read, batch_size)
    rates = _measure(contestants, config, files, release=shards.release)
    return _report("windows", rates, "in_memory", "loader_over_memory", places[0]) | {
        "windows": len(windows),
        "shards": len(files),
        "window_bytes": num_frames * size * 2,
    }


def _bench_patches(shards: PatchShards, config: BenchConfig) -> dict[str, Any]:
    """Loaders, reader and raw mapped files on whole windows, the last two also on random pairs."""
    num_frames = shards.shape[0]
    if num_frames < 2:
        raise UsageError(f"{shards.folder}: 1 frame a window, wanted 2 or more: there are no pairs")
    windows, pairs_each = np.arange(shards.num_windows), num_frames - 1
    per_batch = -(-min(config.batch_size or 448, len(windows) * pairs_each) // pairs_each)
    order = BatchOrder(windows, per_batch, 0)
    pairs = BatchOrder(np.arange(len(windows) * pairs_each), per_batch, 0)
    files = sorted(shards.folder.glob(f"shards/*{SUFFIX}"))
    members = [ShardFile(path, member_names(shards.dtype)).members[TOKENS_CHUNK] for path in files]
    dtype = np.dtype({"float16": "<f2", "bfloat16": "<u2", "int8": "|i1"}[shards.dtype])
    whole = np.empty((per_batch, *shards.shape), dtype=dtype)
    two = np.empty((per_batch, 2, *shards.shape[1:]), dtype=dtype)
    frame_bytes = two[0, 0].nbytes
    rows = np.diff(shards.shard_starts)

    @functools.cache
    def mapped(shard: int) -> NDArray[Any]:
        """The shard's tokens in its file: no checks. Behind every frame come 4 bytes of checksum,
        behind all the index."""
        shape = (rows[shard], num_frames, frame_bytes + 4)
        offset = members[shard].offset
        raw = np.memmap(files[shard], dtype=np.uint8, mode="r", shape=shape, offset=offset)
        frames = np.asarray(raw)[..., :frame_bytes].view(dtype)
        return frames.reshape(*frames.shape[:2], *shards.shape[1:])

    def place(window: int) -> tuple[int, int]:
        shard = int(np.searchsorted(shards.shard_starts, window, side="right")) - 1
        return shard, window - int(shards.shard_starts[shard])

    def memmap(step: int) -> float:
        for number, window in enumerate(order.at(step).tolist()):
            shard, row = place(window)
            whole[number] = mapped(shard)[row]
        return per_batch * pairs_each

    def memmap_pairs(step: int) -> float:
        for number, pair in enumerate(pairs.at(step).tolist()):
            window, frame = divmod(pair, pairs_each)
            shard, row = place(window)
            two[number] = mapped(shard)[row, frame : frame + 2]
        return per_batch

    def reader(step: int) -> float:
        shards.stored_tokens(order.at(step), out=whole)
        return per_batch * pairs_each

    def reader_pairs(step: int) -> float:
        chosen, frame = np.divmod(pairs.at(step), pairs_each)
        return len(shards.stored_tokens(chosen, frames=np.stack([frame, frame + 1], 1), out=two))

    contestants: dict[str, Contestant] = {}
    sizes = [member.size for member in members]
    if sizes == [int(n) * num_frames * (frame_bytes + 20) + 4 for n in rows]:  # not compressed
        contestants |= {"memmap": memmap, "memmap_random_pairs": memmap_pairs}
    contestants |= {"reader": reader, "reader_random_pairs": reader_pairs}
    contestants["disk"] = _end_to_end(files, window_bytes=num_frames * frame_bytes / pairs_each)
    for residency in (places := _places(shards, config)):
        batches = TokenizerBatches(
            window_source(shards, residency=residency),
            windows,
            num_frames=num_frames,
            batch_size=per_batch * pairs_each,
            seed=0,
            ranks=RankSlice(),
        )
        contestants[f"loader:{residency}"] = _counted(batches.read, per_batch * pairs_each)
    rates = _measure(contestants, config, files, release=mapped.cache_clear)
    return _report("pairs", rates, "memmap", "loader_over_memmap", places[0]) | {
        "windows": len(windows),
        "frame_bytes": frame_bytes,
        "dtype": shards.dtype,
    }


def _places(shards: PatchShards | DeltaShards, config: BenchConfig) -> list[Any]:
    """The residencies to measure: those asked for, else what auto chooses on the CPU, and map."""
    auto = choose_place(shards.size_bytes, residency="auto")
    return list(config.residency or dict.fromkeys((auto, "map")))


def _counted(read: Callable[[int], Any], count: int) -> Contestant:
    def contestant(step: int) -> float:
        read(step)
        return count

    return contestant


def _end_to_end(files: Sequence[Path], *, window_bytes: float) -> Contestant:
    """Reads the files from end to end, again and again; gives as many windows as their bytes would
    be."""
    buffer = bytearray(READ_BYTES)

    def reads() -> Iterator[float]:
        while True:
            for path in files:
                with path.open("rb", buffering=0) as file:
                    while count := file.readinto(buffer):
                        yield count / window_bytes

    chunks = reads()
    return lambda step: next(chunks)


def _measure(
    contestants: dict[str, Contestant],
    config: BenchConfig,
    files: Sequence[Path],
    *,
    release: Callable[[], None],
) -> dict[str, float]:
    """Median rate of each over the rounds, in what it counts per second; a first round is for
    warming up, unless the files are to be cold. release: lets go of what is mapped, which else
    stays in memory."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    steps = dict.fromkeys(contestants, 0)
    for number in range(config.rounds + (not config.cold)):
        for name, contestant in contestants.items():
            if config.cold:
                release()
                for path in files:
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            count, start_s = 0.0, time.perf_counter()
            while (spent_s := time.perf_counter() - start_s) < config.seconds:
                count += contestant(steps[name])
                steps[name] += 1
            if config.cold or number > 0:
                rates[name].append(count / spent_s)
    return {name: statistics.median(values) for name, values in rates.items()}


def _report(
    unit: str, rates: dict[str, float], limit: str, ratio: str, residency: str
) -> dict[str, Any]:
    loader = rates[f"loader:{residency}"]
    found: dict[str, Any] = {"residency": residency, f"loader_{unit}_per_s": loader}
    if limit in rates:
        found |= {f"{limit}_{unit}_per_s": rates[limit], ratio: loader / rates[limit]}
    return found | {"unit": unit, "limit": limit, "rates": rates}


def bench_table(found: dict[str, Any]) -> str:
    """The rates as a Markdown table."""
    limit = found["rates"].get(found["limit"])
    body = [
        [name, f"{rate:,.0f}", f"{rate / limit:.2f}" if limit else ""]
        for name, rate in found["rates"].items()
    ]
    return markdown_table(["", f"{found['unit']}/s", f"of {found['limit']}"], body)
