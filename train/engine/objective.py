"""What a run trains: a model, its batches and its loss. The loop knows no more of it than this.

Letters: B samples of one rank's batch, b samples of one micro-batch of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...shards.deltas.reader import DeltaShards
from ...shards.errors import DamagedShard
from ...shards.patches.reader import PatchShards
from ..config import TrainConfig
from ..data.batches import Batch
from ..data.order import BatchOrder, Indices, RankSlice, split_windows, spread
from ..data.residency import window_source
from .logs import Meter
from .model_folder import Pretrained

MAX_NAMED_WINDOWS = 4
"""Windows that are named at most."""


class Objective(ABC):
    """Everything is a function of the step alone. `check` and `judge` may be left as they are."""

    unit: ClassVar[str]
    """What a sample is, in the log: "pairs", "windows", "frames"."""
    best_by: ClassVar[str]
    """The number of `evaluate` that tells the best checkpoint: the lower, the better."""
    order: BatchOrder
    """What the steps of an epoch see."""
    tokens_per_sample: int
    """Tokens that a sample brings, for the log's tokens a second."""

    def __init__(
        self,
        model: Pretrained,
        shards: PatchShards | DeltaShards,
        config: TrainConfig,
        ranks: RankSlice,
        device: torch.device,
        *,
        videos: tuple[Sequence[str], Indices] | None = None,
    ) -> None:
        """model: bare, float32, on the CPU. videos: names, and int64 (W,): of which of them a
        window is; validation keeps whole ones. None: clips."""
        self.model = model
        self._shards, self._config, self._ranks, self._device = shards, config, ranks, device
        self._source = window_source(shards, residency=config.residency, device=device)
        names, video = videos or (shards.keys, shards.clip_index)
        split = split_windows(names, video, config.validation_fraction)
        self._training = split.training
        self.validation = spread(split.validation, config.validation_windows)
        """int64: windows of an evaluation; without any there is none."""

    @abstractmethod
    def read(self, step: int) -> Batch:
        """This rank's batch of a step (from 0). Called from the prefetch thread."""

    @abstractmethod
    def losses(
        self, forward: nn.Module, batch: Batch, samples: slice, *, step: int, meter: Meter
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """float32 (b,): the loss of each of the batch's `samples`, with gradient through
        `forward`, which is `model` as wrapped for this launch; and scalars for the log."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Validation numbers, by their names in the log; the same on every rank. Called in eval
        mode and without gradient."""

    def check(self, numbers: Mapping[str, float], *, step: int) -> None:  # noqa: B027
        """DeltatokError if what is about to be logged of a training step, the same on every rank,
        says that it must not change the weights."""

    def judge(self, values: Mapping[str, float], *, step: int) -> None:  # noqa: B027
        """DeltatokError if validation shows that going on is pointless."""

    def work_at(self, step: int) -> object:
        """Anything that is equal for steps that take the same FLOPs a sample."""
        return 0

    def provenance(self) -> dict[str, Any]:
        """provenance.json of the trained model."""
        name = data_name(self._shards)
        return {name: self._shards.info.identity, f"{name}_fingerprint": self._shards.fingerprint}

    def nan_report(self, losses: Tensor, batch: Batch) -> str:
        """ "(its own loss is not finite): window 3 of clip 'a.mp4', ...": of one rank's losses (B,)
        those that are not finite; all, where every one is (then it is the gradient, or another
        rank)."""
        bad = (~losses.isfinite()).nonzero()[:, 0].tolist()
        which = "its own loss is not finite" if bad else "its own losses are finite"
        return f"({which}): {self._named(batch.windows[bad or slice(None)])}"

    def check_finite(self, tokens: Tensor, windows: Indices) -> None:
        """DamagedShard naming those of the validation `windows`, tokens (w, ...), that hold
        anything but numbers: else every evaluation would say nothing, and no checkpoint be the
        best."""
        bad = (~tokens.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise DamagedShard(
                f"validation: {self._named(windows[bad])}: holds numbers that are not finite: run "
                "`deltatok-shards verify` on the cache, and make what it names again"
            )

    def _named(self, windows: Indices) -> str:
        keys, clip_index = self._shards.keys, self._shards.clip_index
        different = list(dict.fromkeys(windows.tolist()))
        named = ", ".join(
            f"window {window} of clip {keys[clip_index[window]]!r}"
            for window in different[:MAX_NAMED_WINDOWS]
        )
        return f"{named}{', ...' if len(different) > MAX_NAMED_WINDOWS else ''}"


def data_name(shards: PatchShards | DeltaShards) -> str:
    """What a run calls the cache that it trains on: "patches" or "deltas"."""
    return "deltas" if isinstance(shards, DeltaShards) else "patches"
