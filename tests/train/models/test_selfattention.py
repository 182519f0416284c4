"""The plain transformer as predictor: what sees what, and that rollouts are teacher forcing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deltatok.shards.errors import UsageError
from deltatok.train.config import WorldTrainConfig
from deltatok.train.models.configs import DeltaWorldConfig
from deltatok.train.models.selfattention import SelfAttentionWorld

CONFIG = DeltaWorldConfig(
    hidden_size=24,
    predictor_hidden_size=32,
    predictor_num_hidden_layers=2,
    predictor_num_heads=2,
    rope_axis_sizes=(12,),
    use_bom=False,
    layer_scale_init=0.5,
    initializer_range=0.2,
)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def times(batch: int, frames: int) -> Tensor:
    return torch.rand(batch, frames, generator=torch.Generator().manual_seed(2)).cumsum(1)


@pytest.fixture
def world() -> SelfAttentionWorld:
    return SelfAttentionWorld(CONFIG, generator=torch.Generator().manual_seed(0))


def test_a_prediction_sees_only_strictly_earlier_tokens(world: SelfAttentionWorld) -> None:
    z, at = normal(1, 5, 24), times(1, 5)
    changed = z.clone()
    changed[:, 2] += 1
    before, after = world(z, at), world(changed, at)
    torch.testing.assert_close(after[:, :2], before[:, :2])
    assert (after[:, 2:] - before[:, 2:]).abs().amin(-1).gt(0).all()


def test_past_tokens_are_updated_by_one_another(world: SelfAttentionWorld) -> None:
    """Unlike the cross-attention's: keys of a later block depend on the token before."""
    z, at = normal(1, 3, 24), times(1, 3)
    changed = z.clone()
    changed[:, 0] += 1
    keys, others = world.memory(z, at), world.memory(changed, at)
    assert torch.equal(keys[0][0][:, :, 1], others[0][0][:, :, 1])
    assert not torch.allclose(keys[1][0][:, :, 1], others[1][0][:, :, 1])


def test_a_token_after_others_is_as_in_one_pass(world: SelfAttentionWorld) -> None:
    z, at = normal(2, 5, 24), times(2, 5)[..., None]
    whole = world.predictor.keys_values(z, at)
    parts = world.predictor.keys_values(
        z[:, 3:], at[:, 3:], past=world.predictor.keys_values(z[:, :3], at[:, :3])
    )
    for (k, v), (k_whole, v_whole) in zip(parts, whole, strict=True):
        torch.testing.assert_close(k, k_whole)
        torch.testing.assert_close(v, v_whole)


def test_a_rollout_s_steps_are_teacher_forcing_on_its_own_tokens(
    world: SelfAttentionWorld,
) -> None:
    z, at = normal(2, 3, 24), times(2, 5)
    rolled = world.rollout(z, at, horizon=2, num_samples=20)[:, 0]
    own = torch.cat([z, rolled], dim=1)
    torch.testing.assert_close(world(own, at)[:, 2:], rolled, atol=1e-5, rtol=1e-4)


def test_the_query_knows_its_own_time(world: SelfAttentionWorld) -> None:
    z, at = normal(1, 3, 24), times(1, 3)
    later = at.clone()
    later[:, -1] += 1
    assert not torch.allclose(world(z, at)[:, -1], world(z, later)[:, -1])
    torch.testing.assert_close(world(z, at)[:, :-1], world(z, later)[:, :-1])


def test_with_noise_queries_it_is_refused() -> None:
    with pytest.raises(UsageError, match=r"predictor self-attention.*use_bom true"):
        WorldTrainConfig(
            deltas="d", out="o", predictor="self-attention", model=replace(CONFIG, use_bom=True)
        )
