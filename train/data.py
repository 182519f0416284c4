"""The arrays of a training step, read from the caches.

    TokenizerBatches   patch-token cache -> frames of whole windows, and the pairs to take from them
    WorldBatches       delta-token cache -> delta tokens and timestamps

Nothing here has state: `read(step)` gives the same batch whenever it is called, so a run can stop
and go on anywhere, and a rank reads its slice of the batch that one process would have read. Used
by tokenizer.py and world.py; `read` runs in the thread of prefetch.py.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..shards.deltas import DeltaShards
from ..shards.errors import UsageError
from ..shards.patches import PatchShards
from .draws import uniforms
from .memory import fits_in_memory
from .order import BatchOrder, Indices, Share

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
_PLACES = {
    "device": "loaded onto the device",
    "memory": "loaded into memory",
    "map": "read from its files, batch by batch",
}

PatchSource = Callable[[Indices], Tensor]
"""windows (w,) -> patch tokens float16 or float32 (w, T, N, D)."""
DeltaSource = Callable[[Indices], tuple[Tensor, Tensor]]
"""windows (w,) -> delta tokens float16 (w, T, D) and timestamps float32 (w, T), seconds."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's samples of one step. B samples; a stage names its tensors."""

    tensors: dict[str, Tensor]
    """What the stage's forward needs. Axis 0 is not always B: pairs share frames."""
    samples: Indices
    """int64 (B,): number of each sample in the global batch; what draws are made from."""
    windows: Indices
    """int64 (B,): window of each sample in the cache, to name it when something is wrong."""

    def to(self, device: torch.device) -> "Batch":
        """The same with its tensors on `device`."""
        moved = {name: t.to(device, non_blocking=True) for name, t in self.tensors.items()}
        return replace(self, tensors=moved)

    def pinned(self) -> "Batch":
        """The same in page-locked memory, from which copies to cuda run beside the computing."""
        pinned = {
            name: t.pin_memory() if t.device.type == "cpu" else t  # others are there already
            for name, t in self.tensors.items()
        }
        return replace(self, tensors=pinned)


class TokenizerBatches:
    """Frame pairs out of whole windows of T frames. A sample is a pair.

    The global batch of P pairs takes ceil(P / (T - 1)) windows; each gives its T - 1 consecutive
    pairs, the last one only as many as complete the batch. With wide_pair_fraction, that share of
    the pairs is replaced by a pair of the same window whose frames are two or more apart.
    """

    def __init__(
        self,
        frames: PatchSource,
        windows: Indices,
        *,
        num_frames: int,
        batch_size: int,
        seed: int,
        share: Share,
        wide_pair_fraction: float = 0.0,
    ) -> None:
        check_frames(num_frames, least=3 if wide_pair_fraction > 0 else 2)
        self._frames = frames
        self._slice = share.of(batch_size)
        self._batch_size = batch_size
        self._pairs_per_window = num_frames - 1
        self._seed = seed
        self._wide_fraction = wide_pair_fraction
        self._wide_pairs = np.array(
            [(a, b) for a in range(num_frames) for b in range(a + 2, num_frames)], dtype=np.int64
        ).reshape(-1, 2)
        self.order = BatchOrder(windows, -(-batch_size // self._pairs_per_window), seed)

    def pairs(self, step: int) -> tuple[Indices, Indices, Indices]:
        """Of this rank's pairs: numbers in the global batch (B,), windows (B,), frames (B, 2)."""
        numbers = np.arange(self._batch_size)[self._slice]
        windows = self.order.at(step)[numbers // self._pairs_per_window]
        first = numbers % self._pairs_per_window
        frames = np.stack([first, first + 1], axis=1)
        if self._wide_fraction > 0:
            drawn = uniforms(2 * self._batch_size, self._seed, "wide pairs", step)
            is_wide, which = drawn.reshape(-1, 2)[numbers].T
            chosen = self._wide_pairs[(which * len(self._wide_pairs)).astype(np.int64)]
            frames = np.where((is_wide < self._wide_fraction)[:, None], chosen, frames)
        return numbers, windows, frames

    def read(self, step: int) -> Batch:
        """Tensors: frames (w, T, N, D), this rank's windows; pairs int64 (B, 3): the row in
        `frames`, the previous frame, the current frame."""
        numbers, windows, frames = self.pairs(step)
        slots = numbers // self._pairs_per_window
        _, first, rows = np.unique(slots, return_index=True, return_inverse=True)
        return Batch(
            tensors={
                "frames": self._frames(windows[first]),
                "pairs": torch.from_numpy(np.concatenate([rows[:, None], frames], axis=1)),
            },
            samples=numbers,
            windows=windows,
        )


class WorldBatches:
    """Whole windows of delta tokens. A sample is a window."""

    def __init__(
        self, rows: DeltaSource, windows: Indices, *, batch_size: int, seed: int, share: Share
    ) -> None:
        self._rows = rows
        self._slice = share.of(batch_size)
        self._batch_size = batch_size
        self.order = BatchOrder(windows, batch_size, seed)

    def read(self, step: int) -> Batch:
        """Tensors: z float16 (B, T, D), timestamps float32 (B, T), seconds."""
        windows = self.order.at(step)[self._slice]
        z, timestamps = self._rows(windows)
        return Batch(
            tensors={"z": z, "timestamps": timestamps},
            samples=np.arange(self._batch_size)[self._slice],
            windows=windows,
        )


def patch_source(shards: PatchShards, *, residency: str, device: torch.device = CPU) -> PatchSource:
    """Reads windows of patch tokens from memory or from the files (TrainConfig.residency).

    device: where `residency` device keeps the tokens and gathers them."""
    place = _place(shards.size_bytes, residency=residency)
    if place != "map":
        tokens = torch.from_numpy(shards.load()).to(device if place == "device" else CPU)
        return lambda windows: tokens[torch.from_numpy(windows).to(tokens.device)]
    if shards.dtype == "float16":  # converted on the device: half the bytes to move
        return lambda windows: torch.from_numpy(shards.stored_tokens(windows))
    return lambda windows: torch.from_numpy(shards.tokens(windows))


def delta_source(shards: DeltaShards, *, residency: str, device: torch.device = CPU) -> DeltaSource:
    """Reads windows of delta tokens from memory or from the mapped files.

    device: where `residency` device keeps the tokens and gathers them."""
    num_frames, size = shards.shape
    place = _place(shards.num_windows * num_frames * (2 * size + 4), residency=residency)
    if place != "map":
        target = device if place == "device" else CPU
        tokens, times = (torch.from_numpy(array).to(target) for array in shards.load())

        def gather(windows: Indices) -> tuple[Tensor, Tensor]:
            chosen = torch.from_numpy(windows).to(target)
            return tokens[chosen], times[chosen]

        return gather
    return lambda windows: (
        torch.from_numpy(shards.tokens(windows)),
        torch.from_numpy(shards.timestamps_s(windows)),
    )


def check_frames(num_frames: int, *, least: int) -> None:
    """UsageError for a cache whose windows are too short for what is trained."""
    if num_frames < least:
        raise UsageError(
            f"the cache has {num_frames} frames a window, wanted {least} or more"
            + (" (for wide_pair_fraction above 0)" if least == 3 else "")
            + ": extract again with a larger --num-frames"
        )


def _place(size_bytes: int, *, residency: str) -> str:
    """Where a cache of that size is read from: device, memory or map."""
    if residency == "auto":
        residency = "memory" if fits_in_memory(size_bytes) else "map"
    logger.info("the cache has %.2f GB: %s", size_bytes / 1e9, _PLACES[residency])
    return residency
