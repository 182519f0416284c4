"""What the two world trainers are told about best-of-many. Part of their configs."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from ..shards.errors import UsageError
from .checks import check_at_least, check_choice

SelectionDtype = Literal["auto", "float32", "bfloat16", "float8"]


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How the best of the noise queries is found; nothing of it is read if model.use_bom is
    false."""

    num_samples_schedule: tuple[tuple[int, int], ...] = ()
    """Candidates K of a position by step: pairs of the first step (from 0) and K; none:
    model.num_samples_train at every step."""
    selection_dtype: SelectionDtype = "auto"
    """Arithmetic of the selection only; auto: that of `precision`. bfloat16: three times as fast
    on a CPU that has it. float8: MLP products in e4m3, on GPUs of compute capability 8.9 or more
    (H100, H200). Losses are compared in float32."""
    selection_finalists: int = 1
    """With a selection_dtype: this many of its best candidates are compared again in the arithmetic
    of `precision`, which decides; 1: none."""
    selection_max_regret: float = 0.01
    """With a selection_dtype: the run stops if the regret in float32, (loss of the pick - lowest
    loss) / lowest loss, is above this on average. Measured whenever a line is logged
    (selection_regret, and selection_agreement: the share of equal picks)."""
    selection_check_windows: int = 4
    """Windows of a portion on which they are measured."""
    selection_memory_mb: int | None = None
    """Activations of the candidates that are predicted at a time, megabytes; none: 64 on cpu, 1024
    elsewhere. Bounds memory, changes nothing else."""
    compile_selection: bool | None = None
    """Compile the selection (DeltaWorld's only), apart from the model; none: as `compile`."""

    SELECTION_MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {
            *("selection_memory_mb", "compile_selection", "selection_check_windows"),
            # Which of nearly equal candidates win: a run that stops for its regret may go on.
            *("selection_dtype", "selection_finalists", "selection_max_regret"),
        }
    )
    """Fields that may differ between a run and its continuation."""

    def check_selection(self) -> None:
        """UsageError for a value that cannot be."""
        check_choice("selection_dtype", self.selection_dtype, get_args(SelectionDtype))
        check_at_least(
            1,
            selection_memory_mb=self.selection_memory_mb,
            selection_finalists=self.selection_finalists,
            selection_check_windows=self.selection_check_windows,
        )
        check_at_least(0, selection_max_regret=self.selection_max_regret)
        if self.selection_finalists > 1 and self.selection_dtype == "auto":
            raise UsageError(
                f"selection_finalists {self.selection_finalists}: wanted a selection_dtype as "
                "well, whose best candidates are compared again; set one, or leave this out"
            )
        steps = [step for step, _ in self.num_samples_schedule]
        if steps and (steps[0] != 0 or steps != sorted(set(steps))):
            raise UsageError(
                f"num_samples_schedule begins at the steps {steps}: wanted 0 first, then rising "
                "steps; give [[0, K], [step, K], ...]"
            )
        for _, num_samples in self.num_samples_schedule:
            check_at_least(1, num_samples_schedule=num_samples)

    def num_samples_at(self, step: int, *, default: int) -> int:
        """Candidates of a step (from 0); default: where no schedule says it."""
        begun = [count for first, count in self.num_samples_schedule if first <= step]
        return begun[-1] if begun else default
