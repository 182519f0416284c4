"""Best-of-many selection equals the plain form, whatever the algebra, the chunks, the portions."""

import math
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltatok.train.losses import smooth_l1
from deltatok.train.models.configs import DeltaWorldConfig, DINOWorldConfig
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.selection.folded import ProductsName, fold, predictions, project, weights_of
from deltatok.train.selection.noise import CounterNoise, GivenNoise
from deltatok.train.selection.search import (
    CPU_MEMORY_MB,
    Chunks,
    Winners,
    default_chunks,
    running_best,
    select,
)

sys.path.append(str(Path(__file__).parent))
from plain_best_of_many import plain_select, plain_select_one_by_one, plain_select_patches

SIZES = {
    "hidden_size": 12,
    "predictor_hidden_size": 32,
    "predictor_num_hidden_layers": 3,
    "predictor_num_heads": 2,
    "layer_scale_init": 0.7,
    "initializer_range": 0.3,
}
"""Wide weights and LayerScale near 1: at the first values of training all candidates are alike."""
FRAMES, GRID = 5, (2, 3)


def made(world: torch.nn.Module) -> torch.nn.Module:
    """Biases, norms and LayerScales that are no longer what they were initialised to."""
    for number, parameter in enumerate(world.parameters()):
        if parameter.ndim == 1:
            parameter.data += 0.3 * draw(number, *parameter.shape)
    return world.eval()


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_world(**changed: object) -> DeltaWorldNetwork:
    config = DeltaWorldConfig(**{**SIZES, "rope_axis_sizes": (12,), **changed})
    world = made(DeltaWorldNetwork(config, generator=torch.Generator().manual_seed(0)))
    assert isinstance(world, DeltaWorldNetwork)
    return world


WORLD = a_world()


def problem(seed: int, samples: int, *, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    times = draw(seed, batch, FRAMES).abs().cumsum(1)
    return draw(seed, batch, FRAMES, 12), times, draw(seed + 1, batch, FRAMES - 1, samples, 32)


def chosen(noise: Tensor, indices: Tensor) -> Tensor:
    """The noise (B, P, W, Dp) of some samples of each position."""
    return noise.gather(2, indices[..., None].expand(-1, -1, -1, noise.shape[3]))


def check_equal(found: Winners, losses: Tensor, *, atol: float = 1e-5) -> None:
    """What was found is what the plain losses (B, P, S) say; argmin may differ in ties only."""
    lowest = losses.amin(dim=2)
    torch.testing.assert_close(found.best_losses, lowest, atol=atol, rtol=1e-5)
    torch.testing.assert_close(found.mean_losses, losses.mean(dim=2), atol=atol, rtol=1e-5)
    picked = losses.gather(2, found.indices)[..., 0]
    assert torch.all(picked <= lowest + atol)
    second = losses.topk(min(2, losses.shape[2]), dim=2, largest=False).values[..., -1]
    clear = second > lowest + 2 * atol
    assert torch.equal(found.indices[:, :, 0][clear], losses.argmin(dim=2)[clear])


def test_the_two_plain_forms_are_one():
    given_problem = problem(0, 4)
    with torch.no_grad():
        at_once, losses = plain_select(WORLD, *given_problem)
    one_by_one, other = plain_select_one_by_one(WORLD, *given_problem)
    torch.testing.assert_close(losses, other, atol=1e-5, rtol=1e-5)
    assert torch.equal(at_once, one_by_one)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    samples=st.integers(1, 9),
    windows=st.integers(1, 4),
    chunk=st.integers(1, 10),
    batch=st.integers(1, 3),
)
def test_selection_equals_the_plain_form(seed, samples, windows, chunk, batch):
    z, times, noise = problem(seed, samples, batch=batch)
    found = select(
        WORLD, z, times, GivenNoise(noise), num_samples=samples, chunks=Chunks(windows, chunk)
    )
    check_equal(found, plain_select_one_by_one(WORLD, z, times, noise)[1])
    assert torch.equal(found.queries, chosen(noise, found.indices))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    winners=st.integers(1, 9),
    finalists=st.integers(1, 9),
    chunk=st.integers(1, 10),
)
def test_several_winners_are_the_lowest_of_the_plain_form(seed, winners, finalists, chunk):
    z, times, noise = problem(seed, 9)
    found = select(
        WORLD,
        z,
        times,
        GivenNoise(noise),
        num_samples=9,
        num_winners=winners,
        num_finalists=finalists,
        chunks=Chunks(1, chunk),
    )
    losses = plain_select_one_by_one(WORLD, z, times, noise)[1]
    lowest = losses.topk(winners, dim=2, largest=False, sorted=True).values
    torch.testing.assert_close(losses.gather(2, found.indices), lowest, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.best_losses, lowest.mean(2), atol=1e-5, rtol=1e-5)
    assert torch.equal(found.queries, chosen(noise, found.indices))
    assert found.finalists.shape[2] == max(winners, finalists)
    assert torch.equal(found.finalists[:, :, :winners], found.indices)


