"""What becomes of a shard's features: rows of windows, what is kept of them, and the shard on disk.

    ShardWindows (clip by clip) + features -> ShardRows -> ShardWriter -> shards/NNNNNN.*

`PatchShardWriter` keeps every patch token; the fused mode of pipeline/ passes a writer that keeps
delta tokens. `ShardWriterThread` writes while the backbone is at the next shard. Patch tokens are
brought into the form they are stored in on the device, so that only that is copied to the host:
what cannot be stored is marked there, and refused with its clip when the shard is written.
W windows of a shard, B windows of a batch, T frames, N patches, D channels.
"""

import contextlib
import ctypes
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..shards.cache import CHANNEL_SCALE, CacheInfo
from ..shards.errors import DeltatokError
from ..shards.files import check_free, disk_errors
from ..shards.patches.int8 import (
    MAX_CODE,
    MAX_NORMALISED,
    MIN_TOKEN_SCALE,
    UNSTORABLE,
    scale_sha256,
    write_channel_scale,
)
from ..shards.patches.layout import STORED_DTYPES
from ..shards.patches.writer import write_black, write_patch_shard
from ..shards.records import DoneRecord, Quarantined
from ..shards.sampling import WindowDraw
from ..shards.windows import ShardRows
from .decoding.clip import DecodedClip

SCALE_BYTES = 2
"""A float16 token scale, behind its token's codes."""

MAX_THREADS = 4
"""Shards written at once; each takes about twice its size in memory (a guess)."""

_LOGGER = logging.getLogger(__name__)


@dataclass
class ShardWindows:
    """The windows of one shard beside their features; grows clip by clip, in plan order."""

    num_frames: int
    """T, of a window."""
    draws: list[WindowDraw] = field(default_factory=list)
    clips: list[int] = field(default_factory=list)
    """Of every window, the number of its clip among `decoders`."""
    decoders: dict[str, str] = field(default_factory=dict)
    """Clip that has windows -> the decoder that read it."""
    quarantined: list[Quarantined] = field(default_factory=list)

    def add(self, clip: DecodedClip) -> None:
        """The windows of the next clip."""
        self.clips += [len(self.decoders)] * len(clip.windows)
        self.decoders[clip.key] = clip.decoder
        self.draws += clip.windows

    def to_rows(self, tokens: NDArray[Any]) -> ShardRows:
        """With their features (W, ...), as `ShardWriter.convert` made them."""
        times = [draw.timestamps_s for draw in self.draws]
        frames = [draw.frame_index for draw in self.draws]
        crops = [draw.source_crop for draw in self.draws]
        return ShardRows(
            tokens=tokens,
            timestamps_s=np.array(times, dtype=np.float32).reshape(-1, self.num_frames),
            frame_index=np.array(frames, dtype=np.int32).reshape(-1, self.num_frames),
            crop=np.array(crops, dtype=np.float32).reshape(-1, 4),
            flipped=np.array([draw.flipped for draw in self.draws], dtype=np.bool_),
            clip=np.array(self.clips, dtype=np.int32),
            keys=list(self.decoders),
            decoders=self.decoders,
            quarantined=self.quarantined,
        )


class Converter(Protocol):
    """What is kept of the patch tokens of a window."""

    def convert(self, tokens: Tensor) -> Tensor:
        """What to keep of a batch of windows, (B, ...), on the device the tokens are on.

        tokens: float32 (B, T, N, D); B is the same in every call, and the last windows of a
        shard's last batch may be padding that is dropped afterwards. Rows must not mix.
        """


class ShardWriter(Converter, Protocol):
    """What becomes of the patch tokens: `describe` is called, `begin`, then `convert` and `write`
    for every shard."""

    def describe(self, patches: CacheInfo) -> CacheInfo:
        """The cache.json of the cache to write.

        patches: that of a patch-token cache of these features, its identity without `storage`.
        """

    def begin(self, folder: Path, black_tokens: Tensor) -> None:
        """Called once, before the first shard that this run makes.

        black_tokens: float32 (N, D) on the backbone's device, a black frame's patch tokens.
        """

    def write(self, folder: Path, shard: int, rows: ShardRows) -> DoneRecord:
        """Writes the shard and, last, its done-record. Called from another thread than `convert`,
        for one shard after the other."""


@dataclass(frozen=True, kw_only=True)
class PatchShardWriter:
    """Keeps every patch token: Zarr shards of (W, T, N, D)."""

    dtype: Literal["float16", "bfloat16", "int8"] = "float16"
    """How they are stored."""
    seed: int = 0
    """Decides the order of the windows within a shard."""
    compression: Literal["none", "zstd"] = "none"
    """Of the shards; it changes no number."""
    channel_scale: NDArray[np.float32] | None = None
    """float32 (D,), what int8 needs: see int8_calibration.py."""

    def describe(self, patches: CacheInfo) -> CacheInfo:
        storage: dict[str, Any] = {"dtype": self.dtype}
        if self.dtype == "int8":
            scale = self.channel_scale
            storage["scale_sha256"] = None if scale is None else scale_sha256(scale)
        return replace(patches, identity={**patches.identity, "storage": storage})

    def begin(self, folder: Path, black_tokens: Tensor) -> None:
        if self.dtype == "int8" and not (folder / CHANNEL_SCALE).exists():
            assert self.channel_scale is not None  # cache.json names its hash
            write_channel_scale(folder, self.channel_scale)
        if not (folder / "black.npy").exists():
            write_black(folder, black_tokens.cpu().numpy())

    def convert(self, tokens: Tensor) -> Tensor:
        # Converted on the device: a half or a quarter of the bytes to copy. What cannot be stored
        # is marked here and refused by name when the shard is written.
        if self.dtype == "float16":
            return to_float16(tokens)
        if self.dtype == "bfloat16":
            return to_bfloat16_bits(tokens)
        return to_int8(tokens, torch.tensor(self.channel_scale, device=tokens.device))

    def write(self, folder: Path, shard: int, rows: ShardRows) -> DoneRecord:
        if self.dtype == "int8":
            tokens, token_scale = split_int8(rows.tokens)
            rows = replace(rows, tokens=tokens, token_scale=token_scale)
        elif self.dtype == "bfloat16":
            rows = replace(rows, tokens=rows.tokens.view(STORED_DTYPES[self.dtype]))
        return write_patch_shard(
            folder, shard, rows, dtype=self.dtype, seed=self.seed, compression=self.compression
        )


