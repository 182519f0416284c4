"""What a run trains: a model, its batches and its loss. The loop knows no more of it than this.

Letters: B samples of one rank's batch, b samples of one micro-batch of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ...shards.deltas.reader import DeltaShards
from ...shards.errors import DamagedShard
from ...shards.patches.reader import PatchShards
from ..data.batches import Batch
from ..data.order import Indices
from .logs import Meter
from .model_folder import Pretrained


class Objective(ABC):
    """Everything is a function of the step alone. `check` and `judge` may be left as they are."""

    unit: ClassVar[str]
    """What a sample is, in the log: "pairs", "windows", "frames"."""
    best_by: ClassVar[str]
    """The number of `evaluate` that tells the best checkpoint: the lower, the better."""

    def __init__(self, model: Pretrained, shards: PatchShards | DeltaShards) -> None:
        """model: bare, float32, on the CPU."""
        self.model = model
        self._shards = shards

    @property
    @abstractmethod
    def tokens_per_sample(self) -> int:
        """Tokens that a sample brings, for the log's tokens a second."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Steps in which every training window comes once."""

    @property
    @abstractmethod
    def can_evaluate(self) -> bool:
        """Whether there are validation windows."""

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

    def work_at(self, step: int) -> int:
        """Any number that is the same for steps that take the same FLOPs a sample."""
        return 0

    def clip_of(self, window: int) -> str:
        """The key of a window's clip."""
        key: str = self._shards.keys[int(self._shards.clip_index[window])]
        return key

    def provenance(self) -> dict[str, Any]:
        """provenance.json of the trained model."""
        name = data_name(self._shards)
        return {name: self._shards.info.identity, f"{name}_fingerprint": self._shards.fingerprint}


def data_name(shards: PatchShards | DeltaShards) -> str:
    """What a run calls the cache that it trains on: "patches" or "deltas"."""
    return "deltas" if isinstance(shards, DeltaShards) else "patches"


MAX_NAMED_WINDOWS = 4
"""Windows that are named at most."""


def nan_report(losses: Tensor, batch: Batch, *, clip_of: Callable[[int], str]) -> str:
    """ "(its own loss is not finite): window 3 of clip 'a.mp4', ...": of one rank's losses (B,)
    those that are not finite; all, where every one is (then it is the gradient, or another rank).
    """
    bad = (~losses.isfinite()).nonzero()[:, 0].tolist()
    which = "its own loss is not finite" if bad else "its own losses are finite"
    chosen = bad or range(len(losses))
    return f"({which}): {_named([int(batch.windows[index]) for index in chosen], clip_of)}"


def check_validation_finite(
    tokens: Tensor, windows: Indices, *, clip_of: Callable[[int], str]
) -> None:
    """DamagedShard naming those of the validation `windows`, tokens (w, ...), that hold anything
    but numbers: else every evaluation would say nothing, and no checkpoint be the best."""
    bad = (~tokens.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise DamagedShard(
            f"validation: {_named([int(windows[index]) for index in bad], clip_of)}: holds "
            "numbers that are not finite: run `deltatok-shards verify` on the cache, and make what "
            "it names again"
        )


def _named(windows: list[int], clip_of: Callable[[int], str]) -> str:
    different = list(dict.fromkeys(windows))
    named = ", ".join(
        f"window {window} of clip {clip_of(window)!r}" for window in different[:MAX_NAMED_WINDOWS]
    )
    return f"{named}{', ...' if len(different) > MAX_NAMED_WINDOWS else ''}"
