"""The world models: what sees what, and rollouts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deltatok.shards.errors import DeltatokError, UsageError
from deltatok.train.models.configs import DeltaWorldConfig, DINOWorldConfig
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.models.world import causal

GRID = (2, 3)
WORLD = DeltaWorldConfig(
    hidden_size=24,
    predictor_hidden_size=32,
    predictor_num_hidden_layers=2,
    predictor_num_heads=2,
    rope_axis_sizes=(12,),
    layer_scale_init=0.5,
    initializer_range=0.2,
)
DINO = DINOWorldConfig(
    hidden_size=24,
    predictor_hidden_size=32,
    predictor_num_hidden_layers=2,
    predictor_num_heads=2,
    rope_axis_sizes=(4, 4, 4),
    layer_scale_init=0.5,
    initializer_range=0.2,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def times(batch: int, frames: int) -> Tensor:
    return torch.rand(batch, frames, generator=generator(2)).cumsum(1)


@pytest.fixture
def world() -> DeltaWorldNetwork:
    return DeltaWorldNetwork(WORLD, generator=generator())


@pytest.fixture
def dino_world() -> DINOWorld:
    return DINOWorld(replace(DINO, use_bom=True), generator=generator())


def test_prediction_sees_only_strictly_earlier_tokens(world):
    z, queries = normal(1, 4, 24), normal(1, 3, 32, seed=3)
    changed = z.clone()
    changed[:, 2:] += 1
    before = world(z, times(1, 4), queries)
    after = world(changed, times(1, 4), queries)
    torch.testing.assert_close(after[:, :2], before[:, :2])
    assert not torch.allclose(after[:, 2], before[:, 2])


def test_candidates_do_not_see_each_other(world):
    z, at, queries = normal(1, 4, 24), times(1, 4), normal(1, 3, 5, 32, seed=3)
    memory = world.memory(z, at)
    together = world.candidates(memory, at, queries)
    alone = world.candidates(memory, at, queries[:, :, 2:3])
    torch.testing.assert_close(together[:, :, 2:3], alone)


def test_only_time_differences_matter(world):
    z, queries = normal(1, 4, 24), normal(1, 3, 32, seed=3)
    shifted = world(z, times(1, 4) + 0.5, queries)
    torch.testing.assert_close(shifted, world(z, times(1, 4), queries), atol=1e-4, rtol=1e-4)


def test_rollout_equals_predicting_again_from_all_tokens(world):
    z, at, noise = normal(2, 3, 24), times(2, 5), normal(2, 2, 4, 1, 32, seed=3)
    got = world.rollout(z, at, horizon=2, num_samples=4, noise=noise)
    assert got.shape == (2, 4, 2, 24)
    for sample in range(4):
        tokens = z
        for step in range(2):
            time = at[:, 3 + step : 4 + step]
            new = world.predict(noise[step, :, sample], time, tokens, at[:, : 3 + step])
            torch.testing.assert_close(got[:, sample, step], new[:, 0])
            tokens = torch.cat([tokens, new], dim=1)


def test_rollout_is_reproducible_from_a_generator(world):
    z, at = normal(1, 2, 24), times(1, 4)
    drawn = [
        world.rollout(z, at, horizon=2, num_samples=3, generator=generator(5)) for _ in range(2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0][:, 0], drawn[0][:, 1])


def test_discriminative_rollout_has_one_sample():
    world = DeltaWorldNetwork(replace(WORLD, use_bom=False), generator=generator())
    got = world.rollout(normal(1, 2, 24), times(1, 3), horizon=1, num_samples=20)
    assert got.shape == (1, 1, 1, 24)


def test_rollout_without_noise_or_generator_is_refused(world):
    with pytest.raises(DeltatokError, match="needs noise or a generator"):
        world.rollout(normal(1, 2, 24), times(1, 3), horizon=1, num_samples=3)


def test_dino_prediction_sees_only_strictly_earlier_frames(dino_world):
    x, queries = normal(1, 3, 6, 24), normal(1, 2, 32, seed=3)
    changed = x.clone()
    changed[:, 1] += 1
    before = dino_world(x, times(1, 3), queries, grid=GRID)
    after = dino_world(changed, times(1, 3), queries, grid=GRID)
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_dino_rollout_steps_equal_teacher_forcing_on_its_own_frames(dino_world):
    x, at, noise = normal(1, 2, 6, 24), times(1, 4), normal(2, 1, 3, 1, 32, seed=3)
    got = dino_world.rollout(x, at, grid=GRID, horizon=2, num_samples=3, noise=noise)
    assert got.shape == (1, 3, 2, 6, 24)
    frames = torch.cat([x, got[:, 1]], dim=1)  # its last frame is a target only
    queries = torch.cat([normal(1, 1, 32), noise[:, :, 1, 0].transpose(0, 1)], dim=1)
    torch.testing.assert_close(dino_world(frames, at, queries, grid=GRID)[:, 1:], got[:, 1])


@pytest.mark.parametrize(
    "values",
    [
        {"predictor_num_heads": 3},
        {"rope_axis_sizes": (13,)},
        {"rope_axis_sizes": (8,)},
        {"rope_axis_sizes": (6, 6)},
        {"num_samples_train": 0},
    ],
)
def test_world_config_refuses_impossible_sizes(values):
    with pytest.raises(UsageError):
        replace(WORLD, **values)


def test_fresh_weights_come_from_the_generator():
    one, same, other = (DeltaWorldNetwork(WORLD, generator=generator(seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, one.state_dict().values(), same.state_dict().values()))
    assert not torch.equal(one.predictor.head.weight, other.predictor.head.weight)


def test_bfloat16_autocast_stays_near_float32(world):
    z, queries = normal(2, 4, 24), normal(2, 3, 32, seed=3)
    with torch.no_grad():
        exact = world(z, times(2, 4), queries)
        with torch.autocast("cpu", torch.bfloat16):
            rough = world(z, times(2, 4), queries)
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("key_repeats", [1, 4])
def test_every_query_sees_something(repeats, key_repeats):
    """Attention backends differ in what they give for a row of a mask that hides all: NaN, or 0."""
    visible = causal(7, repeats=repeats, key_repeats=key_repeats)
    assert visible.shape == (7 * repeats, 7 * key_repeats)
    assert visible.any(dim=1).all()
