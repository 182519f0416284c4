"""A decoder from patch tokens to pictures (a representation-autoencoder decoder, as released).

Only for looking at forecasts: nothing is trained on or measured by its pictures.

Letters: B batch, D channels of a patch token, h, w patches of a frame, C channels of the decoder,
P pixels of a drawn patch's side. Parameter names are those of the released checkpoint.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...shards.errors import UsageError
from ..engine.model_folder import Pretrained
from .blocks import init_weights

LAYER_NORM_EPS = 1e-12  # released head
INITIALIZER_RANGE = 0.02  # released head


@dataclass(frozen=True, kw_only=True)
class RGBHeadConfig:
    """The released RGB head, and the constants of the backbone that it undoes."""

    in_size: int = 768
    """Channels D of a patch token."""
    hidden_size: int = 1152
    """Channels C of the decoder."""
    depth: int = 28
    """Transformer layers."""
    num_heads: int = 16
    """Attention heads of a layer."""
    mlp_size: int = 4096
    """Hidden channels of a layer's MLP."""
    patch: int = 16
    """Pixels P of the side of a drawn patch."""
    img_size: int = 512
    """Pixels of the side of the square pictures whose grid the position table has."""
    feature_weight: tuple[float, ...]
    """Weight of the backbone's final LayerNorm, D numbers: divided out first."""
    feature_bias: tuple[float, ...]
    """Bias of the backbone's final LayerNorm, D numbers: subtracted first."""
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """The backbone's pixel mean, in the range 0-1."""
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """The backbone's pixel standard deviation."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise UsageError(
                f"hidden_size {self.hidden_size}: wanted a multiple of 4 and of num_heads "
                f"{self.num_heads}"
            )
        if self.patch < 1 or self.img_size % self.patch:
            raise UsageError(f"img_size {self.img_size} is no multiple of patch {self.patch}")
        lengths = (len(self.feature_weight), len(self.feature_bias))
        if lengths != (self.in_size, self.in_size):
            raise UsageError(
                f"feature_weight and feature_bias have {lengths} numbers, wanted in_size "
                f"{self.in_size}; take them from the backbone's final LayerNorm"
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise UsageError("image_mean and image_std: wanted three numbers each")


class RGBHead(Pretrained):
    """Feature maps (B, D, h, w) -> RGB pictures (B, 3, h * P, w * P), about 0-1, not clipped."""

    config_class = RGBHeadConfig
    config: RGBHeadConfig

    def __init__(self, config: RGBHeadConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        size = config.hidden_size
        side = config.img_size // config.patch
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, size))
        # Fixed, but stored: a parameter without gradient, as in the released checkpoint.
        self.decoder_pos_embed = nn.Parameter(sine_cosine_table(side, size), requires_grad=False)
        self.decoder_embed = nn.Linear(config.in_size, size)
        self.decoder_layers = nn.ModuleList(_Layer(config) for _ in range(config.depth))
        self.decoder_norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(size, 3 * config.patch**2)
        init_weights(self, std=INITIALIZER_RANGE, layer_scale_init=1.0, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        config = self.config
        batch, _, height, width = features.shape
        tokens = features.flatten(2).transpose(1, 2)
        weight, bias = (
            _constant(config.feature_weight, tokens),
            _constant(config.feature_bias, tokens),
        )
        tokens = self.decoder_embed((tokens - bias) / weight)
        table = self._positions(height, width)
        tokens = torch.cat(
            [
                (self.trainable_cls_token + table[:, :1]).expand(batch, -1, -1),
                tokens + table[:, 1:],
            ],
            dim=1,
        )
        for layer in self.decoder_layers:
            tokens = layer(tokens)
        patches = self.decoder_pred(self.decoder_norm(tokens))[:, 1:]
        side = config.patch
        pixels = patches.reshape(batch, height, width, side, side, 3).permute(0, 5, 1, 3, 2, 4)
        pixels = pixels.reshape(batch, 3, height * side, width * side)
        std = _constant(config.image_std, pixels)[:, None, None]
        picture: Tensor = pixels * std + _constant(config.image_mean, pixels)[:, None, None]
        return picture

    def _positions(self, height: int, width: int) -> Tensor:
        """The table (1, 1 + h * w, C): another grid than the table's own by bicubic resizing."""
        table = self.decoder_pos_embed
        side = self.config.img_size // self.config.patch
        if (height, width) == (side, side):
            return table
        grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class _Layer(nn.Module):
    """A plain pre-norm ViT layer."""

    def __init__(self, config: RGBHeadConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention = _Attention(config)
        self.layernorm_before = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.layernorm_after = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.intermediate = _dense(size, config.mlp_size)
        self.output = _dense(config.mlp_size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        hidden = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        out: Tensor = x + self.output["dense"](hidden)
        return out


class _Attention(nn.Module):
    """Self-attention. The modules within modules only give the released parameter names."""

    def __init__(self, config: RGBHeadConfig) -> None:
        super().__init__()
        size = config.hidden_size
        names = ("query", "key", "value")
        self.attention = nn.ModuleDict({name: nn.Linear(size, size) for name in names})
        self.output = _dense(size, size)
        self.num_heads = config.num_heads

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (part(x).reshape(shape).transpose(1, 2) for part in self.attention.values())
        gathered = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.output["dense"](gathered)
        return out


def _dense(in_size: int, out_size: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(in_size, out_size)})


def sine_cosine_table(side: int, size: int) -> Tensor:
    """The fixed 2-D position table float32 (1, 1 + side * side, size): zeros for the class token,
    then sines and cosines of the row (first half of the channels) and of the column."""
    index = torch.arange(side, dtype=torch.float64)
    frequencies = 10000 ** -(torch.arange(size // 4, dtype=torch.float64) / (size / 4))
    angles = index[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None].expand(side, side, -1)
    table = torch.cat([rows, columns], dim=-1).reshape(side * side, size)
    return torch.cat([torch.zeros_like(table[:1]), table])[None].to(torch.float32)


def _constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)
