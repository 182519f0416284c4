"""What the training loop asks of a stage (tokenizer, world model, head). Used by loop.py.

Letters: B samples of one rank's batch, b samples of one micro-batch of it.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from .data import Batch
from .logs import Meter
from .pretrained import Pretrained


class Stage(Protocol):
    """A model, its batches and its loss. Everything is a function of the step alone."""

    unit: str
    """What a sample is, in the log: "pairs", "windows", "frames"."""
    best_by: str
    """The number of `evaluate` that tells the best checkpoint: the lower, the better."""

    @property
    def tokens_per_sample(self) -> int:
        """Tokens that a sample brings, for the log's tokens a second."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every training window comes once."""

    @property
    def model(self) -> Pretrained:
        """The bare model, float32, on the CPU when the loop takes it."""

    @property
    def can_evaluate(self) -> bool:
        """Whether there are validation windows."""

    def read(self, step: int) -> Batch:
        """This rank's batch of a step (from 0). Called from the prefetch thread."""

    def losses(
        self, forward: nn.Module, batch: Batch, samples: slice, *, step: int, meter: Meter
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """float32 (b,): the loss of each of the batch's `samples`, with gradient through
        `forward`, which is `model` as wrapped for this launch; and scalars for the log."""

    def check(self, numbers: Mapping[str, float], *, step: int) -> None:
        """DeltatokError if what is about to be logged of a training step, the same on every rank,
        says that it must not change the weights."""

    def evaluate(self) -> dict[str, float]:
        """Validation numbers, by their names in the log; the same on every rank. Called in eval
        mode and without gradient."""

    def judge(self, values: Mapping[str, float], *, step: int) -> None:
        """DeltatokError if validation shows that going on is pointless."""

    def work_at(self, step: int) -> int:
        """Any number that is the same for steps that take the same FLOPs a sample."""

    def clip_of(self, window: int) -> str:
        """The key of a window's clip."""

    def provenance(self) -> dict[str, Any]:
        """provenance.json of the trained model."""
