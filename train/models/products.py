"""Linear layers of a low precision, for what needs no gradient. Used by folded.py.

float32, bfloat16   weights in that dtype, products as torch makes them
float8              e4m3 weights with a scale an output channel, e4m3 inputs with a scale a row
                    (taken from the row's largest value), float32 sums, bfloat16 results
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ProductsName = Literal["float32", "float64", "bfloat16", "float8"]
LARGEST = torch.finfo(torch.float8_e4m3fn).max
MULTIPLE = 16
"""What float8 products need sizes to be multiples of."""


class Affine(NamedTuple):
    """A linear layer's or a norm's weight and bias."""

    weight: Tensor
    bias: Tensor


class Affine8(NamedTuple):
    """A linear layer in float8."""

    weight: Tensor
    """float8 e4m3 (out, in)."""
    scale: Tensor
    """float32 (1, out): weight * scale is what was meant."""
    bias: Tensor
    """bfloat16 (out,)."""


def affine(module: nn.Linear | nn.LayerNorm, dtype: torch.dtype) -> Affine:
    """Weight and bias in `dtype`; the module's own tensors where they have it."""
    return Affine(module.weight.detach().to(dtype), module.bias.detach().to(dtype))


def affine8(module: nn.Linear) -> Affine8:
    """A linear layer rounded to float8."""
    weight, scale = scaled8(module.weight.detach())
    return Affine8(weight, scale.t().contiguous(), module.bias.detach().to(torch.bfloat16))


def scaled8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, n) as float8 (rows, n) and the scales float32 (rows, 1) that give it back."""
    largest = x.abs().amax(dim=1, keepdim=True).float()
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def product(x: Tensor, layer: Affine | Affine8) -> Tensor:
    """The linear layer on x (..., in), of any float dtype, in the layer's precision."""
    if isinstance(layer, Affine):
        return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)
    rows, scale = scaled8(x.flatten(0, -2))
    out: Tensor = torch._scaled_mm(
        rows,
        layer.weight.t(),
        scale_a=scale,
        scale_b=layer.scale,
        bias=layer.bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.view(*x.shape[:-1], -1)
