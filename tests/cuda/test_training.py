"""The four trainers on the pretended device: the CPU's weights, no race, few waits of the host."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import PretendedDevice
from pretended.clocks import EARLIER_EVENT
from safetensors.torch import load_file

from deltatok.shards import DeltatokError, Stopped
from deltatok.shards.running.interrupts import StopRequest
from deltatok.train.dinoworld import train_dinoworld
from deltatok.train.engine.loop import Trainer
from deltatok.train.heads.train import train_head
from deltatok.train.tokenizer import train_tokenizer
from deltatok.train.world import DeltaWorldObjective, train_world

TRAINERS: dict[str, Callable[[Any], Path]] = {
    "tokenizer": train_tokenizer,
    "world": train_world,
    "dinoworld": train_dinoworld,
    "head": train_head,
}
Trains = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture
def trains(request: pytest.FixtureRequest, tmp_path: Path) -> Trains:
    """trains(trainer, device, field=value, ...): the weights after a run of three tiny steps."""

    def weights(trainer: str, device: str, **changed: Any) -> dict[str, torch.Tensor]:
        config = request.getfixturevalue(f"{trainer}_config")
        fixed = {"precision": "float32", "out": str(tmp_path / device), "steps": 3, "eval_every": 3}
        changed = fixed | changed
        out = TRAINERS[trainer](config(device=device, **changed))
        return load_file(out / "model.safetensors")

    return weights


@pytest.mark.parametrize("trainer", TRAINERS)
def test_weights_are_those_of_the_cpu(cuda: PretendedDevice, trains: Trains, trainer: str) -> None:
    one, other = trains(trainer, "cpu"), trains(trainer, "cuda")
    for name, values in one.items():
        torch.testing.assert_close(values, other[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_bfloat16_trains(cuda: PretendedDevice, trains: Trains, trainer: str) -> None:
    weights = trains(trainer, "cuda", precision="bfloat16", micro_batch_size=3)
    assert all(values.isfinite().all() for values in weights.values())


@pytest.mark.parametrize(
    ("trainer", "residency"),
    [
        ("tokenizer", "memory"),
        ("tokenizer", "stream"),
        ("world", "map"),
        ("dinoworld", "memory"),
    ],
)  # the others of this file have residency `device`
def test_every_residency_trains_the_same(
    cuda: PretendedDevice, trains: Trains, trainer: str, residency: str
) -> None:
    changed: dict[str, Any] = {"residency": residency, "steps": 2, "validation_fraction": 0.0}
    one, other = (trains(trainer, device, **changed) for device in ("cpu", "cuda"))
    for name, values in one.items():
        torch.testing.assert_close(values, other[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("trainer", "dtype", "finalists"),
    [
        ("world", "float32", 2),
        ("world", "bfloat16", 2),
        ("world", "float8", 2),
        ("dinoworld", "float32", 1),
        ("dinoworld", "bfloat16", 2),
    ],
)
def test_every_selection_dtype_trains(
    cuda: PretendedDevice, trains: Trains, trainer: str, dtype: str, finalists: int
) -> None:
    weights = trains(
        trainer,
        "cuda",
        precision="bfloat16",
        selection_dtype=dtype,
        selection_finalists=finalists,
        selection_max_regret=1.0,
        steps=2,
        validation_fraction=0.0,
    )
    assert all(values.isfinite().all() for values in weights.values())


FIRST, LOG_EVERY = 2, 3
COUNTED = 2 * LOG_EVERY


@pytest.fixture
def waits_in_intervals(
    cuda: PretendedDevice, trains: Trains, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[tuple[str, str], int]]:
    """waits_in_intervals(trainer): how often the host waits, why and where, in two log intervals;
    neither in the first steps, nor for evaluations and checkpoints."""
    found: dict[tuple[str, str], int] = {}
    fetch, calls = Trainer._fetch, itertools.count()

    def counted(self: Trainer, batches: Any) -> Any:
        call = next(calls)
        if call == FIRST:
            cuda.counts.clear()
        if call == FIRST + COUNTED:
            found.update(cuda.counts.waits)
        return fetch(self, batches)

    def count(trainer: str) -> dict[tuple[str, str], int]:
        monkeypatch.setattr(Trainer, "_fetch", counted)
        never = {"eval_every": 1000, "save_every": 1000, "validation_fraction": 0.0}
        trains(trainer, "cuda", steps=FIRST + COUNTED + 1, log_every=LOG_EVERY, **never)
        return found

    return count


@pytest.mark.parametrize("trainer", TRAINERS)
def test_steps_do_not_wait(
    waits_in_intervals: Callable[[str], dict[tuple[str, str], int]], trainer: str
) -> None:
    """One wait a log interval. Others are for the step before, while the device has work; and for
    the clock of the selection, read where a line is logged."""
    found = waits_in_intervals(trainer)
    behind = sum(count for (why, _), count in found.items() if why == EARLIER_EVENT)
    assert behind <= COUNTED + COUNTED // LOG_EVERY, found
    assert sum(found.values()) - behind <= COUNTED // LOG_EVERY, found


BAD_STEP = 3


@pytest.fixture
def one_bad_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of one step is not a number."""
    losses = DeltaWorldObjective.losses

    def changed(self: Any, forward: Any, batch: Any, samples: Any, **known: Any) -> Any:
        values, extras = losses(self, forward, batch, samples, **known)
        is_bad = known["step"] == BAD_STEP - 1 and not known["meter"].is_counting
        return values * (float("nan") if is_bad else 1.0), extras

    monkeypatch.setattr(DeltaWorldObjective, "losses", changed)


@pytest.mark.parametrize("log_every", [1, 100])  # read at once, and a step late
def test_a_step_that_is_not_finite_changes_no_weights(
    cuda: PretendedDevice,
    one_bad_step: None,
    trains: Trains,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_every: int,
) -> None:
    trainers: list[Trainer] = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: trainers.append(self) or train(self))
    known = {"log_every": log_every, "eval_every": 100, "save_every": 100}
    before = trains("world", "cuda", **known, steps=BAD_STEP - 1, out=str(tmp_path / "before"))
    with pytest.raises(DeltatokError, match=f"step {BAD_STEP}: loss nan.*were not changed"):
        trains("world", "cuda", **known, steps=10)
    for name, values in trainers[-1].objective.model.state_dict().items():
        assert torch.equal(values.cpu(), before[name]), name


def test_a_run_that_is_stopped_goes_on_to_the_same_weights(
    cuda: PretendedDevice, trains: Trains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"log_every": 100, "eval_every": 100, "save_every": 100, "steps": 6}
    whole = trains("world", "cuda", **known, out=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "asked", property(lambda self: True))
        with pytest.raises(Stopped, match="after step 2 of 6"):  # asked in the first
            trains("world", "cuda", **known)
    resumed = trains("world", "cuda", **known)
    assert all(torch.equal(values, whole[name]) for name, values in resumed.items())
