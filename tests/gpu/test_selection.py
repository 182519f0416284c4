"""The search for the best of many: the CPU's numbers, every dtype, float8, ties, masks, graphs."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltatok.train.models.configs import DeltaWorldConfig
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.world import causal
from deltatok.train.selection.folded import affine8, fold, product, project, scaled8, weights_of
from deltatok.train.selection.noise import CounterNoise, _mix
from deltatok.train.selection.search import ChunkLosses, Winners, running_best, select

CPU = torch.device("cpu")
CONFIG = DeltaWorldConfig(
    hidden_size=64,
    predictor_hidden_size=128,
    predictor_num_hidden_layers=3,
    predictor_num_heads=2,
    layer_scale_init=1.0,
    initializer_range=0.15,
)
FLOAT8_FROM = (8, 9)

Record = Callable[[str, object], None]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(device: torch.device) -> tuple[DeltaWorldNetwork, Tensor, Tensor, CounterNoise]:
    world = DeltaWorldNetwork(CONFIG, generator=torch.Generator().manual_seed(0)).to(device).eval()
    noise = CounterNoise(torch.arange(16, device=device), 7, 128, 0.15)
    times = draw(1, 16, 8).abs().cumsum(1)
    return world, draw(0, 16, 8, 64).to(device), times.to(device), noise


def selected(device: torch.device, **fields: Any) -> Winners:
    return select(*problem(device), num_samples=256, **fields)


@pytest.fixture
def float8(device: torch.device) -> torch.device:
    """The device, if it has float8 products."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FLOAT8_FROM:
        pytest.skip("needs a GPU of compute capability 8.9 or more")
    return device


def test_the_integers_of_the_noise_are_the_cpus_bit_for_bit(device: torch.device) -> None:
    """Products that wrap, shifts of negative numbers, and all but 24 bits masked out."""
    extremes = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, -(2**32)]
    drawn = torch.randint(-(2**63), 2**63 - 1, (1_000_000,), generator=torch.Generator())
    bits = torch.cat([torch.tensor(extremes), drawn])
    there = _mix(bits.to(device))
    assert torch.equal(_mix(bits), there.cpu())
    assert torch.equal(bits >> 40, (bits.to(device) >> 40).cpu())


def test_noise_is_the_cpus(device: torch.device) -> None:
    """So only the rounding of log, cos and sin differs."""
    first = torch.tensor(1000)
    one, other = (problem(place)[3].chunk(first.to(place), 64) for place in (CPU, device))
    torch.testing.assert_close(one, other.cpu(), atol=1e-7, rtol=1e-5)


def test_choice_is_the_cpus(device: torch.device, record_property: Record) -> None:
    one, other = selected(CPU), selected(device)
    agreement = (one.indices == other.indices.cpu()).float().mean().item()
    record_property("agreement", agreement)
    torch.testing.assert_close(one.best_losses, other.best_losses.cpu(), atol=1e-4, rtol=1e-4)
    assert agreement > 0.98


@pytest.mark.parametrize(
    ("products", "finalists", "share", "most"),
    [
        ("bfloat16", 1, 0.6, 2e-3),
        ("bfloat16", 8, 0.6, 2e-3),
        ("float8", 1, 0.2, 0.02),
        ("float8", 8, 0.2, 0.02),
    ],
)
def test_low_precision_picks_nearly_as_well(
    request: pytest.FixtureRequest,
    device: torch.device,
    record_property: Record,
    products: Any,
    finalists: int,
    share: float,
    most: float,
) -> None:
    """finalists: in how many of the best, the float32 pick is looked for."""
    if products == "float8":
        request.getfixturevalue("float8")
    exact = selected(device)
    low = selected(device, products=products, num_finalists=finalists)
    hit = (exact.indices == low.finalists).any(2).float().mean().item()
    world, z, times, _ = problem(device)
    with torch.no_grad():
        predicted = world(z, times, low.queries[:, :, 0])
    losses = F.smooth_l1_loss(predicted, z[:, 1:], beta=0.1, reduction="none").mean(2)
    regret = ((losses - exact.best_losses) / exact.best_losses).mean().item()
    record_property("agreement", hit)
    record_property("regret", regret)
    assert hit > share
    assert regret < most


