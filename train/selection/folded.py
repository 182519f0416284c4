"""DeltaWorld's teacher-forced predictions for many queries a position, by exact algebra.

    predictions(weights, fold(weights, project(weights, z), timestamps), queries)
    equals, but for rounding,
    world.candidates(world.memory(z, timestamps), timestamps, queries)

All queries of a position share its time and see its few keys. So, once a window and layer:
- the keys are rotated into each target's frame; queries are not rotated at all;
- the query projection goes into the keys and the output projection (with its bias and LayerScale)
  into the values: a query meets A * K vectors of Dp channels (84 at 7 keys) instead of two
  Dp x Dp matrices. From about 5 candidates a position on, that is less work;
- what is not visible gets a bias of -inf over (P, K); there is no mask over queries.
What is left of a candidate's work is the MLP. Without gradient, so linear layers may be of a low
precision:

    float32, bfloat16   weights in that dtype, products as torch makes them
    float8              e4m3 weights with a scale an output channel, e4m3 inputs with a scale a row
                        (taken from the row's largest value), float32 sums, bfloat16 results

Letters: B windows, T frames, P = T - 1 target positions, K = P keys, S samples, A heads,
E channels of a head, D channels of a token, Dp of a query.
"""

import math
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.blocks import PredictorBlock
from ..models.deltaworld import DeltaWorldNetwork
from ..models.rope import AxisRope, axis_rope, rotate_axes
from ..models.world import causal

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


class LayerWeights(NamedTuple):
    """One block: products in the precision that is asked for, all else at least float32."""

    norm1: Affine
    queries: Affine
    keys_values: Affine
    out: Affine
    scale1: Tensor
    norm2: Affine
    up: Affine | Affine8
    down: Affine | Affine8
    scale2: Tensor


class WorldWeights(NamedTuple):
    """A DeltaWorld's weights as `fold` and `predictions` take them."""

    layers: list[LayerWeights]
    norm: Affine
    head: Affine
    num_heads: int
    axis_sizes: tuple[int, ...]
    eps: float


class KeyValue(NamedTuple):
    """A layer's keys and values of some windows, (B, K, A, E) each, not rotated."""

    keys: Tensor
    values: Tensor

    def windows(self, part: slice) -> Self:
        """Those of some of the windows."""
        return self._replace(keys=self.keys[part], values=self.values[part])


class Folded(NamedTuple):
    """What a layer's queries meet, for some windows. Heads innermost: a softmax over the few keys
    then runs along them, three times as fast on a CPU as with the keys innermost."""

    keys: Tensor
    """(B * P, K * A, Dp): rotated for the position, query projection and scaling inside."""
    bias: Tensor
    """(B * P, 1, K * A): the query bias's share, and -inf where a key is not visible."""
    values: Tensor
    """(B, K * A, Dp): output projection, its bias and LayerScale inside; of all positions."""


def weights_of(world: DeltaWorldNetwork, products: ProductsName) -> WorldWeights:
    """The weights for `products` (float32: the model's own tensors, not copied). float8 is for
    the MLP's products; the few others are then bfloat16."""
    predictor = world.predictor
    dtype = torch.bfloat16 if products == "float8" else getattr(torch, products)
    stream = torch.promote_types(dtype, torch.float32)
    layers = []
    for block in predictor.blocks:
        if not isinstance(block, PredictorBlock):
            raise AssertionError("a predictor is made of PredictorBlocks")
        attention, mlp = block.attention, block.mlp
        is_low = products == "float8"
        layers.append(
            LayerWeights(
                norm1=affine(block.norm1, stream),
                queries=affine(attention.q_proj, dtype),
                keys_values=affine(attention.kv_proj, dtype),
                out=affine(attention.out_proj, dtype),
                scale1=block.layer_scale1.lambda1.detach(),
                norm2=affine(block.norm2, stream),
                up=affine8(mlp.up_proj) if is_low else affine(mlp.up_proj, dtype),
                down=affine8(mlp.down_proj) if is_low else affine(mlp.down_proj, dtype),
                scale2=block.layer_scale2.lambda1.detach(),
            )
        )
    return WorldWeights(
        layers=layers,
        norm=affine(predictor.norm, stream),
        head=affine(predictor.head, dtype),
        num_heads=world.config.predictor_num_heads,
        axis_sizes=predictor.axis_sizes,
        eps=world.config.layer_norm_eps,
    )


def project(weights: WorldWeights, z: Tensor) -> list[KeyValue]:
    """Every layer's keys and values of z (B, T, D) but its last token: once for all windows, since
    reading the weights takes longer than a few tokens' products. 0.5 MB a window in float32, at
    the released size; what `fold` makes of it is 22 MB."""
    tokens = z[:, :-1].to(weights.head.weight.dtype)
    pairs = []
    for layer in weights.layers:
        both = F.linear(tokens, *layer.keys_values)
        both = both.view(*tokens.shape[:2], 2, weights.num_heads, -1)
        pairs.append(KeyValue(both[:, :, 0], both[:, :, 1]))
    return pairs


