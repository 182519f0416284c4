"""The arrays of a training step, read from the caches.

    TokenizerBatches   patch-token cache -> frames of whole windows, and the pairs to take from them
    WindowBatches      delta- or patch-token cache -> tokens and timestamps of whole windows

Nothing here has state: `read(step)` gives the same batch whenever it is called, so a run can stop
and go on anywhere, and a rank reads its slice of the batch that one process would have read.
`Prefetcher` has the next batches read by a thread of its own while this one is computed: a batch is
valid until the next one is asked for.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...shards.deltas.reader import DeltaShards
from ...shards.errors import UsageError
from ...shards.patches.reader import PatchShards
from .order import BatchOrder, Indices, RankSlice, uniforms
from .residency import Read, WindowSource
from .stream import DEPTH

T = TypeVar("T")

STEPS_AHEAD = 4
"""Steps whose shards are fetched ahead from an address (a guess)."""


class Prefetcher(Generic[T]):
    """Gives read(start), read(start + 1), ... read(stop - 1), each begun ahead of its turn.

    One thread keeps up with what training eats. What `read` raises is raised by `next`.
    """

    def __init__(self, read: Callable[[int], T], *, start: int, stop: int) -> None:
        self._read = read
        self._steps = iter(range(start, stop))
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: deque[Future[T]] = deque()

    def __enter__(self) -> Self:
        for _ in range(DEPTH):
            self._begin_one()
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def next(self) -> T:
        """The batch of the next step, valid until the one after it is asked for; waits for it if it
        is not read yet."""
        batch = self._ahead.popleft().result()
        self._begin_one()
        return batch

    def _begin_one(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._ahead.append(self._pool.submit(self._read, step))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's samples of one step. B samples; a stage names its tensors."""

    tensors: dict[str, Tensor]
    """What the stage's forward needs. Axis 0 is not always B: pairs ranks frames."""
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
    pairs, the last one only as many as complete the batch. With wide_pair_fraction, that ranks of
    the pairs is replaced by a pair of the same window whose frames are two or more apart.
    """

    def __init__(
        self,
        frames: WindowSource,
        windows: Indices,
        *,
        num_frames: int,
        batch_size: int,
        seed: int,
        ranks: RankSlice,
        wide_pair_fraction: float = 0.0,
    ) -> None:
        check_frames(num_frames, least=2)
        if wide_pair_fraction > 0:
            check_frames(num_frames, least=3, why="wide_pair_fraction above 0")
        self._frames = frames
        self._slice = ranks.of(batch_size)
        self._batch_size = batch_size
        self._pairs_per_window = num_frames - 1
        self._seed = seed
        self._wide_fraction = wide_pair_fraction
        self._wide_pairs = np.array(
            [(a, b) for a in range(num_frames) for b in range(a + 2, num_frames)], dtype=np.int64
        ).reshape(-1, 2)
        self.order = frames.order(windows, -(-batch_size // self._pairs_per_window), seed)

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
        if self._frames.expect is not None:
            self._frames.expect(next_windows(self.order, step))
        return Batch(
            tensors={
                "frames": self._frames.read(windows[first])[0],
                "pairs": torch.from_numpy(np.concatenate([rows[:, None], frames], axis=1)),
            },
            samples=numbers,
            windows=windows,
        )


class WindowBatches:
    """Whole windows of delta or of patch tokens. A sample is a window."""

    def __init__(
        self,
        shards: PatchShards | DeltaShards,
        source: WindowSource,
        windows: Indices,
        *,
        batch_size: int,
        seed: int,
        ranks: RankSlice,
    ) -> None:
        self._shards = shards
        self._source = source
        self._slice = ranks.of(batch_size)
        self._numbers = np.arange(batch_size)[self._slice]
        self.order = source.order(windows, batch_size, seed)

    def read(self, step: int) -> Batch:
        """Tensors: tokens (B, T, D) or (B, T, N, D), timestamps float32 (B, T), seconds from the
        first frame."""
        if self._source.expect is not None:
            self._source.expect(next_windows(self.order, step))
        return self._batch(self._source.read, self.order.at(step)[self._slice], self._numbers)

    def read_to_keep(self, windows: Indices) -> Batch:
        """Any windows, as a batch that is never written over."""
        return self._batch(self._source.read_to_keep, windows, windows)

    def _batch(self, read: Read, windows: Indices, numbers: Indices) -> Batch:
        tokens, *stored = read(windows)
        if stored:
            timestamps = stored[0]
        else:
            times = self._shards.timestamps_s(windows)
            timestamps = torch.from_numpy(times - times[:, :1])
        return Batch(
            tensors={"tokens": tokens, "timestamps": timestamps}, samples=numbers, windows=windows
        )


def places_in_chain(numbers: Indices, *, pairs_per_window: int, chain: int) -> Indices:
    """How many pairs come before each pair in its chain, 0 to chain - 1, int64 (B,).

    numbers (B,): of the pairs in the global batch. A chain is pairs of one window that follow one
    another; one begins with every window, and at every multiple of `chain`, so that a slice of the
    batch that begins at such a multiple cuts none.
    """
    return np.minimum(numbers % pairs_per_window, numbers % chain)


def next_windows(order: BatchOrder, step: int) -> Indices:
    """The windows of this step and of the STEPS_AHEAD after it, in order."""
    return np.concatenate([order.at(step + ahead) for ahead in range(STEPS_AHEAD + 1)])


def check_frames(num_frames: int, *, least: int, why: str = "") -> None:
    """UsageError for a cache whose windows are too short for what is trained; why: the setting that
    wants as many."""
    if num_frames < least:
        raise UsageError(
            f"the cache has {num_frames} frames a window, wanted {least} or more"
            + (f" (for {why})" if why else "")
            + ": extract again with a larger --num-frames"
        )
