"""The four trainers on the pretended device: the CPU's weights, no race, few waits of the host."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import PretendedDevice
from safetensors.torch import load_file

from deltatok.train.dinoworld import train_dinoworld
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
    """trains(trainer, device, field=value, ...): the weights after a run of six tiny steps."""

    def weights(trainer: str, device: str, **changed: Any) -> dict[str, torch.Tensor]:
        config = request.getfixturevalue(f"{trainer}_config")
        changed = {"precision": "float32"} | changed
        out = TRAINERS[trainer](config(device=device, out=str(tmp_path / device), **changed))
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


@pytest.mark.parametrize("trainer", ["tokenizer", "world", "dinoworld"])
@pytest.mark.parametrize("residency", ["device", "memory", "map", "stream"])
def test_every_residency_trains_the_same(
    cuda: PretendedDevice, trains: Trains, trainer: str, residency: str
) -> None:
    changed: dict[str, Any] = {"residency": residency, "steps": 3}
    one, other = (trains(trainer, device, **changed) for device in ("cpu", "cuda"))
    for name, values in one.items():
        torch.testing.assert_close(values, other[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("trainer", ["world", "dinoworld"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("finalists", [1, 2])
def test_every_selection_dtype_trains(
    cuda: PretendedDevice, trains: Trains, trainer: str, dtype: str, finalists: int
) -> None:
    if (trainer, dtype) == ("dinoworld", "float8"):
        pytest.skip("DINO-world has no float8 selection")
    weights = trains(
        trainer,
        "cuda",
        precision="bfloat16",
        selection_dtype=dtype,
        selection_finalists=finalists,
        selection_max_regret=1.0,
        steps=3,
    )
    assert all(values.isfinite().all() for values in weights.values())


STEPS, LOG_EVERY = 12, 6


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_step_does_not_wait(cuda: PretendedDevice, trains: Trains, trainer: str) -> None:
    """What the host waits for in 12 steps more: one at most at each of their two log lines."""
    counts = []
    for steps in (STEPS, 2 * STEPS):
        cuda.counts.clear()
        trains(
            trainer,
            "cuda",
            steps=steps,
            log_every=LOG_EVERY,
            eval_every=1000,
            save_every=1000,
            out=f"{steps}",
        )
        counts.append(dict(cuda.counts.waits))
    more = {key: n - counts[0].get(key, 0) for key, n in counts[1].items()}
    print({k: v for k, v in more.items() if v})
    assert sum(more.values()) <= STEPS // LOG_EVERY
