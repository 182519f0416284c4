"""Best-of-many in training: its noise, its candidates and winners, its precision and whether that
one is good enough.

Letters: B batch, P target positions, S samples, W winners, Dp channels of a query.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...shards.deltas.reader import DeltaShards
from ...shards.errors import DeltatokError, UsageError
from ...shards.patches.reader import PatchShards
from ...shards.running.devices import precision_name
from ..config import DINOWorldTrainConfig, WorldTrainConfig
from ..data.batches import Batch, WindowBatches, check_frames
from ..data.order import Indices, RankSlice, seed_for, uniforms
from ..engine.devices import check_compiler, to_device
from ..engine.logs import Meter, is_time
from ..engine.objective import Objective
from ..losses import smooth_l1
from ..models.deltaworld import DeltaWorldNetwork
from ..models.dinoworld import DINOWorld
from .folded import MULTIPLE, ProductsName
from .noise import CounterNoise, GivenNoise, Noise
from .search import ChunkLosses, Winners, default_chunks, select

Names = Sequence[tuple[int | str, ...]]
"""What each window's noise is drawn for."""


class NamedWindows(NamedTuple):
    """What is selected for."""

    tokens: Tensor
    """(B, T, D), or (B, T, N, D) for DINO-world; float32."""
    timestamps: Tensor
    """float32 (B, T), seconds."""
    names: Names

    def first(self, count: int) -> "NamedWindows":
        """The first `count` of them, or all."""
        return NamedWindows(self.tokens[:count], self.timestamps[:count], self.names[:count])


