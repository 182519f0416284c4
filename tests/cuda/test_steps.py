"""Every shipped config fits the GPU that it names; steps.json is what steps.py counts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import pretend_cuda
from steps import CONFIGS, MORE, TRAINED, count, row_of, shipped
from torch import Tensor

from deltatok.train.models.configs import DeltaTokConfig
from deltatok.train.models.deltatok import DeltaTok

TABLE: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("steps.json").read_text())
OUTSIDE_BYTES = 1.5e9
"""What CUDA, cuBLAS and compiled kernels take beside tensors (a guess)."""
GAPS = 1.1
"""Allocated over used memory (a guess: an allocator that splits blocks)."""
QUICK = ("head/vspw", "world/discriminative", "extract/kinetics-256")


def test_every_config_is_in_the_table() -> None:
    assert set(TABLE) == {*shipped(), *MORE}


@pytest.mark.parametrize("name", TABLE)
def test_a_config_fits_its_gpu(name: str) -> None:
    row = TABLE[name]
    assert row["peak_bytes"] * GAPS + OUTSIDE_BYTES < row["gpu_gb"] * 1e9


@pytest.mark.parametrize("name", [name for name in TABLE if name.split("/")[0] in TRAINED])
def test_the_optimizer_is_twice_the_weights(name: str) -> None:
    row = TABLE[name]
    # A head's BatchNorm has statistics without a state: a tenth of the little one's weights.
    assert row["optimizer_bytes"] == pytest.approx(2 * row["weights_bytes"], rel=0.12)
    assert row["waits"] == 0


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in TABLE]
)
def test_the_table_is_what_is_counted(name: str) -> None:
    assert count(name) == pytest.approx(TABLE[name], rel=1e-3)


DOCS = (CONFIGS.parent / "docs/training.md").read_text()


@pytest.mark.parametrize("name", [name for name in TABLE if f"| {name} |" in DOCS])
def test_the_documents_say_what_the_table_says(name: str) -> None:
    assert row_of(name, TABLE[name]) in DOCS.splitlines()


def test_the_documents_have_rows() -> None:
    assert sum(f"| {name} |" in DOCS for name in TABLE) == 11


def test_more_winners_take_more_memory_and_work() -> None:
    for name in MORE:
        one, several = TABLE[name.partition(" ")[0]], TABLE[name]
        assert several["peak_bytes"] > one["peak_bytes"]
        assert several["flops"] > one["flops"]
        assert several["optimizer_bytes"] == one["optimizer_bytes"]


SMALL = DeltaTokConfig(
    hidden_size=96, num_hidden_layers=2, num_attention_heads=2, intermediate_size=192
)
PAIRS, GRID = 5, (6, 6)


def predict(model: DeltaTok, device: str) -> Tensor:
    shape = (PAIRS, GRID[0] * GRID[1], SMALL.hidden_size)
    one, other = (torch.zeros(shape, device=device) for _ in range(2))
    found: Tensor = model(one, other, grid=GRID, rescale=None)
    return found


def test_activations_are_those_that_autograd_keeps_on_the_cpu() -> None:
    """Of a small model with numbers, as torch's own hooks tell, against the device without any."""
    model = DeltaTok(SMALL)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = predict(model, "cpu")
    kept[found.untyped_storage().data_ptr()] = found
    measured = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
    with torch.device("meta"):
        model = DeltaTok(SMALL)
    with pretend_cuda(has_numbers=False) as cuda:
        model.to("cuda")
        before = cuda.clocks.live_bytes
        found = predict(model, "cuda")
        assert cuda.clocks.live_bytes - before == pytest.approx(measured, rel=0.02)
        assert found.shape == (PAIRS, GRID[0] * GRID[1], SMALL.hidden_size)
