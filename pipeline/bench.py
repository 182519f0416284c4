"""How fast a cache is read, beside what limits it, measured in one run: `deltatok-shards bench`.

All contestants take turns in short rounds on the same order of windows, and the median of a
contestant's rounds counts: machines are noisy, only the ratios mean something. Beside
them stands what no reader of a cache can beat: its files mapped raw, and read from end to end.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..evaluate.tables import markdown_table
from ..shards.deltas.reader import DeltaShards
from ..shards.errors import UsageError
from ..shards.patches.reader import PatchShards
from ..train.config import Residency
from ..train.data.batches import Prefetcher, TokenizerBatches, WindowBatches
from ..train.data.order import BatchOrder, Indices, RankSlice
from ..train.data.residency import choose_place, fits_in_memory, window_source
from ..train.data.stream import buffers_needed

READ_BYTES = 8 * 2**20
"""Of one read of a file from end to end."""

Contestant = Callable[[int], int]
"""A step -> the windows (or pairs) that were read."""


class RawPatches:
    """The frames of a patch cache straight from the mapped files: no checks, what a reader of this
    format could reach. Only for caches whose frames are not compressed."""

    def __init__(self, shards: PatchShards) -> None:
        num_frames, num_tokens, size = shards.shape
        bytes_each = 1 if shards.dtype == "int8" else 2
        self.frame_bytes = num_tokens * size * bytes_each
        self._num_frames = num_frames
        self._starts = shards.shard_starts
        self.files = sorted(shards.folder.glob("shards/*.zarr/tokens/c/0/0/0/0"))
        counts = np.diff(self._starts) * num_frames
        sizes = [path.stat().st_size for path in self.files]
        # Frames of equal size with a checksum of 4 bytes each, then the index: 16 each, and 4.
        self.usable = sizes == [int(n) * (self.frame_bytes + 20) + 4 for n in counts]
        self._maps: dict[int, NDArray[np.uint8]] = {}

    def release(self) -> None:
        """Lets go of the mapped files."""
        self._maps.clear()

    def frame(self, window: int, frame: int) -> NDArray[np.uint8]:
        """uint8 (frame_bytes,), a view of the file."""
        shard = int(np.searchsorted(self._starts, window, side="right")) - 1
        number = (int(window) - int(self._starts[shard])) * self._num_frames + int(frame)
        start = number * (self.frame_bytes + 4)
        mapped = self._maps.get(shard)
        if mapped is None:
            mapped = self._maps[shard] = np.memmap(self.files[shard], dtype=np.uint8, mode="r")
        return mapped[start : start + self.frame_bytes]


def drop_files(folder: Path, suffix: str) -> None:
    """Has the system forget the contents of the shards' files, as far as it does (POSIX)."""
    for path in _data_files(folder, suffix):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_disk(folder: Path, suffix: str, *, window_bytes: float) -> Contestant:
    """Reads the files from end to end; gives as many windows as their bytes would be."""
    chunks = _chunks(list(_data_files(folder, suffix)))
    buffer = np.empty(READ_BYTES, dtype=np.uint8)
    carried = 0.0

    def read(step: int) -> int:
        nonlocal carried
        path, offset = next(chunks)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            count = os.preadv(descriptor, [buffer.data], offset)
        finally:
            os.close(descriptor)
        carried += count / window_bytes
        whole, carried = int(carried), carried % 1
        return whole

    return read


def _chunks(paths: Sequence[Path]) -> Iterator[tuple[Path, int]]:
    while True:
        for path in paths:
            for offset in range(0, path.stat().st_size, READ_BYTES):
                yield path, offset


def _data_files(folder: Path, suffix: str) -> Iterator[Path]:
    if suffix:
        yield from sorted(folder.glob(f"shards/*{suffix}"))
    else:
        yield from sorted(folder.glob("shards/*.zarr/tokens/c/0/0/0/0"))


MANY = 2**40
"""Steps; more than anyone takes."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured, and for how long."""

    batch_size: int
    """Windows of a batch (delta caches) or pairs (patch caches)."""
    workers: tuple[int, ...]
    """Threads that read ahead; 0: none."""
    residencies: tuple[Residency, ...]
    """Those to measure; the first one is the loader of the headline figure."""
    rounds: int
    seconds: float
    """Of a contestant in a round."""
    cold: bool
    """Drop the cache's files from the page cache before each turn."""
    seed: int = 0


