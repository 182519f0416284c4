"""What both world models share: queries gather from past tokens by cross-attention only.

Letters: B batch, Q queries, K past tokens, S samples, C context frames, H horizon (steps), n tokens
of a frame, D channels of a token, Dp channels of the predictor and of a query.
Keys and values come from the raw tokens in every block; queries never see each other. So keys and
values are computed once (keys_values) and serve any number of queries.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...shards.errors import DeltatokError
from ..engine.model_folder import Pretrained
from .blocks import PredictorBlock, init_weights
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

    def keys_values(
        self, tokens: Tensor, positions: Tensor, *, past: KeysValues | None = None
    ) -> KeysValues:
        """tokens (B, K, D), positions (B, K, axes) -> every block's keys and values, those of
        `past` before them."""
        rope = axis_rope(positions, self.axis_sizes)
        pairs = []
        for block in self.blocks:
            if isinstance(block, PredictorBlock):
                pairs.append(block.attention.keys_values(tokens, rope))
        if past is None:
            return pairs
        return [
            (torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2))
            for (k, v), (new_k, new_v) in zip(past, pairs, strict=True)
        ]

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


class World(Pretrained):
    """Queries are noise (config.use_bom: generative) or one learned vector (discriminative)."""

    config: PredictorConfig
    predictor_class: ClassVar[type[Predictor]] = Predictor

    def __init__(
        self, config: PredictorConfig, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config)
        if not config.use_bom:
            self.q_embed = nn.Embedding(1, config.predictor_hidden_size)
        self.predictor = self.predictor_class(config)
        init_weights(
            self,
            std=config.initializer_range,
            layer_scale_init=config.layer_scale_init,
            generator=generator,
        )

    def learned_queries(self, *shape: int) -> Tensor:
        """The learned query, expanded to (*shape, Dp); a discriminative model only."""
        return self.q_embed.weight[0].expand(*shape, -1)

    def draw_noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Noise queries (*shape, Dp): normal times initializer_range, on the generator's device."""
        noise = torch.randn(
            *shape,
            self.config.predictor_hidden_size,
            generator=generator,
            device=generator.device,
        )
        return self.config.initializer_range * noise

    def _rollout(
        self,
        tokens: Tensor,
        positions: Tensor,
        *,
        horizon: int,
        num_samples: int,
        noise: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Forecasts (B, S, H, n, D): each sample's own frame is appended, then the next is made.

        tokens (B, C * n, D); positions (B, C + H, n, axes) of context and targets. A generative
        model takes noise (H, B, S, 1, Dp), already scaled, or draws it from generator; a
        discriminative one takes neither and has S = 1, whatever num_samples says.
        """
        batch, context = len(tokens), positions.shape[1] - horizon
        if not self.config.use_bom:
            queries = self.learned_queries(horizon, batch, 1, 1)
        elif noise is not None:
            queries = noise
        elif generator is not None:
            queries = self.draw_noise(horizon, batch, num_samples, 1, generator=generator)
        else:
            raise DeltatokError("a sampled rollout needs noise or a generator; pass one")
        samples = queries.shape[2]
        memory = self.predictor.keys_values(tokens, positions[:, :context].flatten(1, 2))
        memory = [
            (k.repeat_interleave(samples, 0), v.repeat_interleave(samples, 0)) for k, v in memory
        ]
        positions = positions.repeat_interleave(samples, 0)
        steps: list[Tensor] = []
        for now in range(context, context + horizon):
            if steps:
                memory = self.predictor.keys_values(steps[-1], positions[:, now - 1], past=memory)
            query = queries[len(steps)].flatten(0, 1).expand(-1, positions.shape[2], -1)
            steps.append(self.predictor(query, positions[:, now], memory))
        forecasts = torch.stack(steps, dim=1)
        return forecasts.reshape(batch, samples, *forecasts.shape[1:])


def causal(
    positions: int, *, repeats: int = 1, key_repeats: int = 1, device: torch.device | None = None
) -> Tensor:
    """Teacher forcing's visibility, bool (positions * repeats, positions * key_repeats).

    The queries of position p (target frame p + 1), `repeats` of them, see the keys of the frames
    0..p, key_repeats each: all strictly earlier than the target.
    """
    order = torch.arange(positions, device=device)
    return order.repeat_interleave(repeats)[:, None] >= order.repeat_interleave(key_repeats)
