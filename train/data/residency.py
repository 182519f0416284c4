"""Where the windows of a cache are kept while a run trains on it: `TrainConfig.residency`.

    device   the whole cache on the device that computes, gathered there
    memory   the whole cache in main memory
    map      in its files, each batch gathered from there: as fast as memory once the files are in
             the page cache, slow from a disk
    stream   in its files, read block by block in a random order of blocks (stream.py)
    auto     the first of these that there is room for

The first three give the same batches; stream has an order of its own.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ...shards.deltas.reader import DeltaShards
from ...shards.patches.reader import PatchShards
from ...shards.stores.mirror import is_mirror
from ..config import Residency, TrainConfig
from ..engine.devices import Accelerator, to_device
from .order import BatchOrder, Indices, StreamOrder
from .stream import (
    NUM_BUFFERS,
    Blocks,
    BufferRing,
    DeltaBlocks,
    PatchBlocks,
    StreamRows,
    Take,
    fresh,
    gather,
    windows_of_group,
)

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
    """Memory that can be taken without swapping, within the limit of this process's container."""
    free: int = psutil.virtual_memory().available
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if not (limit.is_file() and used.is_file()):
        return free
    text = limit.read_text(encoding="ascii").strip()
    left = free if text == "max" else int(text) - int(used.read_text(encoding="ascii"))
    return max(0, min(free, left))


logger = logging.getLogger(__name__)

CPU = torch.device("cpu")

PAGE_CACHE_SHARE = 0.9
"""Of the memory that is free, what files read again and again may take of it (a guess)."""

AnyConfig = TypeVar("AnyConfig", bound=TrainConfig)

Read = Callable[[Indices], tuple[Tensor, ...]]
ReadInto = Callable[[Indices, Take], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class WindowSource:
    """The windows of a cache, w of them at a time, as K tensors (w, ...).

    `read` and `read_any` have a ring of buffers each: what they give is valid until NUM_BUFFERS
    further batches are asked for.
    """

    read: Read
    """For batches, in the order of `order`."""
    read_any: Read
    """For windows anywhere."""
    read_to_keep: Read
    """For windows anywhere, into memory of their own."""
    order: Callable[[Indices, int, int], BatchOrder]
    """(windows, per_batch, seed) -> the order in which `read` is fast."""
    expect: Callable[[Indices], None] | None = None
    """Of a cache at an address that is read as it is needed: says what will be read next."""


def window_source(
    shards: PatchShards | DeltaShards,
    *,
    residency: Residency,
    device: torch.device = CPU,
) -> WindowSource:
    """Patch cache, K = 1: tokens (w, T, N, D), float16 as stored, float32 of other dtypes. Delta
    cache, K = 2: tokens float16 (w, T, D) and timestamps float32 (w, T), seconds.

    device: where residency `device` keeps and gathers them.
    """
    place = choose_place(memory_bytes(shards), residency=residency, device=device)
    if place in ("device", "memory"):
        loaded = (shards.load(),) if isinstance(shards, PatchShards) else shards.load()
        held = [*map(torch.from_numpy, loaded)]
        return _held(held, device if place == "device" else CPU)
    blocks: Blocks | None = None
    if place == "stream":
        blocks = PatchBlocks(shards) if isinstance(shards, PatchShards) else DeltaBlocks(shards)
    source = _source(partial(_read_files, shards), blocks, num_arrays=1)
    return replace(source, expect=shards.expect if is_mirror(shards.folder) else None)


def _read_files(
    shards: PatchShards | DeltaShards, windows: Indices, take: Take
) -> tuple[Tensor, ...]:
    shape = (len(windows), *shards.shape)
    if isinstance(shards, DeltaShards):
        out = take(shape, np.dtype(np.float16))
        shards.tokens(windows, out=out.numpy())
        return out, torch.from_numpy(shards.timestamps_s(windows))
    raw = shards.dtype == "float16"  # converted on the device
    out = take(shape, np.dtype(np.float16 if raw else np.float32))
    (shards.stored_tokens if raw else shards.tokens)(windows, out=out.numpy())
    return (out,)


def memory_bytes(shards: PatchShards | DeltaShards) -> int:
    """Of all tokens, and of delta tokens the timestamps, in memory."""
    if isinstance(shards, PatchShards):
        return shards.size_bytes
    num_frames, size = shards.shape
    return shards.num_windows * num_frames * (2 * size + 4)


def choose_place(size_bytes: int, *, residency: Residency, device: torch.device = CPU) -> Residency:
    """device, memory, map or stream, for a cache of that size; says which and why in the log."""
    why = "as asked"
    if residency == "auto":
        residency, why = _first_that_fits(size_bytes, device)
    logger.info("the cache has %.2f GB: residency %s (%s)", size_bytes / 1e9, residency, why)
    return residency


def resolve_residency(
    config: AnyConfig, shards: PatchShards | DeltaShards, accelerator: Accelerator
) -> AnyConfig:
    """`config` with its residency decided, the same on every rank: where one must stream, all do,
    because the order of the batches depends on it."""
    place = choose_place(
        memory_bytes(shards), residency=config.residency, device=accelerator.device
    )
    streams = torch.tensor(float(place == "stream"), device=accelerator.device)
    if accelerator.reduce(streams, reduction="sum").item() > 0:
        place = "stream"
    return replace(config, residency=place)


def _first_that_fits(size_bytes: int, device: torch.device) -> tuple[Residency, str]:
    if device.type == "cuda" and size_bytes <= device_bytes(device):
        return "device", "half of the free device memory holds it"
    if fits_in_memory(size_bytes):
        return "memory", "half of the free memory holds it"
    if size_bytes <= PAGE_CACHE_SHARE * available_bytes():
        return "map", "the page cache holds it"
    return "stream", "memory does not hold it"


def _held(arrays: list[Tensor], device: torch.device) -> WindowSource:
    held = [array.to(device) for array in arrays]

    def from_held(windows: Indices, take: Take) -> tuple[Tensor, ...]:
        chosen = to_device(torch.from_numpy(windows), device)
        if device.type != "cpu":
            return tuple(tensor[chosen] for tensor in held)
        return tuple(gather(tensor, chosen, take) for tensor in held)

    return _source(from_held, None, num_arrays=len(held))


def _source(read: ReadInto, blocks: Blocks | None, *, num_arrays: int) -> WindowSource:
    """blocks: to be streamed, in an order of their own; None: `read` is fast in any order.
    num_arrays: buffers that a batch of `read` takes."""
    in_order: ReadInto = read
    order: Callable[[Indices, int, int], BatchOrder] = BatchOrder
    in_order_arrays = num_arrays
    if blocks is not None:
        group_windows = windows_of_group(blocks)
        in_order = StreamRows(blocks, group_windows=group_windows)
        order = partial(StreamOrder, block_starts=blocks.starts, group_windows=group_windows)
        in_order_arrays = len(blocks.buffers(0))
    rings = BufferRing(in_order_arrays * NUM_BUFFERS), BufferRing(num_arrays * NUM_BUFFERS)
    return WindowSource(
        read=lambda windows: in_order(windows, rings[0].take),
        read_any=lambda windows: read(windows, rings[1].take),
        read_to_keep=lambda windows: read(windows, fresh),
        order=order,
    )
