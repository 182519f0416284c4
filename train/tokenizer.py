"""deltatok-train tokenizer: train_tokenizer(config), from a patch-token cache.

A step: windows of cached patch tokens -> pairs of frames -> decode(encode(pair)) -> the loss to the
pair's second frame. Paper section 3; PAPER "DeltaTok, the tokenizer".
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..shards.errors import DeltatokError, UsageError
from ..shards.patches.reader import PatchShards
from .config import TokenizeConfig, TokenizerTrainConfig
from .data.batches import Batch, TokenizerBatches, check_frames, places_in_chain
from .data.order import Indices, RankSlice, generator, shuffled
from .encode import write_deltas
from .engine.checkpoints import with_size_of_cache
from .engine.devices import to_device
from .engine.logs import Meter
from .engine.loop import train_objective
from .engine.objective import Objective
from .losses import LOSSES
from .models.deltatok import DeltaTok, draw_rope_rescale
from .probes import probe_tokenizer

PROBE_WINDOWS_AT_ONCE = 4
"""Windows of an evaluation on the device at a time: 28 pairs of 8-frame windows (a guess)."""

logger = logging.getLogger(__name__)


def train_tokenizer(config: TokenizerTrainConfig) -> Path:
    """train_objective for DeltaTok; gives OUT, by then a model folder.

    With config.deltas, the delta-token cache is written as well.
    """
    shards = PatchShards(config.patches)
    _check_deltas_wanted(config, shards)
    config = with_size_of_cache(config, shards.shape[2], cache=config.patches)
    folder = train_objective(
        "tokenizer", config, shards, (DeltaTok, config.model), TokenizerObjective
    )
    if config.deltas is not None:
        write_deltas(
            TokenizeConfig(
                patches=config.patches,
                tokenizer=config.out,
                out=config.deltas,
                device=config.device,
                autocast=config.precision,
            )
        )
    return folder


def _check_deltas_wanted(config: TokenizerTrainConfig, shards: PatchShards) -> None:
    """UsageError, before a step is trained, where the deltas need windows to be drawn first."""
    policy = shards.info.identity.get("sampling", {}).get("policy")
    if config.deltas is not None and policy == "uniform":
        raise UsageError(
            f"deltas: {config.patches} holds frames at a fixed rate, in which windows are drawn "
            "when they are encoded: leave deltas out, then run deltatok-extract --patches "
            f"{config.patches} --tokenizer {config.out} --out {config.deltas}"
        )


class TokenizerObjective(Objective):
    """A sample is a pair of frames."""

    unit = "pairs"
    best_by = "validation_loss"
    model: DeltaTok
    _shards: PatchShards
    _config: TokenizerTrainConfig

    def __init__(
        self,
        model: DeltaTok,
        shards: PatchShards,
        config: TokenizerTrainConfig,
        ranks: RankSlice,
        device: torch.device,
    ) -> None:
        super().__init__(model, shards, config, ranks, device)
        self.tokens_per_sample = 2 * shards.shape[1]  # of two frames
        if (chain := config.closed_loop_steps) > 1:
            check_frames(shards.shape[0], least=chain + 1, why=f"closed_loop_steps {chain}")
            if (share := config.batch_size // ranks.num_ranks) % chain:
                raise UsageError(
                    f"batch_size {config.batch_size}: {share} pairs on each of {ranks.num_ranks} "
                    f"processes, wanted a multiple of closed_loop_steps, {chain}"
                )
        self._batches = TokenizerBatches(
            self._source,
            self._training,
            num_frames=shards.shape[0],
            batch_size=config.batch_size,
            seed=config.seed,
            ranks=ranks,
            wide_pair_fraction=config.wide_pair_fraction,
        )
        self.order = self._batches.order
        # Read once: while training runs, the prefetch thread is the only reader.
        (self._frames,) = self._source.read_to_keep(self.validation)
        self.check_finite(self._frames, self.validation)
        if not len(self.validation):
            logger.warning(
                "without validation, nothing will tell whether the decoder ignores its delta token"
            )

    def read(self, step: int) -> Batch:
        return self._batches.read(step)

    def losses(
        self, forward: nn.Module, batch: Batch, samples: slice, *, step: int, meter: Meter
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        frames = batch.tensors["frames"]
        row, previous, current = batch.tensors["pairs"][samples].T
        x_prev, x_cur = frames[row, previous].float(), frames[row, current].float()
        # One factor a step, on every rank, as one forward of the whole batch would draw it.
        rescale = draw_rope_rescale(
            self._config.model, generator(self._config.seed, "rope rescale", step)
        )
        seen, decoded = self._patches_at(step, x_prev.device)
        run = partial(
            forward,
            grid=self._shards.grid,
            rescale=None if rescale is None else to_device(rescale, x_prev.device),
            encoder_patches=seen,
            decoder_patches=decoded,
        )
        if self._config.closed_loop_steps == 1:
            prediction = run(x_prev, x_cur)
        else:
            prediction = self._closed_loop(run, x_prev, x_cur, batch.samples[samples])
        if decoded is not None:
            x_cur = x_cur[:, decoded]
        return LOSSES[self._config.loss](prediction, x_cur).flatten(1).mean(1), {}

    def _patches_at(self, step: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The patches that encoder and decoder have in this step, on every rank, int64 (M,) each,
        ascending; None: all. The fewer are some of the more."""
        if not self.work_at(step):
            return None, None
        num_patches, seed = self._shards.shape[1], self._config.seed
        drawn = shuffled(np.arange(num_patches), num_patches, seed, "patches", step)

        def first(fraction: float) -> Tensor | None:
            count = max(1, round(fraction * num_patches))
            if count == num_patches:
                return None
            return to_device(torch.from_numpy(np.sort(drawn[:count])), device)

        return first(self._config.encoder_patch_fraction), first(
            self._config.decoder_patch_fraction
        )

    def work_at(self, step: int) -> bool:
        """Whether a step has a part of the patches only."""
        end = self._config.whole_frames_from
        return self._config.draws_patches and (end is None or step < end)

    def _closed_loop(
        self, run: Callable[..., Tensor], x_prev: Tensor, x_cur: Tensor, numbers: Indices
    ) -> Tensor:
        """Reconstructions (b, N, D) of x_cur from x_prev (b, N, D each); of all pairs but the first
        of a chain, from the reconstruction of the pair before. numbers (b,): of the samples."""
        config = self._config
        places = places_in_chain(
            numbers, pairs_per_window=self._shards.shape[0] - 1, chain=config.closed_loop_steps
        )
        out = torch.zeros_like(x_cur)
        for place in range(places.max() + 1):
            rows = to_device(torch.from_numpy(np.flatnonzero(places == place)), x_cur.device)
            true = start = x_prev[rows]
            if place > 0:
                start = out[rows - 1]
            if config.closed_loop_gradient == "stopped":
                start = start.detach()
            seen = start if config.closed_loop == "both" else true
            out = out.index_copy(0, rows, run(seen, x_cur[rows], start=start).float())
        return out

    def evaluate(self) -> dict[str, float]:
        probes = probe_tokenizer(
            self.model,
            self._frames,
            grid=self._shards.grid,
            loss=LOSSES[self._config.loss],
            windows_at_once=PROBE_WINDOWS_AT_ONCE,
        )
        return {f"validation_{name}": value for name, value in dataclasses.asdict(probes).items()}

    def judge(self, values: Mapping[str, float], *, step: int) -> None:
        ratio = values["validation_z_swap_ratio"]
        if self._config.allow_stuck or step < self._config.stuck_after_steps:
            return
        if ratio < self._config.stuck_threshold:
            raise DeltatokError(
                f"step {step}: the decoder ignores its delta token: swapping it between windows "
                f"makes the loss {ratio:.3f} times as large, a healthy one at least "
                f"{self._config.stuck_threshold}. Train again, into another out, with "
                "model.layer_scale_init 0.1 or with wide_pair_fraction 0.5; to go on all the "
                "same, set allow_stuck"
            )