class Selector:
    """Selections of a run. Functions of the seed and the windows' names: neither ranks nor
    portions change a candidate."""

    def __init__(
        self,
        model: DeltaWorldNetwork | DINOWorld,
        config: WorldTrainConfig | DINOWorldTrainConfig,
        *,
        device: torch.device,
        grid: tuple[int, int] | None = None,
    ) -> None:
        """grid: the patches of a frame, for DINO-world.

        Raises UsageError for a selection_dtype that this device has not.
        """
        self._model, self._config, self._device, self._grid = model, config, device, grid
        self._full: ProductsName = (
            "bfloat16" if precision_name(config.precision, device) == "bfloat16" else "float32"
        )
        self._low: ProductsName | None = None
        if config.selection_dtype != "auto":
            self._low = config.selection_dtype
        if self._low == "float8" and config.model.use_bom:
            check_float8(model, device)
        self._chunk_losses = ChunkLosses()
        compiles = config.compile if config.compile_selection is None else config.compile_selection
        if compiles and config.model.use_bom and isinstance(model, DeltaWorldNetwork):
            check_compiler(device)
            self._chunk_losses.compile(mode=config.compile_mode, dynamic=False)

    def num_samples_at(self, step: int) -> int:
        """Candidates K of a training step (from 0)."""
        return self._config.num_samples_at(step, default=self._model.config.num_samples_train)

    def num_winners_at(self, step: int) -> int:
        """Candidates W of a training step (from 0) that are trained."""
        return self._config.num_winners_at(step)

    def train(
        self, windows: NamedWindows, *, step: int, checks: bool
    ) -> tuple[Winners, Mapping[str, Tensor]]:
        """The winners of a training step, in selection_dtype; and scalars for the log.

        checks: whether a low precision may be measured, if a line is logged after this step.
        """
        config, num_samples = self._config, self.num_samples_at(step)
        found = self._select(
            windows,
            self.noise(windows),
            num_samples=num_samples,
            num_winners=self.num_winners_at(step),
            products=self._low or self._full,
            num_finalists=config.selection_finalists,
            chunk_losses=self._chunk_losses,
        )
        if config.selection_finalists > 1:
            found = self._decide(windows, found)
        extras = {"mean_candidate_loss": found.mean_losses.mean()}
        is_logged = is_time(step + 1, every=config.log_every, last=config.steps)
        if self._low not in (None, "float32") and checks and is_logged:
            extras |= self._measure(windows, found, num_samples=num_samples)
        return found, extras

    def check(self, numbers: Mapping[str, float], *, step: int) -> None:
        """DeltatokError if the regret in a step's line of the log (steps from 1), the mean over
        portions and ranks, is above selection_max_regret."""
        regret, most = numbers.get("selection_regret", 0.0), self._config.selection_max_regret
        if regret > most:
            raise DeltatokError(
                f"step {step}: selection in {self._low} has a regret of {regret:.3g}, wanted at "
                f"most selection_max_regret {most}; the weights were not changed. Set "
                "selection_dtype auto (as precision), more selection_finalists or a higher "
                "selection_max_regret, and run again to go on from the last checkpoint"
            )

    def evaluate(self, windows: NamedWindows) -> Winners:
        """The best of num_samples_eval candidates, in the precision of training."""
        return self._select(
            windows,
            self.noise(windows),
            num_samples=self._model.config.num_samples_eval,
            products=self._full,
        )

    def noise(self, windows: NamedWindows) -> CounterNoise:
        """The windows' candidates."""
        keys = [seed_for("candidates", self._config.seed, *name) for name in windows.names]
        return CounterNoise(
            keys=to_device(torch.tensor(keys, dtype=torch.int64), self._device),
            positions=windows.tokens.shape[1] - 1,
            channels=self._model.config.predictor_hidden_size,
            std=self._model.config.initializer_range,
        )

    def _decide(self, windows: NamedWindows, found: Winners) -> Winners:
        """The best of the finalists, in the precision of training."""
        given = GivenNoise(self.noise(windows).at(found.finalists))
        decided = self._select(
            windows,
            given,
            num_samples=found.finalists.shape[2],
            num_winners=found.indices.shape[2],
            products=self._full,
        )
        return decided._replace(
            indices=found.finalists.gather(2, decided.indices),
            mean_losses=found.mean_losses,
            finalists=found.finalists,
        )

    def _measure(
        self, windows: NamedWindows, found: Winners, *, num_samples: int
    ) -> dict[str, Tensor]:
        """How good the picks of the first windows are by float32."""
        few = windows.first(self._config.selection_check_windows)
        count, num_winners = len(few.names), found.indices.shape[2]
        best = self._select(
            few,
            self.noise(few),
            num_samples=num_samples,
            num_winners=num_winners,
            products="float32",
        )
        picks = GivenNoise(found.queries[:count])
        picked = self._select(few, picks, num_samples=num_winners, products="float32").mean_losses
        regret = ((picked - best.best_losses) / best.best_losses).clamp(min=0).mean()
        same = found.indices[:count, :, :, None] == best.indices[:, :, None]
        agreement = same.any(3).float().mean()
        return {"selection_agreement": agreement, "selection_regret": regret}

    def _select(
        self,
        windows: NamedWindows,
        noise: Noise,
        *,
        num_samples: int,
        num_winners: int = 1,
        products: ProductsName,
        num_finalists: int = 1,
        chunk_losses: ChunkLosses | None = None,
    ) -> Winners:
        model = self._model
        chunks = default_chunks(
            model,
            windows.tokens,
            num_samples=num_samples,
            products=products,
            memory_mb=self._config.selection_memory_mb,
        )
        return select(
            model,
            windows.tokens,
            windows.timestamps,
            noise,
            grid=self._grid,
            num_samples=num_samples,
            num_winners=num_winners,
            num_finalists=num_finalists,
            products=products,
            chunks=chunks,
            chunk_losses=chunk_losses,
        )


