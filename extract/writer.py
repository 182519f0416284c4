"""What turns the features of a shard's windows into a shard: the protocol, and patch-token shards.

run.py decodes, crops and runs the backbone; a writer decides what of a window's patch tokens is
kept and how it is stored. `PatchShardWriter` keeps them all; the fused mode of pipeline/ passes a
writer that keeps delta tokens. W windows, T frames, N patches, D channels.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..shards.cache import CHANNEL_SCALE, CacheInfo
from ..shards.errors import UsageError
from ..shards.patches.int8 import scale_sha256, write_channel_scale
from ..shards.patches.layout import STORED_DTYPES
from ..shards.patches.writer import write_black, write_patch_shard
from ..shards.records import DoneRecord
from ..shards.windows import ShardRows
from .quantise import split_int8, to_bfloat16_bits, to_float16, to_int8


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
    """float32 (D,), what int8 needs: see calibration.py."""

    def describe(self, patches: CacheInfo) -> CacheInfo:
        storage: dict[str, Any] = {"dtype": self.dtype}
        if self.dtype == "int8":
            scale = self.channel_scale
            storage["scale_sha256"] = None if scale is None else scale_sha256(scale)
        return replace(patches, identity={**patches.identity, "storage": storage})

    def begin(self, folder: Path, black_tokens: Tensor) -> None:
        if self.dtype == "int8" and not (folder / CHANNEL_SCALE).exists():
            write_channel_scale(folder, self._scale())
        if not (folder / "black.npy").exists():
            write_black(folder, black_tokens.cpu().numpy())

    def convert(self, tokens: Tensor) -> Tensor:
        # Converted on the device: a half or a quarter of the bytes to copy. What cannot be stored
        # is marked here and refused by name when the shard is written.
        if self.dtype == "float16":
            return to_float16(tokens)
        if self.dtype == "bfloat16":
            return to_bfloat16_bits(tokens)
        return to_int8(tokens, torch.tensor(self._scale(), device=tokens.device))

    def _scale(self) -> NDArray[np.float32]:
        if self.channel_scale is None:
            raise UsageError("dtype int8 without channel scales: fit them first (calibration.py)")
        return self.channel_scale

    def write(self, folder: Path, shard: int, rows: ShardRows) -> DoneRecord:
        if self.dtype == "int8":
            tokens, token_scale = split_int8(rows.tokens)
            rows = replace(rows, tokens=tokens, token_scale=token_scale)
        elif self.dtype == "bfloat16":
            rows = replace(rows, tokens=rows.tokens.view(STORED_DTYPES[self.dtype]))
        return write_patch_shard(
            folder, shard, rows, dtype=self.dtype, seed=self.seed, compression=self.compression
        )
