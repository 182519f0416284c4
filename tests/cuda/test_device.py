"""The pretended device refuses and counts what CUDA would: known by small programs."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pretended import MixedDevices, PretendedDevice, pretend_cuda
from torch import Tensor, nn


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device="cuda")


def test_tensors_say_where_they_are(cuda: PretendedDevice) -> None:
    x = torch.arange(6.0).view(2, 3).to("cuda")
    assert x.device == torch.device("cuda", 0)
    assert x.is_cuda
    assert not x.cpu().is_cuda
    assert (x * 2)[1].tolist() == [6.0, 8.0, 10.0]
    assert torch.tensor([1.0], device="cuda").device == x.new_zeros(1).device == x.device
    assert copy.deepcopy(x).device == x.device


@pytest.mark.parametrize(
    "meet",
    [
        lambda x, y: x + y,
        lambda x, y: x @ y,
        lambda x, y: torch.stack([x, y]),
        lambda x, y: F.layer_norm(x, (2,), y[0]),
        lambda x, y: x.index_select(0, torch.tensor([0])),
        lambda x, y: torch.cat([x.sum()[None], y.sum()[None]]),
        lambda x, y: F.embedding(torch.tensor([0]), x),
        lambda x, y: torch.baddbmm(x[:1, None], x[None], y[None]),
    ],
)
def test_tensors_of_two_devices_do_not_meet(
    cuda: PretendedDevice, meet: Callable[[Tensor, Tensor], Tensor]
) -> None:
    assert meet(torch.ones(2, 2), torch.ones(2, 2)) is not None
    with pytest.raises(MixedDevices, match=r"test_device\.py:\d+"):
        meet(ones(2, 2), torch.ones(2, 2))


def test_scalars_and_indices_on_the_cpu_are_allowed(cuda: PretendedDevice) -> None:
    x = ones(3, 2)
    assert (x * torch.tensor(2.0)).sum().item() == 12
    assert x.masked_fill(x > 0, torch.tensor(0.0)).sum().item() == 0
    assert x[torch.tensor([0, 2])].shape == (2, 2)
    x[1] = torch.zeros(2)  # a copy
    assert x.sum().item() == 4
    assert cuda.counts.pageable  # the index and the copy: CUDA makes the host wait for both


def test_two_devices_are_two() -> None:
    with pretend_cuda(num_devices=2):
        first, second = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
        assert second.device == torch.device("cuda:1")
        assert (first.to("cuda:1") + second).device == second.device
        with pytest.raises(MixedDevices):
            first + second
        with torch.cuda.device(1):
            assert torch.ones(2).to("cuda").device == second.device


def test_autocast_goes_by_the_rules_of_cuda(cuda: PretendedDevice) -> None:
    x, linear = ones(2, 4), nn.Linear(4, 4).to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        low = linear(x)
        assert low.dtype == torch.bfloat16
        assert (x @ x.T).dtype == torch.bfloat16
        # In float32 on CUDA; the CPU's autocast would leave them in bfloat16.
        assert low.pow(2).dtype == torch.float32
        assert F.layer_norm(low, (4,)).dtype == torch.float32
        assert low.sum(1).dtype == torch.float32
        assert F.gelu(low).dtype == torch.bfloat16
    assert linear(x).dtype == torch.float32


def test_gradients_and_updates_are_those_of_the_cpu(cuda: PretendedDevice) -> None:
    def trained(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        names = [id(parameter) for parameter in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model.to(device)
        assert [id(parameter) for parameter in model.parameters()] == names
        for _ in range(3):
            model(torch.ones(3, 4).to(device)).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach().cpu() for parameter in model.parameters()]

    for one, other in zip(trained("cpu"), trained("cuda"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mask", [None, torch.ones(5, 5, dtype=torch.bool).tril()])
def test_attention_is_the_cpus(cuda: PretendedDevice, mask: Tensor | None) -> None:
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    there = q.detach().to("cuda").requires_grad_()
    mask_there = None if mask is None else mask.to("cuda")
    one = F.scaled_dot_product_attention(q, q, q, mask)
    cuda.counts.clear()
    other = F.scaled_dot_product_attention(there, there, there, mask_there)
    assert cuda.counts.num_launches <= 4
    assert torch.equal(one, other.cpu())
    one.sum().backward()
    other.sum().backward()
    assert q.grad is not None
    assert there.grad is not None
    assert torch.equal(q.grad, there.grad.cpu())


def test_inference_mode_works(cuda: PretendedDevice) -> None:
    with torch.inference_mode():
        x = ones(2, 3)
        x[0] = 0
        assert not torch.is_grad_enabled()
    assert x.cpu().sum() == 3


def test_threads_see_the_device(cuda: PretendedDevice) -> None:
    found: list[torch.device] = []
    thread = threading.Thread(target=lambda: found.append(ones(2).device))
    thread.start()
    thread.join()
    assert found == [torch.device("cuda:0")]


@pytest.mark.parametrize(
    ("wait", "why"),
    [
        (lambda x: x[0].item(), "item"),
        (lambda x: bool(x[0] > 0), "item"),
        (lambda x: x.tolist(), "copy to host"),
        (lambda x: x.cpu(), "copy to host"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "mask as index"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.copy_(torch.zeros(2), non_blocking=True), "copy to device"),
        (lambda x: torch.tensor(1.0, device=x.device), "copy to device"),
        (lambda x: x[[0, 1]], "copy to device"),
        (lambda x: torch.cuda.synchronize(), "synchronize"),
    ],
)
def test_waits_of_the_host_are_counted_by_line(
    cuda: PretendedDevice, wait: Callable[[Tensor], object], why: str
) -> None:
    x = ones(2)
    cuda.counts.clear()
    wait(x)
    assert [key[0] for key in cuda.counts.waits] == [why]
    assert all("tests/cuda/test_device.py:" in key[1] for key in cuda.counts.waits)


def test_pinned_copies_do_not_wait(cuda: PretendedDevice) -> None:
    pinned = torch.ones(2).pin_memory()
    assert pinned.is_pinned()
    there = pinned.to("cuda", non_blocking=True)
    back = there.to("cpu", non_blocking=True)
    event = torch.cuda.current_stream().record_event()
    assert not cuda.counts.waits
    there += 1
    event.synchronize()
    assert back.numpy().tolist() == [1.0, 1.0]
    assert [why for why, _ in cuda.counts.waits] == ["event, with work behind it"]
    assert not cuda.counts.pageable


def test_pageable_copies_wait_whatever_is_asked(cuda: PretendedDevice) -> None:
    torch.ones(2).to("cuda", non_blocking=True)
    ones(2).cpu()
    assert list(cuda.counts.pageable.values()) == [1, 1]
    assert cuda.counts.num_waits == 2


def test_float8_products_keep_cudas_layouts(cuda: PretendedDevice) -> None:
    rows, columns = torch.randn(4, 32), torch.randn(16, 32)
    a, b = (x.to("cuda").to(torch.float8_e4m3fn) for x in (rows, columns))
    scales = torch.ones(4, 1, device="cuda"), torch.ones(1, 16, device="cuda")

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch._scaled_mm(
            a, b, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16
        )

    assert (product(a, b.t()).cpu().float() - rows @ columns.T).abs().max() < 1
    with pytest.raises(RuntimeError, match="columns"):
        product(a, b.t().contiguous())
    with pytest.raises(RuntimeError, match="16"):
        product(a[:, :8].contiguous(), b[:, :8].contiguous().t())
