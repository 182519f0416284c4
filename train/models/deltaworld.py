"""DeltaWorld: past delta tokens -> the next delta token, one sample for each query.

Letters: B batch, T frames, P = T - 1 target positions, S samples, Q queries, K past tokens,
C context tokens, H horizon (steps), D channels of a delta token, Dp channels of a query.
Times are seconds, float32. Token 0 stands for black -> frame 0, so tokens 1..T-1 are predicted.
"""

import torch
from torch import Tensor

from .configs import DeltaWorldConfig
from .world import KeysValues, World, causal


class DeltaWorldNetwork(World):
    """One query a target position (and sample); its keys are the strictly earlier delta tokens."""

    config_class = DeltaWorldConfig
    saved_as = "DeltaWorld"
    config: DeltaWorldConfig

    def forward(self, z: Tensor, timestamps: Tensor, queries: Tensor | None = None) -> Tensor:
        """Teacher forcing: predictions (B, T-1, D) of z[:, 1:] from the true tokens before each.

        z (B, T, D), timestamps (B, T), queries (B, T-1, Dp): the selected noise; None: the learned
        query of a discriminative model. Of queries (B, T-1, S, Dp): predictions (B, T-1, S, D).
        """
        if queries is None:
            queries = self.learned_queries(z.shape[0], z.shape[1] - 1)
        several = queries if queries.ndim == 4 else queries[:, :, None]
        predictions = self.candidates(self.memory(z, timestamps), timestamps, several)
        return predictions if queries.ndim == 4 else predictions[:, :, 0]

    def predict(
        self,
        queries: Tensor,
        query_times: Tensor,
        tokens: Tensor,
        token_times: Tensor,
        *,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Delta tokens (B, Q, D) for queries (B, Q, Dp) at query_times (B, Q), from tokens
        (B, K, D) at token_times (B, K); visible bool (Q, K), None: every token."""
        memory = self.predictor.keys_values(tokens, token_times[..., None])
        out: Tensor = self.predictor(queries, query_times[..., None], memory, visible=visible)
        return out

    def memory(self, z: Tensor, timestamps: Tensor) -> KeysValues:
        """Keys and values of z (B, T, D) but its last token: what teacher forcing may see."""
        return self.predictor.keys_values(z[:, :-1], timestamps[:, :-1, None])

    def candidates(self, memory: KeysValues, timestamps: Tensor, queries: Tensor) -> Tensor:
        """Teacher-forced predictions (B, P, S, D) for queries (B, P, S, Dp); memory: see there."""
        batch, positions, samples, _ = queries.shape
        times = timestamps[:, 1:, None].expand(-1, -1, samples).flatten(1)
        out: Tensor = self.predictor(
            queries.flatten(1, 2),
            times[..., None],
            memory,
            visible=causal(positions, repeats=samples, device=queries.device),
        )
        return out.reshape(batch, positions, samples, -1)

    def rollout(
        self,
        z_context: Tensor,
        timestamps: Tensor,
        *,
        horizon: int,
        num_samples: int,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Forecasts (B, S, H, D) from z_context (B, C, D); timestamps (B, C + H) of context and
        targets. noise (H, B, S, 1, Dp), generator: see World._rollout."""
        forecasts = self._rollout(
            z_context,
            timestamps[..., None, None],
            horizon=horizon,
            num_samples=num_samples,
            noise=noise,
            generator=generator,
        )
        return forecasts[:, :, :, 0]