def bench_deltas(folder: Path, settings: BenchSettings) -> dict[str, Any]:
    """Windows/s of a delta-token cache: loaders, a gather in memory into one and the same buffer,
    the mapped reader, the disk."""
    shards = DeltaShards(folder, verify="size")
    windows = np.arange(shards.num_windows)
    order = _order(windows, settings.batch_size, settings)
    num_frames, size = shards.shape
    contestants: dict[str, Contestant] = {}
    if fits_in_memory(shards.size_bytes):
        tokens, times = (torch.from_numpy(array) for array in shards.load())
        gathered = torch.empty((settings.batch_size, num_frames, size), dtype=torch.float16)

        def gather(step: int) -> int:
            chosen = torch.from_numpy(order.at(step))
            torch.index_select(times, 0, chosen)
            return len(torch.index_select(tokens, 0, chosen, out=gathered))

        contestants["in_memory"] = gather
    contestants["reader"] = lambda step: len(shards.tokens(order.at(step)))
    contestants["disk"] = read_disk(folder, ".tar", window_bytes=num_frames * size * 2)
    num_buffers = buffers_needed(max(settings.workers, default=1))
    with ExitStack() as stack:
        for residency in settings.residencies:
            batches = WindowBatches(
                shards,
                window_source(shards, residency=residency, num_buffers=num_buffers),
                windows,
                batch_size=settings.batch_size,
                seed=settings.seed,
                ranks=RankSlice(),
            )
            for workers in settings.workers:
                name = f"loader:{residency}:{workers}"
                contestants[name] = _loader(batches.read, settings.batch_size, workers, stack)

        def drop() -> None:
            shards.release()  # what is mapped stays in memory
            drop_files(folder, ".tar")

        rates = measure(contestants, settings, drop=drop)
    return _report("windows", rates, "in_memory", "loader_over_memory", settings) | {
        "windows": shards.num_windows,
        "shards": len(shards.shard_starts) - 1,
        "window_bytes": num_frames * size * 2,
    }


