"""Best-of-many selection equals trying every sample in one go, whatever the chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatok.train.best_of_many import (
    candidate_losses,
    chosen_queries,
    select,
    select_from,
    select_patches,
)
from deltatok.train.losses import smooth_l1
from deltatok.train.models.deltaworld import DeltaWorld, DeltaWorldConfig
from deltatok.train.models.dinoworld import DINOWorld, DINOWorldConfig

SIZES = {
    "hidden_size": 16,
    "predictor_hidden_size": 16,
    "predictor_num_hidden_layers": 1,
    "predictor_num_heads": 1,
    "layer_scale_init": 0.5,
    "initializer_range": 0.5,
}
WORLD = DeltaWorld(
    DeltaWorldConfig(rope_axis_sizes=(12,), **SIZES), generator=torch.Generator().manual_seed(0)
)
BATCH, FRAMES = 2, 4


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(seed: int, samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    times = draw(seed, BATCH, FRAMES).abs().cumsum(1)
    return draw(seed, BATCH, FRAMES, 16), times, draw(seed + 1, BATCH, FRAMES - 1, samples, 16)


def every_loss(z: torch.Tensor, times: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The plain form: one teacher-forced pass a sample, no chunks, no running best."""
    losses = []
    for sample in range(noise.shape[2]):
        prediction = WORLD.teacher_forced(z, times, noise[:, :, sample])
        losses.append(smooth_l1(prediction, z[:, 1:]).mean(dim=2))
    return torch.stack(losses, dim=2)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), samples=st.integers(1, 9), chunk=st.integers(1, 10))
def test_selection_equals_the_plain_form(seed, samples, chunk):
    z, times, noise = problem(seed, samples)
    with torch.no_grad():
        wanted = every_loss(z, times, noise)
    indices, losses = select(WORLD, z, times, noise, chunk_samples=chunk)
    torch.testing.assert_close(losses, wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(indices, losses.argmin(dim=2))


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_first_of_equal_losses_wins(chunk):
    z, times, noise = problem(3, 1)
    indices, _ = select(WORLD, z, times, noise.expand(-1, -1, 5, -1), chunk_samples=chunk)
    assert torch.all(indices == 0)


def test_winner_in_a_late_chunk_is_found():
    z, times, noise = problem(4, 6)
    indices, losses = select(WORLD, z, times, noise, chunk_samples=2)
    order = losses[0, 0].argsort(descending=True)  # the best one comes last
    moved, _ = select(WORLD, z[:1], times[:1], noise[:1, :, order], chunk_samples=2)
    assert moved[0, 0] == 5
    assert order[5] == indices[0, 0]


def test_selection_makes_no_gradient():
    z, times, noise = problem(5, 3)
    _, losses = select(WORLD, z, times, noise.requires_grad_())
    assert not losses.requires_grad


def test_the_chosen_queries_give_the_lowest_loss_again():
    z, times, noise = problem(6, 8)
    indices, losses = select(WORLD, z, times, noise)
    prediction = WORLD(z, times, chosen_queries(noise, indices))
    again = smooth_l1(prediction, z[:, 1:]).mean(dim=2)
    torch.testing.assert_close(again, losses.amin(dim=2), atol=1e-6, rtol=1e-5)


def test_streamed_noise_gives_the_same_and_keeps_the_winners():
    z, times, noise = problem(7, 7)
    streamed = select_from(WORLD, z, times, iter(torch.split(noise, 3, dim=2)))
    indices, losses = select(WORLD, z, times, noise, chunk_samples=3)
    assert torch.equal(streamed.indices, indices)
    assert torch.equal(streamed.best_losses, losses.amin(dim=2))
    assert torch.equal(streamed.queries, chosen_queries(noise, indices))


def test_no_samples_are_refused():
    z, times, _ = problem(8, 1)
    with pytest.raises(ValueError, match="at least one sample"):
        select_from(WORLD, z, times, iter([]))


def test_patch_selection_chooses_once_a_frame():
    world = DINOWorld(
        DINOWorldConfig(rope_axis_sizes=(4, 4, 4), use_bom=True, **SIZES),
        generator=torch.Generator().manual_seed(0),
    )
    x, times, noise = draw(1, 2, 3, 4, 16), draw(2, 2, 3).abs().cumsum(1), draw(3, 2, 2, 5, 16)
    indices, losses = select_patches(world, x, times, noise, grid=(2, 2), chunk_samples=2)
    with torch.no_grad():
        memory = world.memory(x, times, grid=(2, 2))
        predictions = world.candidates(memory, times, noise, grid=(2, 2))
    wanted = candidate_losses(predictions, x[:, 1:])
    torch.testing.assert_close(losses, wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(indices, losses.argmin(dim=2))
