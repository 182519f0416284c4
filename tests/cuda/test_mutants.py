"""What the pretended device is for, broken one thing at a time: it sees each."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import CudaTensor, MixedDevices, PretendedDevice, pretend_cuda
from torch import Tensor

from deltatok.extract import pixels
from deltatok.extract.backbone import Backbone
from deltatok.extract.run import run_extraction
from deltatok.train.data.batches import Batch
from deltatok.train.engine.loop import Trainer
from deltatok.train.models import deltaworld
from deltatok.train.selection.selector import Selector
from deltatok.train.world import train_world

Patch = pytest.MonkeyPatch
Make = Callable[..., Any]


@pytest.fixture
def device() -> Iterator[PretendedDevice]:
    """A pretended device whose problems are looked at by the test."""
    with pretend_cuda() as device:
        yield device
    for table in (pixels._column_table, pixels._row_table):
        table.cache_clear()


@pytest.fixture
def extracted(device: PretendedDevice, make_config: Make) -> Callable[[], list[str]]:
    """What is found in an extraction: "race", "freed"."""

    def run() -> list[str]:
        # Batches of many windows: pixels are let go of before anybody has waited for their use.
        run_extraction(make_config(device="cuda", autocast="float32", batch_frames=24))
        return [text.partition(":")[0] for text in device.problems]

    return run


@pytest.fixture
def trained(device: PretendedDevice, world_config: Make, tmp_path: Path) -> Callable[[], Path]:
    """Trains a world model for a few steps."""
    config = world_config(
        device="cuda",
        precision="float32",
        residency="memory",
        log_every=6,
        validation_fraction=0.0,  # held-out windows are copied when they are looked at
    )
    return lambda: train_world(config)


def test_nothing_is_found_in_what_is_not_broken(
    extracted: Callable[[], list[str]], device: PretendedDevice
) -> None:
    assert extracted() == []
    assert not [line for line in device.counts.pageable if line.startswith("extract/features.py")]


def test_without_wait_event(extracted: Callable[[], list[str]], monkeypatch: Patch) -> None:
    monkeypatch.setattr("pretended.clocks.Stream.wait_event", lambda self, event: None)
    assert "race" in extracted()


def test_without_record_stream(extracted: Callable[[], list[str]], monkeypatch: Patch) -> None:
    monkeypatch.setattr(CudaTensor, "record_stream", lambda self, stream: None)
    assert set(extracted()) == {"freed"}


def test_event_recorded_too_early(extracted: Callable[[], list[str]], monkeypatch: Patch) -> None:
    """Before the pixels are made: it says nothing of them."""
    monkeypatch.setattr("pretended.clocks.Stream.record_event", lambda self: torch.cuda.Event())
    assert "race" in extracted()


def test_rows_that_are_not_waited_for(
    extracted: Callable[[], list[str]], monkeypatch: Patch
) -> None:
    monkeypatch.setattr("pretended.clocks.Event.synchronize", lambda self: None)
    assert "race" in extracted()


def test_pixels_in_pageable_memory(
    extracted: Callable[[], list[str]], device: PretendedDevice, monkeypatch: Patch
) -> None:
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: real(*a, **k))
    assert extracted() == []
    assert [line for line in device.counts.pageable if line.startswith("extract/pixels.py")]


def test_resize_tables_on_the_cpu(extracted: Callable[[], list[str]], monkeypatch: Patch) -> None:
    real = pixels._to_device
    monkeypatch.setattr(pixels, "_to_device", lambda *a: tuple(t.cpu() for t in real(*a)))
    with pytest.raises(MixedDevices, match=r"extract/pixels\.py"):
        extracted()


def test_mean_of_the_pixels_on_the_cpu(
    extracted: Callable[[], list[str]], monkeypatch: Patch
) -> None:
    def constants(self: Backbone) -> tuple[Tensor, Tensor]:
        return torch.zeros(3, 1, 1), torch.ones(3, 1, 1)

    monkeypatch.setattr(Backbone, "_mean_and_std", property(constants))
    monkeypatch.setattr(
        Backbone,
        "normalise",
        lambda self, frames: frames.float().sub_(self._mean_and_std[0]).div_(self._mean_and_std[1]),
    )
    with pytest.raises(MixedDevices, match=r"test_mutants|extract/backbone\.py"):
        extracted()


def test_keys_of_the_noise_on_the_cpu(trained: Callable[[], Path], monkeypatch: Patch) -> None:
    real = Selector.noise

    def noise(self: Selector, windows: Any) -> Any:
        found = real(self, windows)
        return found._replace(keys=found.keys.cpu())

    monkeypatch.setattr(Selector, "noise", noise)
    with pytest.raises(MixedDevices, match="train/"):
        trained()


def test_mask_on_the_cpu(trained: Callable[[], Path], monkeypatch: Patch) -> None:
    real = deltaworld.causal
    monkeypatch.setattr(deltaworld, "causal", lambda *a, **k: real(*a, **k).cpu())
    with pytest.raises(MixedDevices, match="train/models"):
        trained()


def test_an_item_in_the_loop(
    trained: Callable[[], Path], device: PretendedDevice, monkeypatch: Patch
) -> None:
    real = Trainer._clip

    def clip(self: Trainer) -> Tensor:
        norm = real(self)
        norm.item()
        return norm

    monkeypatch.setattr(Trainer, "_clip", clip)
    trained()
    found = {count for (why, line), count in device.counts.waits.items() if why == "item"}
    assert 6 in found  # steps


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_batch_in_pageable_memory(
    trained: Callable[[], Path], device: PretendedDevice, monkeypatch: Patch, is_pinned: bool
) -> None:
    if not is_pinned:
        monkeypatch.setattr(Batch, "pinned", lambda self: self)
    trained()
    lines = [line for line in device.counts.pageable if line.startswith("train/data/batches.py")]
    assert bool(lines) is not is_pinned
