"""Winners on a GPU: the CPU's numbers, float8, a captured graph. Skipped where there is none."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deltatok.train.models.configs import DeltaWorldConfig
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.selection.folded import fold, project, weights_of
from deltatok.train.selection.noise import CounterNoise
from deltatok.train.selection.search import ChunkLosses, Winners, select

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG = DeltaWorldConfig(
    hidden_size=64,
    predictor_hidden_size=128,
    predictor_num_hidden_layers=3,
    predictor_num_heads=2,
    layer_scale_init=1.0,
    initializer_range=0.15,
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(device: str) -> tuple[DeltaWorldNetwork, Tensor, Tensor, CounterNoise]:
    world = DeltaWorldNetwork(CONFIG, generator=torch.Generator().manual_seed(0)).to(device).eval()
    noise = CounterNoise(torch.arange(16, device=device), 7, 128, 0.15)
    times = draw(1, 16, 8).abs().cumsum(1)
    return world, draw(0, 16, 8, 64).to(device), times.to(device), noise


def selected(device: str, **fields: Any) -> Winners:
    return select(*problem(device), num_samples=256, **fields)


def test_noise_is_the_cpus() -> None:
    """The integers bit for bit, so only the rounding of log, cos and sin differs."""
    first = torch.tensor(1000)
    one, other = (problem(device)[3].chunk(first.to(device), 64) for device in ("cpu", "cuda"))
    torch.testing.assert_close(one, other.cpu(), atol=1e-7, rtol=1e-5)


def test_choice_is_the_cpus() -> None:
    one, other = selected("cpu"), selected("cuda")
    torch.testing.assert_close(one.best_losses, other.best_losses.cpu(), atol=1e-4, rtol=1e-4)
    assert (one.indices == other.indices.cpu()).float().mean() > 0.98


@pytest.mark.parametrize(
    ("products", "share", "most"), [("bfloat16", 0.6, 2e-3), ("float8", 0.2, 0.02)]
)
def test_low_precision_picks_nearly_as_well(products: Any, share: float, most: float) -> None:
    if products == "float8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 here")
    exact, low = selected("cuda"), selected("cuda", products=products)
    assert (exact.indices == low.indices).float().mean() > share
    world, z, times, _ = problem("cuda")
    with torch.no_grad():
        predicted = world(z, times, low.queries)
    losses = torch.nn.functional.smooth_l1_loss(predicted, z[:, 1:], beta=0.1, reduction="none")
    regret = (losses.mean(2) - exact.best_losses) / exact.best_losses
    assert regret.mean() < most


def test_a_chunk_is_captured_in_a_graph() -> None:
    world, z, times, noise = problem("cuda")
    score, first = ChunkLosses(), torch.zeros((), dtype=torch.int64, device="cuda")
    with torch.no_grad():
        weights = weights_of(world, "bfloat16")
        folded = fold(weights, project(weights, z), times)
        arguments = (weights, folded, z[:, 1:], noise, first, 32)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            score(*arguments)  # libraries set themselves up outside the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = score(*arguments)
        for start in (0, 64):
            first.fill_(start)
            graph.replay()
            torch.testing.assert_close(captured, score(*arguments))


def test_selection_never_waits_for_the_device() -> None:
    world, z, times, noise = problem("cuda")
    select(world, z, times, noise, num_samples=64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        select(world, z, times, noise, num_samples=64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
