"""Linear task heads on frozen patch tokens: segmentation and depth.

Letters: B batch, D channels of a patch token, h, w patches of a frame, C classes or depth bins.
Feature maps are float (B, D, h, w), the patch tokens of one frame, row-major (`feature_map`).
As released: BatchNorm (over the batches of all ranks) and a 1x1 convolution; depth: 256 bins, ReLU
+ 0.1, normalised.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...shards.errors import UsageError
from ..engine.model_folder import Pretrained
from .batch_norm import RankBatchNorm2d
from .blocks import init_weights
from .configs import check_at_least

INITIALIZER_RANGE = 0.02  # as the other fresh weights (paper); the release has only trained heads
DEPTH_FLOOR = 0.1  # released head: every bin keeps some weight, so that the sum is never zero


@dataclass(frozen=True, kw_only=True)
class SegmentationHeadConfig:
    """A segmentation head."""

    in_size: int = 768
    """Channels D of a patch token."""
    num_classes: int
    """Classes, without the ignored one."""

    def __post_init__(self) -> None:
        check_at_least(1, in_size=self.in_size, num_classes=self.num_classes)


@dataclass(frozen=True, kw_only=True)
class DepthHeadConfig:
    """A depth head, by default KITTI's."""

    in_size: int = 768
    """Channels D of a patch token."""
    min_depth: float = 1e-3
    """Depth of the first bin, metres."""
    max_depth: float = 80.0
    """Depth of the last bin, metres."""
    num_bins: int = 256
    """Evenly spaced depths that are averaged."""

    def __post_init__(self) -> None:
        check_at_least(1, in_size=self.in_size)
        check_at_least(2, num_bins=self.num_bins)
        if not self.min_depth < self.max_depth:
            raise UsageError(
                f"min_depth {self.min_depth}, max_depth {self.max_depth}: wanted min below max"
            )


class LinearHead(Pretrained):
    """BatchNorm and a 1x1 convolution: feature maps (B, D, h, w) -> (B, out_size, h, w)."""

    def __init__(
        self,
        config: SegmentationHeadConfig | DepthHeadConfig,
        out_size: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(config)
        self.bn = RankBatchNorm2d(config.in_size)
        self.head = nn.Conv2d(config.in_size, out_size, kernel_size=1)
        init_weights(self, std=INITIALIZER_RANGE, layer_scale_init=1.0, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.head(self.bn(features))
        return out


class SegmentationHead(LinearHead):
    """Feature maps (B, D, h, w) -> class logits (B, C, h, w)."""

    config_class = SegmentationHeadConfig
    config: SegmentationHeadConfig

    def __init__(
        self, config: SegmentationHeadConfig, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, config.num_classes, generator)


class DepthHead(LinearHead):
    """Feature maps (B, D, h, w) -> depth in metres (B, 1, h, w)."""

    config_class = DepthHeadConfig
    config: DepthHeadConfig

    def __init__(
        self, config: DepthHeadConfig, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, config.num_bins, generator)

    def forward(self, features: Tensor) -> Tensor:
        """The expected depth: bins weighted by ReLU(logit) + 0.1, normalised."""
        config = self.config
        weights = F.relu(super().forward(features).float()) + DEPTH_FLOOR
        weights = weights / weights.sum(dim=1, keepdim=True)
        bins = torch.linspace(
            config.min_depth, config.max_depth, config.num_bins, device=weights.device
        )
        depth: Tensor = torch.einsum("bchw,c->bhw", weights, bins)
        return depth[:, None]


def feature_map(tokens: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """Patch tokens (..., N, D), row-major -> feature maps (..., D, h, w)."""
    height, width = grid
    return tokens.transpose(-1, -2).reshape(*tokens.shape[:-2], -1, height, width)
