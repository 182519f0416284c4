"""Checkpoints on the pretended device: copied without a wait, written while training goes on."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pretended import PretendedDevice, pretend_cuda
from safetensors.torch import load_file
from torch import Tensor

from deltatok.shards import DeltatokError
from deltatok.train.engine import checkpoints, loop
from deltatok.train.engine.checkpoints import checkpoint_path, find_checkpoints
from deltatok.train.engine.loop import Trainer
from deltatok.train.world import train_world

Make = Callable[..., Any]
Trains = Callable[..., Path]
Patch = pytest.MonkeyPatch

SAVED = 3
"""Steps between two checkpoints."""


@pytest.fixture
def trains(world_config: Make, tmp_path: Path) -> Trains:
    """trains(out, field=value, ...): the folder of a run on cuda."""

    def run(out: str, **changed: Any) -> Path:
        never = {"log_every": 1000, "eval_every": 1000, "validation_fraction": 0.0}
        fixed = {"device": "cuda", "save_every": SAVED, "keep_checkpoints": 100}
        return train_world(world_config(**{**never, **fixed, **changed}, out=str(tmp_path / out)))

    return run


@pytest.fixture
def fetched(monkeypatch: Patch) -> Iterator[list[int]]:
    """The steps that were begun, so far."""
    begun: list[int] = []
    fetch = Trainer._fetch

    def counted(self: Trainer, batches: Any) -> Any:
        begun.append(len(begun))
        return fetch(self, batches)

    monkeypatch.setattr(Trainer, "_fetch", counted)
    return begun


def tensors_of(run: Path, step: int) -> dict[str, Tensor]:
    folder = checkpoint_path(run / "checkpoints", step)
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def test_the_loop_waits_for_no_copy(cuda: PretendedDevice, trains: Trains) -> None:
    files = ("train/engine/checkpoints.py", "train/engine/model_folder.py")
    found = []
    for steps in (SAVED, 4 * SAVED):
        cuda.counts.clear()
        trains(f"{steps}", steps=steps)
        found.append([sum(cuda.counts.waits_in(file).values()) for file in files])
    # A wait a checkpoint, of the thread that writes it; and one for the model at the end.
    assert found == [[1, 1], [4, 1]]
    assert not [line for line in cuda.counts.pageable if line.startswith(files)]


def test_what_is_written_late_is_what_was_then(
    cuda: PretendedDevice, trains: Trains, fetched: list[int], monkeypatch: Patch
) -> None:
    wanted = tensors_of(trains("short", steps=SAVED), SAVED)
    save, later = loop.save_checkpoint, threading.Event()
    fetch = Trainer._fetch
    fetched.clear()

    def fetches(self: Trainer, batches: Any) -> Any:
        if len(fetched) == SAVED + 2:
            later.set()
        return fetch(self, batches)

    def saves(*given: Any, **named: Any) -> Path:
        assert later.wait(60)  # a checkpoint that training waits for never comes
        return save(*given, **named)

    monkeypatch.setattr(Trainer, "_fetch", fetches)
    monkeypatch.setattr(loop, "save_checkpoint", saves)
    written = tensors_of(trains("long", steps=2 * SAVED), SAVED)
    assert written.keys() == wanted.keys()
    assert all(written[name].equal(wanted[name]) for name in wanted)


def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    cuda: PretendedDevice, trains: Trains, fetched: list[int], monkeypatch: Patch, tmp_path: Path
) -> None:
    """Soon, not at the next checkpoint; what was written before it stays."""
    save = loop.save_checkpoint

    def saves(folder: Path, step: int, *given: Any, **named: Any) -> Path:
        if step == 20:
            raise DeltatokError("step-00000020: cannot be written (disk full): make room")
        return save(folder, step, *given, **named)

    monkeypatch.setattr(loop, "save_checkpoint", saves)
    with pytest.raises(DeltatokError, match=r"step-00000020: cannot be written"):
        trains("run", steps=1000, save_every=10)
    assert 20 < len(fetched) <= 30
    assert [step for step, _ in find_checkpoints(tmp_path / "run/checkpoints")] == [10]


def test_a_run_that_fails_meanwhile_keeps_its_checkpoint(
    cuda: PretendedDevice, trains: Trains, fetched: list[int], monkeypatch: Patch, tmp_path: Path
) -> None:
    fetch = Trainer._fetch

    def fetches(self: Trainer, batches: Any) -> Any:
        if len(fetched) == SAVED + 1:
            raise DeltatokError("shard 3 is damaged")
        return fetch(self, batches)

    monkeypatch.setattr(Trainer, "_fetch", fetches)
    with pytest.raises(DeltatokError, match="shard 3"):
        trains("run", steps=100)
    assert [step for step, _ in find_checkpoints(tmp_path / "run/checkpoints")] == [SAVED]


def test_a_copy_that_is_not_waited_for(trains: Trains, monkeypatch: Patch) -> None:
    """A mutant: the device sees the thread touch what is still being copied."""
    write = checkpoints.save_tensors

    def writes(tensors: dict[str, Tensor], path: Path) -> None:
        write({name: value + 0 for name, value in tensors.items()}, path)

    monkeypatch.setattr(checkpoints, "save_tensors", writes)
    monkeypatch.setattr("pretended.clocks.Event.synchronize", lambda self: None)
    with pretend_cuda() as device:
        trains("run", steps=SAVED)
    assert any(text.startswith("race: host") for text in device.problems)
