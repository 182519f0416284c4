"""The four trainers on the pretended device: the CPU's weights, no race, few waits of the host."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import PretendedDevice
from safetensors.torch import load_file

from deltatok.train.dinoworld import train_dinoworld
from deltatok.train.engine.loop import Trainer
from deltatok.train.heads.train import train_head
from deltatok.train.tokenizer import train_tokenizer
from deltatok.train.world import train_world

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
        *(("tokenizer", residency) for residency in ("memory", "map", "stream")),
        ("world", "stream"),
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
        ("world", "float8", 1),
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


def test_a_resumed_run_is_the_whole_one(
    cuda: PretendedDevice, trains: Trains, tmp_path: Path
) -> None:
    trains("world", "cuda", steps=2)
    resumed = trains("world", "cuda", steps=3)
    whole = trains("world", "cuda", steps=3, out=str(tmp_path / "whole"))
    assert all(torch.equal(values, whole[name]) for name, values in resumed.items())


FIRST, LOG_EVERY = 2, 3
COUNTED = 2 * LOG_EVERY


@pytest.fixture
def waits_a_step(
    cuda: PretendedDevice, trains: Trains, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[tuple[str, str], float]]:
    """waits_a_step(trainer): why and where the host waits in two log intervals of training, but for
    the first steps, evaluations and checkpoints."""
    found: dict[tuple[str, str], float] = {}
    fetch, calls = Trainer._fetch, itertools.count()

    def counted(self: Trainer, batches: Any) -> Any:
        call = next(calls)
        if call == FIRST:
            cuda.counts.clear()
        if call == FIRST + COUNTED:
            found.update({key: count / COUNTED for key, count in cuda.counts.waits.items()})
        return fetch(self, batches)

    def count(trainer: str) -> dict[tuple[str, str], float]:
        monkeypatch.setattr(Trainer, "_fetch", counted)
        never = {"eval_every": 1000, "save_every": 1000, "validation_fraction": 0.0}
        trains(trainer, "cuda", steps=FIRST + COUNTED + 1, log_every=LOG_EVERY, **never)
        return found

    return count


WAITS = {"tokenizer": 6, "world": 8, "dinoworld": 8, "head": 7}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_steps_do_not_wait(
    waits_a_step: Callable[[str], dict[tuple[str, str], float]], trainer: str
) -> None:
    found = waits_a_step(trainer)
    assert sum(found.values()) <= WAITS[trainer], found