def test_candidates_really_differ_in_these_tests():
    """Else an equal argmin would say nothing."""
    _, losses = plain_select_one_by_one(WORLD, *problem(1, 9))
    assert losses.std(dim=2).min() > 1e-3


@pytest.mark.parametrize("times", ["spread", "equal", "late"])
@pytest.mark.parametrize("frames", [2, 3, 8])
def test_folded_predictions_are_the_models_own(times, frames):
    z, noise = draw(1, 2, frames, 12), draw(2, 2, frames - 1, 3, 32)
    at = {
        "spread": draw(3, 2, frames).abs().cumsum(1),
        "equal": torch.zeros(2, frames),
        "late": 1000 + draw(3, 2, frames).abs().cumsum(1),  # angles of 600,000 radians
    }[times]
    with torch.no_grad():
        weights = weights_of(WORLD, "float32")
        got = predictions(weights, fold(weights, project(weights, z), at), noise)
        wanted = WORLD.candidates(WORLD.memory(z, at), at, noise)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


def test_folded_predictions_are_exact_algebra():
    """In float64, where nothing hides behind rounding."""
    world = a_world().double()
    z, noise = draw(1, 2, 6, 12).double(), draw(2, 2, 5, 3, 32).double()
    at = draw(3, 2, 6).double().abs().cumsum(1)
    with torch.no_grad():
        weights = weights_of(world, "float64")
        got = predictions(weights, fold(weights, project(weights, z), at), noise)
        wanted = world.candidates(world.memory(z, at), at, noise)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-10)


def test_later_tokens_are_not_seen():
    z, times, noise = problem(9, 3)
    changed = z.clone()
    changed[:, 3] += 1
    runs = [
        select(WORLD, tokens, times, GivenNoise(noise), num_samples=3).best_losses
        for tokens in (z, changed)
    ]
    assert torch.equal(runs[0][:, :2], runs[1][:, :2])
    assert not torch.any(runs[0][:, 2:] == runs[1][:, 2:])


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_first_of_equal_losses_wins(chunk):
    z, times, noise = problem(3, 1)
    same = GivenNoise(noise.expand(-1, -1, 5, -1))
    found = select(WORLD, z, times, same, num_samples=5, chunks=Chunks(2, chunk))
    assert torch.all(found.indices == 0)


def test_winner_in_a_late_chunk_is_found():
    losses = torch.tensor([[[5.0, 4.0, 3.0, 3.0, 1.0, 2.0, 1.0]]])
    indices, best, mean = running_best(torch.split(losses, 2, dim=2))
    assert (indices.item(), best.item(), mean.item()) == (4, 1.0, pytest.approx(19 / 7))


@settings(max_examples=50, deadline=None)
@given(
    losses=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    chunk=st.integers(1, 20),
    keep=st.integers(1, 6),
)
def test_the_lowest_are_kept_in_order_and_the_first_of_equal_ones_comes_first(losses, chunk, keep):
    given_losses = torch.tensor(losses, dtype=torch.float32)[None, None]
    indices, best, mean = running_best(torch.split(given_losses, chunk, dim=2), keep=keep)
    wanted = sorted(range(len(losses)), key=lambda index: (losses[index], index))[:keep]
    assert indices[0, 0].tolist() == wanted
    assert best[0, 0].tolist() == [losses[index] for index in wanted]
    assert mean.item() == pytest.approx(sum(losses) / len(losses))


def test_what_fills_up_the_last_chunk_never_wins():
    """Samples beyond num_samples are computed for the sake of equal shapes, and cut off."""
    z, times, noise = problem(4, 8)
    _, losses = plain_select_one_by_one(WORLD, z, times, noise)
    order = losses[0, 0].argsort(descending=True)  # the best one comes last
    moved = GivenNoise(noise[:1, :, order])
    found = select(WORLD, z[:1], times[:1], moved, num_samples=7, chunks=Chunks(1, 4))
    assert found.indices[0, 0] == 6
    check_equal(found, losses[:1, :, order[:7]])


def test_selection_makes_no_gradient():
    z, times, noise = problem(5, 3)
    found = select(WORLD, z, times, GivenNoise(noise.requires_grad_()), num_samples=3)
    assert not any(tensor.requires_grad for tensor in found[:3])


