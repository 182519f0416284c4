"""The same predictor as a plain transformer: tokens and the query attend to one another in blocks.

What DeltaWorld's cross-attention is held against, as DINO-Foresight predicts: past tokens are
updated block by block under a causal mask, and one learned query (a mask token at the time of the
target) gathers from them and itself. Discriminative only.

Letters: B batch, Q queries, K past tokens, L tokens, D channels of a token, Dp of the predictor.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import MLP, LayerScale, split_heads
from .configs import PredictorConfig
from .deltaworld import DeltaWorldNetwork
from .rope import AxisRope, axis_rope, rotate_axes
from .world import KeysValues, Predictor


class SelfAttentionBlock(nn.Module):
    """Pre-norm self-attention with rotary times and a GELU MLP, each through a LayerScale."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        size, eps = config.predictor_hidden_size, config.layer_norm_eps
        self.head_dim = config.head_dim
        self.norm1 = nn.LayerNorm(size, eps=eps)
        self.qkv_proj = nn.Linear(size, 3 * size)
        self.out_proj = nn.Linear(size, size)
        self.layer_scale1 = LayerScale(size, init=config.layer_scale_init)
        self.norm2 = nn.LayerNorm(size, eps=eps)
        self.mlp = MLP(size, size * config.mlp_ratio)
        self.layer_scale2 = LayerScale(size, init=config.layer_scale_init)

    def forward(
        self,
        x: Tensor,
        rope: AxisRope,
        past: tuple[Tensor, Tensor] | None,
        visible: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, L, Dp) after what `past` holds, K keys and values (B, heads, K, head channels) ->
        the new x, and the keys and values of both, past first.

        visible bool (L, K + L): what each token sees.
        """
        parts = self.qkv_proj(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.head_dim) for part in parts)
        q, k = rotate_axes(q, rope).to(v.dtype), rotate_axes(k, rope).to(v.dtype)
        if past is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.layer_scale1(self.out_proj(out.transpose(1, 2).flatten(2)))
        return x + self.layer_scale2(self.mlp(self.norm2(x))), (k, v)


class SelfAttentionPredictor(Predictor):
    """A linear layer into the predictor, self-attention blocks, a final norm and a linear head."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__(config)
        self.embed = nn.Linear(config.hidden_size, config.predictor_hidden_size)
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(config) for _ in range(config.predictor_num_hidden_layers)
        )

    def keys_values(
        self, tokens: Tensor, positions: Tensor, *, past: KeysValues | None = None
    ) -> KeysValues:
        """tokens (B, K, D), positions (B, K, axes) -> every block's keys and values, those of
        `past` before them: each token sees itself and all before it, never a query."""
        rope = axis_rope(positions, self.axis_sizes)
        num_past = past[0][0].shape[2] if past else 0
        num_all = num_past + tokens.shape[1]
        order = torch.arange(num_all, device=tokens.device)
        visible = order[num_past:, None] >= order
        x, pairs = self.embed(tokens), []
        for number, block in enumerate(self.blocks):
            x, pair = block(x, rope, past[number] if past else None, visible)
            pairs.append(pair)
        return pairs

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        keys_values: KeysValues,
        *,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Predictions (B, Q, D) for queries (B, Q, Dp) at positions (B, Q, axes).

        visible bool (Q, K): which tokens a query sees beside itself; None: all.
        """
        rope = axis_rope(positions, self.axis_sizes)
        count, num_past = queries.shape[1], keys_values[0][0].shape[2]
        itself = torch.eye(count, dtype=torch.bool, device=queries.device)
        if visible is None:
            visible = itself.new_ones(count, num_past)
        seen = torch.cat([visible, itself], dim=1)
        x = queries
        for block, pair in zip(self.blocks, keys_values, strict=True):
            x, _ = block(x, rope, pair, seen)
        out: Tensor = self.head(self.norm(x))
        return out


class SelfAttentionWorld(DeltaWorldNetwork):
    """DeltaWorld's inputs and outputs, with one learned query and a self-attention predictor."""

    saved_as = "SelfAttentionWorld"
    predictor_class: ClassVar[type[Predictor]] = SelfAttentionPredictor