@pytest.mark.parametrize("rows", [1, 16, 17, 1000])
def test_float8_products_are_the_float32_ones_but_for_rounding(
    float8: torch.device, record_property: Record, rows: int
) -> None:
    """Of the released MLP's sizes, rows of very different size: their scales are their own."""
    layer = torch.nn.Linear(768, 3072)
    x = draw(2, rows, 768) * torch.logspace(-3, 3, rows)[:, None]
    got = product(x.to(float8), affine8(layer.to(float8))).float().cpu()
    wanted = F.linear(x, layer.weight.cpu(), layer.bias.cpu()).detach()
    error = ((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max().item()
    record_property("largest_relative_error_of_a_row", error)
    assert error < 0.06  # e4m3 keeps three bits of a number


def test_float8_takes_what_this_code_gives_it_and_nothing_else(float8: torch.device) -> None:
    """The second operand in columns, sizes in multiples of 16, a scale a row and a column."""
    x, weight = (scaled8(draw(seed, 32, 64).to(float8)) for seed in (3, 4))
    multiply = partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True)
    right = multiply(x[0], weight[0].t(), scale_a=x[1], scale_b=weight[1].t().contiguous())
    wanted = (x[0].float() * x[1]) @ (weight[0].float() * weight[1]).t()
    torch.testing.assert_close(right.float(), wanted, rtol=2e-2, atol=2e-2)
    if float8.type != "cuda" or torch.cuda.get_device_capability(float8) >= (10, 0):
        return  # these take more
    with pytest.raises((RuntimeError, ValueError)):
        multiply(x[0], weight[0].t().contiguous(), scale_a=x[1], scale_b=weight[1].t())
    narrow = weight[0][:, :24].contiguous()
    with pytest.raises((RuntimeError, ValueError)):
        multiply(
            x[0][:, :24].contiguous(),
            narrow.t(),
            scale_a=x[1],
            scale_b=weight[1].t().contiguous(),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [1, 4])
def test_of_equal_losses_the_first_is_taken(
    device: torch.device, dtype: torch.dtype, keep: int
) -> None:
    losses = torch.randint(0, 4, (8, 7, 256), generator=torch.Generator().manual_seed(5))
    chunks = losses.to(device, dtype).split(64, dim=2)
    found, _, _ = running_best(chunks, keep=keep)
    wanted = losses.argsort(dim=2, stable=True)[:, :, :keep]
    assert torch.equal(found.cpu(), wanted)


MASKS = ("bool", "additive", "additive, a row that sees nothing")
BACKENDS = [
    SDPBackend.MATH,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]


@pytest.mark.filterwarnings("ignore")  # in which torch says why a backend cannot
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_masked_attention_of_every_backend(
    device: torch.device,
    record_property: Record,
    backend: SDPBackend,
    dtype: torch.dtype,
    mask: str,
) -> None:
    """As the predictor masks: position p sees the keys up to p. What a backend makes of a row of
    -inf is told, and not used here: every query sees a key."""
    q, k, v = (draw(seed, 4, 12, 7, 64).to(device, dtype) for seed in (6, 7, 8))
    visible = causal(7, device=device)
    given: Tensor = visible
    if mask != "bool":
        given = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, -math.inf)
    if "nothing" in mask:
        given[3] = -math.inf
    try:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=given)
    except RuntimeError as error:
        assert "kernel" in str(error)
        record_property("says", "no kernel for this")
        return
    if "nothing" in mask:
        largest = out[:, :, 3].abs().max().item()
        record_property("says", "NaN" if math.isnan(largest) else f"|x| <= {largest:.2g}")
        out = torch.cat([out[:, :, :3], out[:, :, 4:]], dim=2)
        q = torch.cat([q[:, :, :3], q[:, :, 4:]], dim=2)
        visible = torch.cat([visible[:3], visible[4:]])
    with sdpa_kernel(SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(
            q.cpu().double(), k.cpu().double(), v.cpu().double(), attn_mask=visible.cpu()
        )
    error = (out.cpu().double() - wanted).abs().max().item()
    record_property("largest_error", error)
    assert error < (1e-4 if dtype == torch.float32 else 3e-2)


def test_a_chunk_is_captured_in_a_graph(cuda: torch.device) -> None:
    world, z, times, noise = problem(cuda)
    score, first = ChunkLosses(), torch.zeros((), dtype=torch.int64, device=cuda)
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


def test_selection_never_waits_for_the_device(cuda: torch.device) -> None:
    world, z, times, noise = problem(cuda)
    select(world, z, times, noise, num_samples=64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        select(world, z, times, noise, num_samples=64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