def test_the_winners_pass_with_gradient_gives_the_lowest_loss_again():
    """From noise that is drawn anew, by the forward pass: the training step's own pass."""
    z, times, _ = problem(6, 1)
    noise = CounterNoise(torch.tensor([5, 6]), FRAMES - 1, 32, 1.0)
    found = select(WORLD, z, times, noise, num_samples=50)
    prediction = WORLD(z, times, noise.at(found.indices))
    again = smooth_l1(prediction, z[:, 1:, None]).mean(dim=(2, 3))
    assert again.requires_grad
    torch.testing.assert_close(again, found.best_losses, atol=1e-5, rtol=1e-5)
    assert torch.equal(noise.at(found.indices), found.queries)


def test_memory_of_the_losses_does_not_grow_with_the_samples():
    """Of a thousand chunks, only the one at hand is alive."""
    made_so_far: list[weakref.ref[Tensor]] = []

    def chunks() -> Iterator[Tensor]:
        for number in range(1000):
            losses = torch.full((2, 3, 4), float(1000 - number))
            made_so_far.append(weakref.ref(losses))
            assert sum(made() is not None for made in made_so_far) <= 2
            yield losses

    assert torch.all(running_best(chunks())[0] == 3996)


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 300),
    samples=st.integers(1, 2000),
    memory=st.integers(1, 4000),
    low=st.booleans(),
)
def test_chunks_keep_within_their_memory(batch, samples, memory, low):
    tokens = torch.empty(batch, FRAMES, 12, device="meta")
    products: ProductsName = "bfloat16" if low else "float32"
    chunks = default_chunks(WORLD, tokens, num_samples=samples, products=products, memory_mb=memory)
    assert 1 <= chunks.windows <= batch
    assert 1 <= chunks.samples <= samples
    hidden = 4 * 32 * 2 * (2 if low else 4)
    queries = chunks.windows * chunks.samples * (FRAMES - 1)
    assert queries * hidden <= memory * 10**6 or queries == FRAMES - 1
    assert chunks.windows == 1 or chunks.samples == samples
    if samples > chunks.samples:  # equal chunks: little is computed for nothing
        assert math.ceil(samples / chunks.samples) * chunks.samples - samples < chunks.samples


def test_the_released_size_is_chunked_for_the_cache():
    with torch.device("meta"):
        world = DeltaWorldNetwork(DeltaWorldConfig())
    tokens = torch.empty(1024, 8, 768, device="meta")
    chunks = default_chunks(
        world, tokens, num_samples=256, products="float32", memory_mb=CPU_MEMORY_MB
    )
    assert chunks == Chunks(windows=1, samples=256)


@pytest.mark.parametrize("chunks", [Chunks(1, 1), Chunks(2, 5), Chunks(2, 2), None])
def test_patch_selection_chooses_once_a_frame(chunks):
    world = a_patch_world()
    x, times, noise = draw(1, 2, 3, 6, 12), draw(2, 2, 3).abs().cumsum(1), draw(3, 2, 2, 5, 32)
    found = select(world, x, times, GivenNoise(noise), grid=GRID, num_samples=5, chunks=chunks)
    check_equal(found, plain_select_patches(world, x, times, noise, grid=GRID)[1])
    assert torch.equal(found.queries, chosen(noise, found.indices))


def a_patch_world() -> DINOWorld:
    config = DINOWorldConfig(**{**SIZES, "rope_axis_sizes": (4, 4, 4), "use_bom": True})
    world = made(DINOWorld(config, generator=torch.Generator().manual_seed(0)))
    assert isinstance(world, DINOWorld)
    return world


def test_patch_selection_in_bfloat16_is_nearly_that_in_float32():
    x, times, noise = draw(1, 2, 3, 6, 12), draw(2, 2, 3).abs().cumsum(1), draw(3, 2, 2, 5, 32)
    exact, low = (
        select(
            a_patch_world(),
            x,
            times,
            GivenNoise(noise),
            grid=GRID,
            num_samples=5,
            products=products,
        ).mean_losses
        for products in ("float32", "bfloat16")
    )
    assert not torch.equal(exact, low)
    torch.testing.assert_close(exact, low, atol=0, rtol=0.05)


def test_patch_selection_leaves_no_weights_without_gradient_to_the_training_pass():
    """Under autocast, casts are kept until its outermost block ends."""
    world = a_patch_world()
    x, times, noise = draw(1, 2, 3, 6, 12), draw(2, 2, 3).abs().cumsum(1), draw(3, 2, 2, 5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given, few = GivenNoise(noise), {"num_samples": 5, "products": "bfloat16"}
        found = select(world, x, times, given, grid=GRID, **few)
        world(x, times, found.queries, grid=GRID).float().mean().backward()
    missing = [n for n, p in world.named_parameters() if p.grad is None and p.requires_grad]
    assert missing == []
