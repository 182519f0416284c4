"""The predictor both world models share: queries gather from past tokens by cross-attention only.

Letters: B batch, Q queries, K past tokens, D channels of a token, Dp channels of the predictor.
Keys and values come from the raw tokens in every block; queries never see each other. So keys and
values are computed once (keys_values) and serve any number of queries.
"""

import torch
from torch import Tensor, nn

from .blocks import PredictorBlock
from .configs import PredictorConfig
from .rope import axis_rope

KeysValues = list[tuple[Tensor, Tensor]]
"""For every block, rotated keys and values (B, heads, K, head channels)."""


class Predictor(nn.Module):
    """Cross-attention blocks, a final norm and a linear head."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        size = config.predictor_hidden_size
        self.axis_sizes = config.rope_axis_sizes
        self.blocks = nn.ModuleList(
            PredictorBlock(config) for _ in range(config.predictor_num_hidden_layers)
        )
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.head = nn.Linear(size, config.hidden_size)

    def keys_values(self, tokens: Tensor, positions: Tensor) -> KeysValues:
        """tokens (B, K, D), positions (B, K, axes) -> every block's keys and values."""
        rope = axis_rope(positions, self.axis_sizes)
        pairs = []
        for block in self.blocks:
            if isinstance(block, PredictorBlock):
                pairs.append(block.attention.keys_values(tokens, rope))
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

        visible bool (Q, K): which tokens a query sees, at least one; None: all.
        """
        rope = axis_rope(positions, self.axis_sizes)
        x = queries
        for block, pair in zip(self.blocks, keys_values, strict=True):
            x = block(x, rope, pair, visible)
        out: Tensor = self.head(self.norm(x))
        return out


def extend(cache: KeysValues, new: KeysValues) -> KeysValues:
    """The keys and values of `cache`, then those of `new`, of every block."""
    return [
        (torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2))
        for (k, v), (new_k, new_v) in zip(cache, new, strict=True)
    ]


def first_keys(cache: KeysValues, count: int) -> KeysValues:
    """The first `count` keys and values of every block."""
    return [(k[:, :, :count], v[:, :, :count]) for k, v in cache]


def repeat_batch(cache: KeysValues, count: int) -> KeysValues:
    """Every batch row `count` times in a row: (B, ...) -> (B * count, ...)."""
    return [(k.repeat_interleave(count, 0), v.repeat_interleave(count, 0)) for k, v in cache]


def causal(
    positions: int, *, repeats: int = 1, key_repeats: int = 1, device: torch.device | None = None
) -> Tensor:
    """Teacher forcing's visibility, bool (positions * repeats, positions * key_repeats).

    The queries of position p (target frame p + 1), `repeats` of them, see the keys of the frames
    0..p, key_repeats each: all strictly earlier than the target.
    """
    order = torch.arange(positions, device=device)
    return order.repeat_interleave(repeats)[:, None] >= order.repeat_interleave(key_repeats)