def fold(weights: WorldWeights, projected: list[KeyValue], timestamps: Tensor) -> list[Folded]:
    """What the queries of some windows meet: their keys and values, their timestamps (B, T)."""
    rope = _relative_rope(timestamps, weights.axis_sizes)
    visible = causal(timestamps.shape[1] - 1, device=timestamps.device)  # (P, K)
    hidden = torch.zeros_like(visible, dtype=weights.norm.weight.dtype)
    hidden = hidden.masked_fill(~visible, -math.inf)
    pairs = zip(weights.layers, projected, strict=True)
    return [_fold_layer(layer, pair, rope, hidden) for layer, pair in pairs]


def predictions(weights: WorldWeights, folded: list[Folded], queries: Tensor) -> Tensor:
    """Predictions (B, P, S, D), in the products' dtype, for queries (B, P, S, Dp). The stream
    between the layers is float32 or more."""
    batch, positions, samples, _ = queries.shape
    dtype = weights.head.weight.dtype
    x = queries.to(weights.norm.weight.dtype, copy=True)  # from here on changed in place
    for layer, memory in zip(weights.layers, folded, strict=True):
        normed = _norm(x, layer.norm1, weights.eps).to(dtype)
        keys = memory.keys.transpose(1, 2)
        scores = torch.baddbmm(memory.bias, normed.flatten(0, 1), keys)  # (B * P, S, K * A)
        shares = scores.view(*scores.shape[:2], -1, weights.num_heads).softmax(2)
        shares = shares.view(batch, positions * samples, -1)
        x.add_(torch.bmm(shares, memory.values).view(x.shape))
        hidden = product(_norm(x, layer.norm2, weights.eps), layer.up)
        hidden = torch.ops.aten.gelu_(hidden)
        x.addcmul_(product(hidden, layer.down), layer.scale2)
    return product(_norm(x, weights.norm, weights.eps), weights.head)


def _fold_layer(layer: LayerWeights, pair: KeyValue, rope: AxisRope, hidden: Tensor) -> Folded:
    """rope: of every (target, key); hidden (P, K): 0 or -inf."""
    batch, num_keys, heads, _ = pair.keys.shape
    dtype, positions = pair.keys.dtype, len(hidden)
    k = pair.keys.transpose(1, 2)  # (B, A, K, E)
    v = pair.values.permute(2, 0, 1, 3)  # (A, B, K, E)
    k = rotate_axes(k[:, :, None].expand(-1, -1, positions, -1, -1), rope)
    k = k.permute(1, 0, 2, 3, 4) / math.sqrt(k.shape[-1])  # (A, B, P, K, E)
    query_bias = layer.queries.bias.to(hidden.dtype).view(heads, 1, 1, 1, -1)
    bias = (k * query_bias).sum(-1).permute(1, 2, 3, 0) + hidden[..., None]  # (B, P, K, A)
    # Row a * E + e of the query projection makes channel e of head a.
    query_weight = layer.queries.weight.view(heads, -1, layer.queries.weight.shape[1])
    keys = torch.bmm(k.flatten(1, 3).to(dtype), query_weight)  # (A, B * P * K, Dp)
    # Column a * E + e of the output projection takes channel e of head a.
    out_weight = layer.out.weight.view(layer.out.weight.shape[0], heads, -1).permute(1, 2, 0)
    values = torch.bmm(v.flatten(1, 2), out_weight).view(heads, batch, num_keys, -1)
    # A head's shares add up to 1, so each head brings its part of the bias.
    values = (values + layer.out.bias / heads) * layer.scale1
    return Folded(
        keys=keys.transpose(0, 1).reshape(batch * positions, num_keys * heads, -1),
        bias=bias.reshape(batch * positions, 1, -1).to(dtype),
        values=values.permute(1, 2, 0, 3).reshape(batch, num_keys * heads, -1).to(dtype),
    )


def _relative_rope(timestamps: Tensor, axis_sizes: tuple[int, ...]) -> AxisRope:
    """Tables (B, 1, P, K, size / 2) of the angle of each key minus that of each target: turning a
    key by it gives the product that turning both would give. From the two angles' own cosines and
    sines, so that their rounding (up to 1e-4 at thousands of radians) is the plain form's."""
    times = axis_rope(timestamps[..., None], axis_sizes)
    cos, sin = [], []
    for c, s in zip(times.cos, times.sin, strict=True):
        key_c, key_s = c[:, :, None, :-1], s[:, :, None, :-1]
        target_c, target_s = c[:, :, 1:, None], s[:, :, 1:, None]
        cos.append(key_c * target_c + key_s * target_s)
        sin.append(key_s * target_c - key_c * target_s)
    return AxisRope(tuple(cos), tuple(sin))


def _norm(x: Tensor, layer: Affine, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), layer.weight, layer.bias, eps)
