"""What the two world trainers are told about best-of-many. Part of their configs."""

from dataclasses import dataclass
from typing import ClassVar

from .checks import check_at_least


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How the best of the noise queries is found; nothing of it is read if model.use_bom is
    false."""

    selection_memory_mb: int | None = None
    """Activations of the candidates that are predicted at a time, megabytes; none: 16 on cpu, 1024
    elsewhere. Bounds memory, changes nothing else."""

    SELECTION_MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"selection_memory_mb"})
    """Fields that may differ between a run and its continuation."""

    def check_selection(self) -> None:
        """UsageError for a value that cannot be."""
        check_at_least(1, selection_memory_mb=self.selection_memory_mb)