class ShardWriterThread:
    """Writes shards in threads of its own; a context manager that ends when all are written.

    A shard is a gigabyte that has to be converted, hashed and flushed: in the main thread, the
    backbone would stand still meanwhile. An exception within the context lets the shards that are
    being written get finished.
    """

    def __init__(
        self,
        writer: ShardWriter,
        folder: Path,
        *,
        min_free_bytes: int,
        when_done: Callable[[DoneRecord], None],
    ) -> None:
        """min_free_bytes: left on the disk, whatever is written. when_done: called once a shard is
        written, by the thread that wrote it, one at a time; what it raises, `put` or `finish` do.
        """
        self._writer = writer
        self._folder = folder
        self._min_free_bytes = min_free_bytes
        self._when_done = when_done
        self._num_threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 4))
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="write")
        self._waiting: deque[Future[None]] = deque()
        self._one_at_a_time = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            self.finish()
        except DeltatokError as problem:
            if error is None:
                raise
            _LOGGER.error("%s", problem)  # the first error is the one to end with
        finally:
            self._threads.shutdown()

    def put(self, shard: int, windows: ShardWindows, values: Callable[[], NDArray[Any]]) -> None:
        """Has the shard written; waits first while as many as there are threads are under way.

        values: gives the features of `windows`, (W, ...); called once, by the thread that writes
        them. Raises DeltatokError if a shard could not be written.
        """
        while len(self._waiting) >= self._num_threads:
            self._wait()
        self._waiting.append(self._threads.submit(self._write, shard, windows, values))

    def finish(self) -> None:
        """Waits for all shards; raises DeltatokError if one of them could not be written."""
        while self._waiting:
            self._wait()

    def check_free(self, shard: int, needed_bytes: int = 0) -> None:
        """Raises DeltatokError where the shard leaves less room than wanted on the disk."""
        with disk_errors(self._folder):
            check_free(
                self._folder,
                needed_bytes,
                what=f"shard {shard:06d}",
                min_free_bytes=self._min_free_bytes,
            )

    def _wait(self) -> None:
        self._waiting.popleft().result()
        give_back_freed()

    def _write(self, shard: int, windows: ShardWindows, values: Callable[[], NDArray[Any]]) -> None:
        rows = windows.to_rows(values())
        self.check_free(shard, rows.tokens.nbytes)
        with disk_errors(self._folder):
            record = self._writer.write(self._folder, shard, rows)
        with self._one_at_a_time:
            self._when_done(record)


def give_back_freed() -> None:
    """Returns to the system what the C library keeps without using it (glibc; elsewhere nothing).

    glibc keeps what threads free in pieces between what is still used, so that the memory of an
    extraction, whose shards are of many sizes, would creep up over thousands of clips.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # musl, macOS, Windows
        ctypes.CDLL(None).malloc_trim(0)


def to_float16(tokens: Tensor) -> Tensor:
    """float32 -> float16. What is too large becomes infinite, what was infinite before NaN."""
    return torch.where(tokens.isinf(), torch.nan, tokens).to(torch.float16)


def to_bfloat16_bits(tokens: Tensor) -> Tensor:
    """float32 -> the bits of the nearest bfloat16, as int16."""
    return tokens.to(torch.bfloat16).view(torch.int16)


def to_int8(tokens: Tensor, channel_scale: Tensor) -> Tensor:
    """float32 (B, T, N, D), float32 (D,) -> int8 (B, T, N, D + 2): a token's codes, then the bytes
    of its float16 scale. The same numbers, bit for bit, as `shards.int8.quantise` makes."""
    normalised = tokens / channel_scale
    magnitude = normalised.abs()
    # Not by 127: a product with its inverse, as some devices divide by constants, rounds otherwise.
    most = torch.full((), MAX_CODE, dtype=torch.float32, device=tokens.device)
    scale = (magnitude.amax(dim=-1, keepdim=True) / most).clamp(min=MIN_TOKEN_SCALE)
    scale = scale.to(torch.float16)
    codes = (normalised / scale.float()).round().clamp(-MAX_CODE, MAX_CODE).nan_to_num(nan=0.0)
    codes = torch.where(magnitude <= MAX_NORMALISED, codes, UNSTORABLE).to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], dim=-1)


def split_int8(rows: NDArray[np.int8]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """What `to_int8` put together, on the host: codes int8 (..., D), a view; token scale float16
    (...)."""
    scale = np.ascontiguousarray(rows[..., -SCALE_BYTES:]).view(np.float16)
    return rows[..., :-SCALE_BYTES], scale[..., 0]
