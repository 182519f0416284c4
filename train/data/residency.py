"""Where the windows of a cache are kept while a run trains on it: `TrainConfig.residency`.

    device   the whole cache on the device that computes, gathered there
    memory   the whole cache in main memory
    map      in its files, each batch gathered from there: as fast as memory once the files are in
             the page cache, slow from a disk
    stream   in its files, read block by block in a random order of blocks (stream.py)
    auto     the first of these that there is room for

The first three give the same batches; stream has an order of its own. Used by the stages.

How much memory a cache may take. Used by sources.py for `residency: auto`.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...shards.deltas.reader import DeltaShards
from ...shards.patches.reader import PatchShards
from ...shards.reader import CacheReader
from ..config import Residency, TrainConfig
from ..engine.devices import Accelerator
from .order import BatchOrder, Indices, StreamOrder
from .stream import Blocks, BufferPool, DeltaBlocks, PatchBlocks, StreamRows, windows_of_group

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")

LARGEST_SHARE = 0.5
"""Of what is free, at most this much for a cache (a guess: the rest is page cache, batches and
everybody else)."""


def fits_in_memory(size_bytes: int) -> bool:
    """Whether every process of this machine may load `size_bytes` at the same time."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    return size_bytes * processes <= LARGEST_SHARE * available_bytes()


def device_bytes(device: torch.device) -> int:
    """What a cache may take of a cuda device's memory: the model comes after it."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(LARGEST_SHARE * free)


def available_bytes() -> int:
    """Memory that can be taken without swapping; 0 where the system does not say."""
    limits = [value for value in (_system_bytes(), _container_bytes()) if value is not None]
    return min(limits, default=0)


def _system_bytes() -> int | None:
    if not MEMINFO.is_file():
        return None
    for line in MEMINFO.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _container_bytes() -> int | None:
    """What is left under the control group's limit; None without one."""
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if not (limit.is_file() and used.is_file()):
        return None
    text = limit.read_text(encoding="ascii").strip()
    return None if text == "max" else max(0, int(text) - int(used.read_text(encoding="ascii")))


logger = logging.getLogger(__name__)

CPU = torch.device("cpu")

PAGE_CACHE_SHARE = 0.9
"""Of the memory that is free, what files read again and again may take of it (a guess)."""

AnyConfig = TypeVar("AnyConfig", bound=TrainConfig)

Read = Callable[[Indices], tuple[Tensor, ...]]


class Order(Protocol):
    """Which windows a step sees: order.BatchOrder, stream_order.StreamOrder."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""

    def at(self, step: int) -> Indices:
        """Windows of the global batch of a step (from 0), int64 (per_batch,)."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The windows of a cache, w of them at a time, as K tensors (w, ...)."""

    read: Read
    """For batches, in the order of `order`."""
    read_few: Read
    """For a few windows, anywhere."""
    order: Callable[[Indices, int, int], Order]
    """(windows, per_batch, seed) -> the order in which `read` is fast."""


def patch_source(
    shards: PatchShards, *, residency: Residency, device: torch.device = CPU
) -> Source:
    """K = 1: patch tokens (w, T, N, D), float16 as stored, float32 of other dtypes.

    device: where residency `device` keeps and gathers them."""
    place = choose_place(shards.size_bytes, residency=residency, device=device)
    if place in ("device", "memory"):
        return _held([torch.from_numpy(shards.load())], device if place == "device" else CPU)

    pool, raw = BufferPool(), shards.dtype == "float16"  # float16: converted on the device

    def mapped(windows: Indices) -> tuple[Tensor, ...]:
        shape = (len(windows), *shards.shape)
        out = pool.take(shape, np.dtype(np.float16 if raw else np.float32))
        (shards.stored_tokens if raw else shards.tokens)(windows, out=out.numpy())
        return (out,)

    if place == "stream":
        return _streamed(PatchBlocks(shards), mapped)
    return Source(read=mapped, read_few=mapped, order=BatchOrder)


def delta_source(
    shards: DeltaShards, *, residency: Residency, device: torch.device = CPU
) -> Source:
    """K = 2: delta tokens float16 (w, T, D) and timestamps float32 (w, T), seconds.

    device: where residency `device` keeps and gathers them."""
    num_frames, size = shards.shape
    size_bytes = shards.num_windows * num_frames * (2 * size + 4)
    place = choose_place(size_bytes, residency=residency, device=device)
    if place in ("device", "memory"):
        return _held([*map(torch.from_numpy, shards.load())], device if place == "device" else CPU)

    pool = BufferPool()

    def mapped(windows: Indices) -> tuple[Tensor, ...]:
        tokens = pool.take((len(windows), num_frames, size), np.dtype(np.float16))
        shards.tokens(windows, out=tokens.numpy())
        return tokens, torch.from_numpy(shards.timestamps_s(windows))

    if place == "stream":
        return _streamed(DeltaBlocks(shards), mapped)
    return Source(read=mapped, read_few=mapped, order=BatchOrder)


def choose_place(size_bytes: int, *, residency: Residency, device: torch.device = CPU) -> Residency:
    """device, memory, map or stream, for a cache of that size; says which and why in the log."""
    why = "as asked"
    if residency == "auto":
        residency, why = _first_that_fits(size_bytes, device)
    logger.info("the cache has %.2f GB: residency %s (%s)", size_bytes / 1e9, residency, why)
    return residency


def settled(config: AnyConfig, size_bytes: int, accelerator: Accelerator) -> AnyConfig:
    """`config` with its residency decided, the same on every rank: where one must stream, all do,
    because the order of the batches depends on it."""
    place = choose_place(size_bytes, residency=config.residency, device=accelerator.device)
    streams = torch.tensor(float(place == "stream"), device=accelerator.device)
    if accelerator.reduce(streams, reduction="sum").item() > 0:
        place = "stream"
    return replace(config, residency=place)


def order_data(config: TrainConfig, shards: CacheReader[Any]) -> dict[str, str]:
    """What a run notes of the order of its batches: it cannot go on in another one, nor on the same
    windows under other numbers."""
    order = {"order": "blocks"} if config.residency == "stream" else {}
    return {"windows": shards.arrangement, **order}


def _first_that_fits(size_bytes: int, device: torch.device) -> tuple[Residency, str]:
    if device.type == "cuda" and size_bytes <= device_bytes(device):
        return "device", "half of the free device memory holds it"
    if fits_in_memory(size_bytes):
        return "memory", "half of the free memory holds it"
    if size_bytes <= PAGE_CACHE_SHARE * available_bytes():
        return "map", "the page cache holds it"
    return "stream", "memory does not hold it"


def _held(arrays: list[Tensor], device: torch.device) -> Source:
    held, pool = [array.to(device) for array in arrays], BufferPool()

    def gather(windows: Indices) -> tuple[Tensor, ...]:
        chosen = torch.from_numpy(windows).to(device)
        if device.type == "cpu":
            return tuple(pool.gather(tensor, chosen) for tensor in held)
        return tuple(tensor[chosen] for tensor in held)

    return Source(read=gather, read_few=gather, order=BatchOrder)


def _streamed(blocks: Blocks, mapped: Read) -> Source:
    group_windows = windows_of_group(blocks)
    return Source(
        read=StreamRows(blocks, group_windows=group_windows),
        read_few=mapped,
        order=partial(StreamOrder, block_starts=blocks.starts, group_windows=group_windows),
    )