def bench_patches(folder: Path, settings: BenchSettings) -> dict[str, Any]:
    """Pairs/s of a patch-token cache: loaders and the raw mapped files on whole windows, the reader
    and the raw mapped files on random pairs, the disk."""
    shards = PatchShards(folder)
    num_frames = shards.shape[0]
    if num_frames < 2:
        raise UsageError(f"{folder}: 1 frame a window, wanted 2 or more: there are no pairs")
    windows = np.arange(shards.num_windows)
    per_batch = -(-settings.batch_size // (num_frames - 1))
    order = _order(windows, per_batch, settings)
    pairs = _order(np.arange(len(windows) * (num_frames - 1)), per_batch, settings)
    contestants: dict[str, Contestant] = {}
    raw = RawPatches(shards)
    whole = np.empty((per_batch, num_frames, raw.frame_bytes), dtype=np.uint8)
    two = np.empty((per_batch, 2, raw.frame_bytes), dtype=np.uint8)
    stored = {"whole": _typed(whole, shards), "pairs": _typed(two, shards)}

    def split(step: int) -> tuple[Indices, NDArray[np.int64]]:
        first, frame = np.divmod(pairs.at(step), num_frames - 1)
        return first, np.stack([frame, frame + 1], axis=1)

    def reader_pairs(step: int) -> int:
        chosen, frames = split(step)
        return len(shards.stored_tokens(chosen, frames=frames, out=stored["pairs"]))

    def memmap_pairs(step: int) -> int:
        chosen, frames = split(step)
        for place, (window, numbers) in enumerate(zip(chosen, frames, strict=True)):
            for row, frame in enumerate(numbers):
                two[place, row] = raw.frame(window, frame)
        return per_batch

    def memmap(step: int) -> int:
        for place, window in enumerate(order.at(step)):
            for frame in range(num_frames):
                whole[place, frame] = raw.frame(window, frame)
        return per_batch * (num_frames - 1)

    def reader(step: int) -> int:
        shards.stored_tokens(order.at(step), out=stored["whole"])
        return per_batch * (num_frames - 1)

    if raw.usable:
        contestants |= {"memmap": memmap, "memmap_random_pairs": memmap_pairs}
    contestants |= {"reader": reader, "reader_random_pairs": reader_pairs}
    window_bytes = num_frames * raw.frame_bytes / (num_frames - 1)
    contestants["disk"] = read_disk(folder, "", window_bytes=window_bytes)
    num_buffers = buffers_needed(max(settings.workers, default=1))
    with ExitStack() as stack:
        for residency in settings.residencies:
            batches = TokenizerBatches(
                window_source(shards, residency=residency, num_buffers=num_buffers),
                windows,
                num_frames=num_frames,
                batch_size=per_batch * (num_frames - 1),
                seed=settings.seed,
                ranks=RankSlice(),
            )
            for workers in settings.workers:
                name = f"loader:{residency}:{workers}"
                count = per_batch * (num_frames - 1)
                contestants[name] = _loader(batches.read, count, workers, stack)

        def drop() -> None:
            raw.release()  # what is mapped stays in memory
            drop_files(folder, "")

        rates = measure(contestants, settings, drop=drop)
    return _report("pairs", rates, "memmap", "loader_over_memmap", settings) | {
        "windows": shards.num_windows,
        "frame_bytes": raw.frame_bytes,
        "dtype": shards.dtype,
    }


def measure(
    contestants: dict[str, Contestant], settings: BenchSettings, *, drop: Callable[[], None]
) -> dict[str, float]:
    """Median rate of each over the rounds, in what it counts per second; a first round is for
    warming up, unless the files are to be cold."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    steps = dict.fromkeys(contestants, 0)
    for number in range(settings.rounds + (not settings.cold)):
        for name, contestant in contestants.items():
            if settings.cold:
                drop()
            count, start_s = 0, time.perf_counter()
            while (spent_s := time.perf_counter() - start_s) < settings.seconds:
                count += contestant(steps[name])
                steps[name] += 1
            if settings.cold or number > 0:
                rates[name].append(count / spent_s)
    return {name: statistics.median(values) for name, values in rates.items()}


def _loader(read: Callable[[int], Any], count: int, workers: int, stack: ExitStack) -> Contestant:
    if workers == 0:

        def direct(step: int) -> int:
            read(step)
            return count

        return direct
    ahead = stack.enter_context(Prefetcher(read, start=0, stop=MANY, num_threads=workers))

    def prefetched(step: int) -> int:
        ahead.next()
        return count

    return prefetched


def _order(windows: Indices, per_batch: int, settings: BenchSettings) -> BatchOrder:
    return BatchOrder(windows, per_batch, settings.seed)


def _typed(buffer: NDArray[np.uint8], shards: PatchShards) -> NDArray[Any]:
    dtype = {"float16": "<f2", "bfloat16": "<u2", "int8": "|i1"}[shards.dtype]
    return buffer.view(dtype).reshape(*buffer.shape[:2], *shards.shape[1:])


def _report(
    unit: str, rates: dict[str, float], limit: str, ratio: str, settings: BenchSettings
) -> dict[str, Any]:
    loaders = {name: rate for name, rate in rates.items() if name.startswith("loader:")}
    first = [r for n, r in loaders.items() if n.split(":")[1] == settings.residencies[0]]
    best = max(first)
    found: dict[str, Any] = {f"loader_{unit}_per_s": best}
    if limit in rates:
        found |= {f"{limit}_{unit}_per_s": rates[limit], ratio: best / rates[limit]}
    found["rates"] = {f"{name}_{unit}_per_s": rate for name, rate in rates.items()}
    return found | {
        "residency": settings.residencies[0],
        "batch_size": settings.batch_size,
        "cold": settings.cold,
        "rounds": settings.rounds,
    }


def first_residency(folder: Path, *, patches: bool) -> Residency:
    """What `residency: auto` would choose for this cache on a machine without a GPU."""
    shards = PatchShards(folder) if patches else DeltaShards(folder, verify="size")
    return choose_place(shards.size_bytes, residency="auto")


def bench_table(found: dict[str, Any], unit: str) -> str:
    """The rates as a Markdown table; unit: windows or pairs."""
    suffix = f"_{unit}_per_s"
    rates = {name.removesuffix(suffix): rate for name, rate in found["rates"].items()}
    limit = rates.get("in_memory") or rates.get("memmap")
    header = ["", f"{unit}/s", f"of {'memory' if 'in_memory' in rates else 'memmap'}"]
    body = [
        [name, f"{rate:,.0f}", f"{rate / limit:.2f}" if limit else ""]
        for name, rate in rates.items()
    ]
    return markdown_table(header, body)
