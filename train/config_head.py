"""What `deltatok-train head` is told."""

from dataclasses import dataclass
from typing import ClassVar

from ..shards.errors import UsageError
from .checks import check_positive
from .config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class HeadTrainConfig(TrainConfig):
    """deltatok-train head: patch-token cache + labels -> linear segmentation or depth head.

    A sample is a labelled frame, in an evaluation cache one crop of it. The optimizer settings are
    guesses after the usual linear protocol."""

    patches: str
    """Evaluation cache (deltatok-extract --dataset, its training split), or patch-token cache of
    whole frames (uniform sampling: no crop, no flip)."""
    labels: str
    """Evaluation cache: the data set's folder. Uniform cache: folder with CLIP_KEY.npy: uint8
    (frames, height, width), 255 = ignore."""
    num_classes: int | None = None
    """Classes, labelled 0 to num_classes - 1; none given: those of the data set, where it is one
    that has a number of them (vspw 124, cityscapes 19, masks 2)."""
    max_depth: float | None = None
    """Depth: the largest that the head can say, metres; what lies beyond is not trained on. None
    given: 80, KITTI's."""
    steps: int = 40_000
    """Optimizer steps in all."""
    batch_size: int = 16
    """Samples of one step over all ranks."""
    lr: float = 1e-3
    """Learning rate after the warm-up."""
    warmup_steps: int = 1500
    """Steps of linear warm-up; the very first step has learning rate 0."""
    weight_decay: float = 1e-3
    """AdamW's decay, on the weights of linear and convolution layers only."""

    MAY_CHANGE: ClassVar[frozenset[str]] = TrainConfig.MAY_CHANGE | {"patches"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(max_depth=self.max_depth)
        if self.num_classes is not None and not 2 <= self.num_classes <= 255:
            raise UsageError(
                f"num_classes {self.num_classes}: wanted 2 to 255 (255 itself means ignore)"
            )
