"""The two transformer blocks: the tokenizer's self-attention, the predictor's cross-attention.

Letters: B batch, L tokens, Q queries, K keys, C channels of the stream, A heads, E = C / A.
Parameter names are those of the released checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configs import DeltaTokConfig, PredictorConfig
from .rope import AxisRope, Rope, rotate, rotate_axes


class LayerScale(nn.Module):
    """x (..., C) times one learned factor a channel."""

    def __init__(self, size: int, *, init: float) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((size,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class MLP(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(size, hidden_size)
        self.down_proj = nn.Linear(hidden_size, size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.gelu(self.up_proj(x)))
        return out


class SwiGLU(nn.Module):
    """An MLP whose hidden channels are gated: down(silu(gate(x)) * up(x))."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden_size)
        self.up_proj = nn.Linear(size, hidden_size)
        self.down_proj = nn.Linear(hidden_size, size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class SelfAttention(nn.Module):
    """The tokenizer's attention: rotary positions, then per-head LayerNorm of q and k, then a gate.

    The norm (no bias) acts after the rotation, on the delta token too; the gate is one sigmoid per
    head and token, from the block's normed input, on the attention output before its projection.
    """

    def __init__(self, config: DeltaTokConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim = config.head_dim
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size)
        self.q_proj = nn.Linear(size, size)
        self.o_proj = nn.Linear(size, size)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.use_qk_norm:
            eps = config.layer_norm_eps
            self.q_norm = nn.LayerNorm(self.head_dim, eps=eps, bias=False)
            self.k_norm = nn.LayerNorm(self.head_dim, eps=eps, bias=False)
        self.attn_gate: nn.Linear | None = None
        if config.use_gated_attn:
            self.attn_gate = nn.Linear(size, config.num_attention_heads)

    def forward(self, x: Tensor, rope: Rope, num_queries: int) -> Tensor:
        """x (B, L, C), normed -> (B, num_queries, C): what the first num_queries tokens gather."""
        queried = x[:, :num_queries]
        query_rope = Rope(rope.cos[:num_queries], rope.sin[:num_queries])
        q = self.q_norm(rotate(split_heads(self.q_proj(queried), self.head_dim), query_rope))
        k = self.k_norm(rotate(split_heads(self.k_proj(x), self.head_dim), rope))
        v = split_heads(self.v_proj(x), self.head_dim)
        # Rotation and norm are float32 under autocast; attention runs in the projections' dtype.
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2)
        if self.attn_gate is not None:
            out = out * torch.sigmoid(self.attn_gate(queried))[..., None]
        gathered: Tensor = self.o_proj(out.flatten(2))
        return gathered


class TokenizerBlock(nn.Module):
    """A pre-norm DINOv3 block: self-attention and MLP, each through a LayerScale."""

    def __init__(self, config: DeltaTokConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = nn.LayerNorm(size, eps=eps)
        self.attention = SelfAttention(config)
        self.layer_scale1 = LayerScale(size, init=config.layer_scale_init)
        self.norm2 = nn.LayerNorm(size, eps=eps)
        mlp = SwiGLU if config.use_swiglu else MLP
        self.mlp = mlp(size, config.mlp_size)
        self.layer_scale2 = LayerScale(size, init=config.layer_scale_init)

    def forward(self, x: Tensor, rope: Rope, *, num_queries: int | None = None) -> Tensor:
        """x (B, L, C) -> (B, num_queries, C).

        num_queries (None: all) is how many of the first tokens are wanted: a last block whose
        other outputs nobody reads need not compute them. The wanted ones do not change.
        """
        count = x.shape[1] if num_queries is None else num_queries
        x = x[:, :count] + self.layer_scale1(self.attention(self.norm1(x), rope, count))
        out: Tensor = x + self.layer_scale2(self.mlp(self.norm2(x)))
        return out


class CrossAttention(nn.Module):
    """Queries gather from keys and values that are projected from unnormed tokens."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        size = config.predictor_hidden_size
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(size, size)
        self.kv_proj = nn.Linear(config.hidden_size, 2 * size)
        self.out_proj = nn.Linear(size, size)

    def keys_values(self, tokens: Tensor, rope: AxisRope) -> tuple[Tensor, Tensor]:
        """tokens (B, K, D) -> rotated keys and values, (B, A, K, E) each."""
        k, v = self.kv_proj(tokens).chunk(2, dim=-1)
        v = split_heads(v, self.head_dim)
        return rotate_axes(split_heads(k, self.head_dim), rope).to(v.dtype), v

    def forward(
        self, x: Tensor, rope: AxisRope, keys_values: tuple[Tensor, Tensor], visible: Tensor | None
    ) -> Tensor:
        """x (B, Q, Dp), normed -> (B, Q, Dp); visible bool (Q, K), None: everything."""
        k, v = keys_values
        q = rotate_axes(split_heads(self.q_proj(x), self.head_dim), rope).to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        gathered: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return gathered


class PredictorBlock(nn.Module):
    """Pre-norm cross-attention and a GELU MLP, each through a LayerScale; no self-attention."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        size, eps = config.predictor_hidden_size, config.layer_norm_eps
        self.norm1 = nn.LayerNorm(size, eps=eps)
        self.attention = CrossAttention(config)
        self.layer_scale1 = LayerScale(size, init=config.layer_scale_init)
        self.norm2 = nn.LayerNorm(size, eps=eps)
        self.mlp = MLP(size, size * config.mlp_ratio)
        self.layer_scale2 = LayerScale(size, init=config.layer_scale_init)

    def forward(
        self, x: Tensor, rope: AxisRope, keys_values: tuple[Tensor, Tensor], visible: Tensor | None
    ) -> Tensor:
        """x (B, Q, Dp) -> (B, Q, Dp)."""
        x = x + self.layer_scale1(self.attention(self.norm1(x), rope, keys_values, visible))
        out: Tensor = x + self.layer_scale2(self.mlp(self.norm2(x)))
        return out


@torch.no_grad()
def init_weights(
    module: nn.Module,
    *,
    std: float,
    layer_scale_init: float,
    generator: torch.Generator | None = None,
) -> None:
    """Fresh weights as in the paper: truncated normal (std) for linear, convolution and embedding
    weights, zero biases, norms 1 and 0, LayerScale layer_scale_init.

    generator None draws from torch's global one, as torch's own initialisers do.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.trunc_normal_(part.weight, std=std, generator=generator)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        elif isinstance(part, LayerScale):
            nn.init.constant_(part.lambda1, layer_scale_init)
        bias = getattr(part, "bias", None)
        if isinstance(bias, nn.Parameter):
            nn.init.zeros_(bias)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, L, A * E) -> (B, A, L, E)."""
    return x.reshape(*x.shape[:2], -1, head_dim).transpose(1, 2)
