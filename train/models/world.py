"""What both world models share: the predictor, and queries that are noise or one learned vector.

Letters: B batch, S samples, H horizon (steps), Dp channels of a query.
"""

import torch
from torch import Tensor, nn

from ...shards.errors import DeltatokError
from ..engine.model_folder import Pretrained
from .blocks import init_weights
from .configs import PredictorConfig
from .predictor import Predictor


class World(Pretrained):
    """Queries are noise (config.use_bom: generative) or one learned vector (discriminative)."""

    config: PredictorConfig

    def __init__(
        self, config: PredictorConfig, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config)
        if not config.use_bom:
            self.q_embed = nn.Embedding(1, config.predictor_hidden_size)
        self.predictor = Predictor(config)
        init_weights(
            self,
            std=config.initializer_range,
            layer_scale_init=config.layer_scale_init,
            generator=generator,
        )

    def learned_queries(self, *shape: int) -> Tensor:
        """The learned query, expanded to (*shape, Dp); a discriminative model only."""
        if self.config.use_bom:
            raise DeltatokError(
                "got no queries, and a world model with use_bom: true has no learned one; "
                "pass noise queries"
            )
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

    def rollout_queries(
        self,
        batch: int,
        *,
        horizon: int,
        num_samples: int,
        noise: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Queries (H, B, S, 1, Dp) of a rollout: noise, or drawn, or (S = 1) the learned query."""
        if not self.config.use_bom:
            if noise is not None:
                raise DeltatokError(
                    "got noise for a world model with use_bom: false, which has one learned query; "
                    "leave noise away"
                )
            return self.learned_queries(horizon, batch, 1, 1)
        if noise is None:
            if generator is None:
                raise DeltatokError("a sampled rollout needs noise or a generator; pass one")
            return self.draw_noise(horizon, batch, num_samples, 1, generator=generator)
        wanted = (horizon, batch, num_samples, 1, self.config.predictor_hidden_size)
        if noise.shape != wanted:
            raise DeltatokError(
                f"noise of shape {tuple(noise.shape)}, wanted {wanted}: (horizon, batch, samples, "
                "1, predictor channels)"
            )
        return noise


def check_timestamps(timestamps: Tensor, *, context: int, horizon: int) -> None:
    """Refuse a rollout whose timestamps (B, C + H) are not one for every frame."""
    if timestamps.shape[1] != context + horizon:
        raise DeltatokError(
            f"{timestamps.shape[1]} timestamps for {context} context frames and a horizon of "
            f"{horizon}; pass {context + horizon}"
        )
