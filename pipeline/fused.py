"""The fused mode: videos -> delta-token shards, the patch tokens never leave the device.

`extract` decodes and runs the backbone, `train` knows the tokenizer, and neither knows the other:
here a writer for the one is made of the other. The patch tokens are rounded to float16 first, so
that the cache is the one that float16 patch shards of the same seed would have given: the same
plan, windows, order, identity and fingerprint. Equal bytes too, on the CPU and where both paths
encode as many windows at once (batch_frames / num_frames here, batch_windows there: 8 and 8).
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..extract.run import ExtractionSummary, run_extraction
from ..shards.cache import CacheInfo
from ..shards.deltas.writer import write_delta_shard
from ..shards.errors import DeltatokError
from ..shards.records import DoneRecord
from ..shards.running.devices import choose_device, precision_name
from ..shards.windows import ShardRows
from ..train.encode import check_tokenizer, describe_deltas
from ..train.models.deltatok import DeltaTok
from .commands.extract import VideosConfig

STORED_PATCHES = {"storage": {"dtype": "float16"}}
"""The part of a patch cache's identity that its writer adds: what the patch tokens are rounded to
here, though they are not stored."""


def run_fused(config: VideosConfig) -> ExtractionSummary:
    """Makes the delta-token cache `config.out`, or goes on with it; `config.tokenizer` is given.

    Raises what run_extraction does; CacheMismatch (4) also for a tokenizer that was trained on
    patch tokens of another kind.
    """
    return run_extraction(config, writer=DeltaShardWriter.from_config(config))


class DeltaShardWriter:
    """Keeps the delta tokens of every window: a ShardWriter, see extract/shard_writer.py.

    B windows, T frames, N patches, D channels.
    """

    def __init__(self, model: DeltaTok, folder: str, *, autocast_dtype: str, seed: int) -> None:
        """folder: where the tokenizer comes from; it says there what it was trained on.
        autocast_dtype: "float32" or "bfloat16". seed: decides the order of windows in a shard."""
        self._model = model
        self._folder = folder
        self._autocast_dtype = autocast_dtype
        self._seed = seed
        self._grid = (0, 0)
        self._black = torch.empty(0)
        self._num_lost = torch.zeros((), dtype=torch.int64)

    @classmethod
    def from_config(cls, config: VideosConfig) -> "DeltaShardWriter":
        """With the tokenizer of `config`, still on the CPU."""
        folder = config.tokenizer or ""
        return cls(
            DeltaTok.from_pretrained(folder),
            folder,
            autocast_dtype=precision_name(
                config.tokenizer_autocast or "auto", choose_device(config.device)
            ),
            seed=config.seed,
        )

    def describe(self, patches: CacheInfo) -> CacheInfo:
        """The cache.json of the delta tokens, its parent the patch cache that might have been."""
        stored = replace(patches, identity=patches.identity | STORED_PATCHES)
        check_tokenizer(self._model, self._folder, stored)
        if stored.shape.grid is None:
            raise AssertionError("patch tokens have a grid")
        self._grid = stored.shape.grid
        return describe_deltas(
            self._model,
            stored,
            autocast_dtype=self._autocast_dtype,
            parent_fingerprint=stored.fingerprint,
        )

    def begin(self, folder: Path, black_tokens: Tensor) -> None:
        """Takes the tokenizer to the device; black_tokens (N, D) precede every window."""
        self._model.to(black_tokens.device)
        self._black = black_tokens
        self._num_lost = self._num_lost.to(black_tokens.device)

    def convert(self, tokens: Tensor) -> Tensor:
        """Delta tokens, float16 (B, T, D), of float32 patch tokens (B, T, N, D)."""
        rounded = tokens.half()
        # Counted where they are, so that nobody waits for the number; `write` asks if it matters.
        self._num_lost += (~rounded.isfinite()).sum()
        with torch.autocast(
            tokens.device.type, torch.bfloat16, enabled=self._autocast_dtype == "bfloat16"
        ):
            z = self._model.encode_sequence(rounded.float(), self._black, grid=self._grid)
        return z.half()

    def write(self, folder: Path, shard: int, rows: ShardRows) -> DoneRecord:
        """Writes the tar of a shard, its windows in the order a patch shard would have them in."""
        try:
            return write_delta_shard(folder, shard, rows.from_first_frame(), seed=self._seed)
        except DeltatokError as error:
            raise self.explained(error) from None

    def explained(self, error: DeltatokError) -> DeltatokError:
        """The error of a shard that could not be written, with the patch tokens' part in it."""
        num_lost = int(self._num_lost)
        if not num_lost:
            return error
        return type(error)(
            f"{error}; {num_lost} patch token values of this run were not finite or beyond the "
            "range of float16 already: run the backbone in float32"
        )