class WorldObjective(Objective):
    """What both world models train: the next tokens from the best of K noise queries, from each of
    the best few, which share the loss equally, or, without use_bom, from learned ones. A sample is
    a window."""

    unit = "windows"
    best_by = "validation_best_loss"
    model: DeltaWorldNetwork | DINOWorld
    _config: WorldTrainConfig | DINOWorldTrainConfig

    def __init__(
        self,
        model: DeltaWorldNetwork | DINOWorld,
        shards: DeltaShards | PatchShards,
        config: WorldTrainConfig | DINOWorldTrainConfig,
        ranks: RankSlice,
        device: torch.device,
    ) -> None:
        check_frames(shards.shape[0], least=2)
        if config.rollout_probability > 0:
            check_frames(shards.shape[0], least=3, why="rollout_probability above 0")
        super().__init__(model, shards, config, ranks, device)
        self.tokens_per_sample = math.prod(shards.shape[:-1])
        grid = shards.grid if isinstance(shards, PatchShards) else None
        self._grid = {} if grid is None else {"grid": grid}
        self.selector = Selector(model, config, device=device, grid=grid)
        self._batches = WindowBatches(
            shards,
            self._source,
            self._training,
            batch_size=config.batch_size,
            seed=config.seed,
            ranks=ranks,
        )
        self.order = self._batches.order
        # Read once: while training runs, the prefetch thread is the only reader.
        self._held_out = self._batches.read_to_keep(self.validation)
        self.check_finite(self._held_out.tensors["tokens"], self.validation)

    def read(self, step: int) -> Batch:
        return self._batches.read(step)

    def losses(
        self, forward: nn.Module, batch: Batch, samples: slice, *, step: int, meter: Meter
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        tokens = batch.tensors["tokens"][samples].float()
        timestamps = batch.tensors["timestamps"][samples]
        queries: Tensor | None = None
        extras: Mapping[str, Tensor] = {}
        if self.model.config.use_bom:
            names = [("noise", step, int(number)) for number in batch.samples[samples]]
            with meter.computing("selection"):
                found, extras = self.selector.train(
                    NamedWindows(tokens, timestamps, names), step=step, checks=not meter.is_counting
                )
            queries = found.queries
        context = tokens
        if self._config.rollout_probability > 0:
            numbers = batch.samples[samples]
            context = self._with_own(tokens, timestamps, queries, numbers=numbers, step=step)
        prediction = forward(context, timestamps, queries, **self._grid)
        target = tokens[:, 1:] if queries is None else tokens[:, 1:, None]
        return smooth_l1(prediction, target.expand_as(prediction)).flatten(1).mean(1), extras

    @torch.no_grad()
    def _with_own(
        self,
        tokens: Tensor,
        timestamps: Tensor,
        queries: Tensor | None,
        *,
        numbers: Indices,
        step: int,
    ) -> Tensor:
        """`tokens` (B, T, ...) in which a share of the windows has, from a drawn token on, what the
        model itself predicts, each from the ones before it. queries (B, P, W, Dp): the first winner
        of every position; numbers (B,): of the windows in the global batch."""
        config, num_frames = self._config, tokens.shape[1]
        drawn = uniforms(2 * config.batch_size, config.seed, "rollouts", step)
        is_drawn, where = drawn.reshape(-1, 2)[numbers].T
        chosen = np.flatnonzero(is_drawn < config.rollout_probability)
        if not len(chosen):
            return tokens
        first = 1 + (where[chosen] * (num_frames - 2)).astype(np.int64)  # 1 to T - 2
        rows, begins = (
            to_device(torch.from_numpy(part), tokens.device) for part in (chosen, first)
        )
        own, times = tokens[rows], timestamps[rows]
        noise = None if queries is None else queries[rows, :, 0]
        for at in range(int(first.min()), num_frames - 1):
            # Its own forward: compiled ones would be compiled anew for every length.
            made = self.model.forward(
                own[:, : at + 1],
                times[:, : at + 1],
                None if noise is None else noise[:, :at],
                **self._grid,
            )[:, -1]
            is_own = (begins <= at).reshape(-1, *[1] * (own.ndim - 2))
            own[:, at] = torch.where(is_own, made.float(), own[:, at])
        torch.clear_autocast_cache()  # weights cast here must not serve the pass with gradient
        mixed = tokens.clone()
        mixed[rows] = own
        return mixed

    def validation_losses(
        self, tokens: Tensor, timestamps: Tensor, windows: Indices
    ) -> tuple[Tensor, Tensor]:
        """Of the best of num_samples_eval candidates, and the mean over them: the mean over these
        windows; the same noise every time."""
        names = [("validation noise", int(window)) for window in windows]
        found = self.selector.evaluate(NamedWindows(tokens, timestamps, names))
        return found.best_losses.mean(), found.mean_losses.mean()

    def check(self, numbers: Mapping[str, float], *, step: int) -> None:
        self.selector.check(numbers, step=step)

    def work_at(self, step: int) -> tuple[int, ...]:
        return self.selector.num_samples_at(step), self.selector.num_winners_at(step)


def check_float8(model: DeltaWorldNetwork | DINOWorld, device: torch.device) -> None:
    """UsageError unless this model's MLPs can be computed in float8 on this device."""
    if isinstance(model, DINOWorld):
        raise UsageError(
            "selection_dtype float8: got DINO-world, wanted DeltaWorld, whose selection has it; "
            "use bfloat16"
        )
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        got = device.type
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            got = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
        raise UsageError(
            f"selection_dtype float8: got {got}, wanted a GPU of compute capability 8.9 or more "
            "(H100, H200); use bfloat16 or auto"
        )
    size = model.config.predictor_hidden_size
    if size % MULTIPLE:
        raise UsageError(
            f"selection_dtype float8: predictor_hidden_size {size}, wanted a multiple of "
            f"{MULTIPLE}; use bfloat16 or auto"
        )
