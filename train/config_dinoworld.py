"""What deltatok-train dinoworld is told. config.py has the configs of the other commands."""

from dataclasses import dataclass, field
from typing import ClassVar

from .config import TrainConfig
from .config_selection import SelectionConfig
from .models.configs import DINOWorldConfig


@dataclass(frozen=True, kw_only=True)
class DINOWorldTrainConfig(TrainConfig, SelectionConfig):
    """deltatok-train dinoworld: patch-token cache -> DINO-world, the baseline without delta tokens.
    A sample is a window. Optimizer settings are DeltaWorld's; the paper gives no others."""

    patches: str
    """Patch-token cache to train on."""
    model: DINOWorldConfig = field(default_factory=DINOWorldConfig)
    """The world model (use_bom true: best-of-many). Its hidden_size is the cache's; one set to
    anything but the default must agree with the cache."""
    steps: int = 300_000
    """Optimizer steps in all."""
    batch_size: int = 1024
    """Windows of one step over all ranks; micro_batch_size says how many a device takes at once
    (at 256 px, a window has 1,792 queries)."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    weight_decay: float = 0.4
    """AdamW's decay, on the weights of linear and convolution layers only."""

    MAY_CHANGE: ClassVar[frozenset[str]] = (
        TrainConfig.MAY_CHANGE | SelectionConfig.SELECTION_MAY_CHANGE | {"patches"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_selection()
