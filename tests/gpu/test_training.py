"""Training on the device: every residency and `compile` give the same run, and so does a kill."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deltatok.train.tokenizer import train_tokenizer
from deltatok.train.world import train_world

TRAINERS: dict[str, Callable[[Any], Path]] = {"tokenizer": train_tokenizer, "world": train_world}
KILLED_AFTER_S = 300
LAST = 24

Record = Callable[[str, object], None]
Weights = dict[str, torch.Tensor]
Trains = Callable[..., Weights]


@pytest.fixture
def trains(request: pytest.FixtureRequest, tmp_path: Path, device: torch.device) -> Trains:
    """trains(trainer, out, field=value, ...): the weights of a run of a few tiny steps."""

    def weights(trainer: str, out: str, **changed: Any) -> Weights:
        make = request.getfixturevalue(f"{trainer}_config")
        config = make(device=device.type, out=str(tmp_path / out), **changed)
        return load_file(TRAINERS[trainer](config) / "model.safetensors")

    return weights


def largest_difference(one: Weights, other: Weights) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_residency_trains_the_same(trains: Trains, trainer: str, precision: str) -> None:
    whole = trains(trainer, "device", residency="device", precision=precision)
    again = trains(trainer, "again", residency="device", precision=precision)
    assert largest_difference(whole, again) == 0, "two equal runs differ"
    for residency in ("memory", "map"):
        other = trains(trainer, residency, residency=residency, precision=precision)
        assert largest_difference(whole, other) == 0, residency


@pytest.fixture
def compiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dry form graphs are captured and differentiated, and run by torch's own kernels."""
    if device.type == "cpu":
        whole = nn.Module.compile
        monkeypatch.setattr(
            nn.Module, "compile", lambda self, **_: whole(self, backend="aot_eager")
        )
        for module in ("engine.loop", "selection.selector"):
            monkeypatch.setattr(f"deltatok.train.{module}.check_compiler", lambda device: None)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_compiled_run_is_the_eager_one_but_for_rounding(
    compiles: None,
    trains: Trains,
    log_lines: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    record_property: Record,
    trainer: str,
) -> None:
    """By its losses: Adam makes much of the rounding of a gradient that is nearly zero."""
    eager, compiled = (
        trains(trainer, name, compile=name == "compiled", precision="float32", steps=4)
        for name in ("eager", "compiled")
    )
    record_property("largest_difference_of_a_weight", largest_difference(eager, compiled))
    one, other = (
        [line["loss"] for line in log_lines(tmp_path / name, kinds=("train",))]
        for name in ("eager", "compiled")
    )
    assert len(one) == 4
    assert other == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_that_is_killed_goes_on_to_the_same_weights(
    trains: Trains,
    world_config: Callable[..., Any],
    tmp_path: Path,
    device: torch.device,
    precision: str,
) -> None:
    """By SIGKILL, in a process of its own, some steps after a checkpoint."""
    fields = {"precision": precision, "steps": LAST, "save_every": 4, "validation_fraction": 0.0}
    whole = trains("world", "whole", **fields)
    out = tmp_path / "killed"
    config = world_config(device=device.type, out=str(out), **fields)
    lines = (
        "import time",
        "from deltatok.train.config import WorldTrainConfig",
        "from deltatok.train.engine.loop import Trainer",
        "from deltatok.train.models.configs import DeltaWorldConfig",
        "from deltatok.train.world import train_world",
        "fetch = Trainer._fetch",
        "Trainer._fetch = lambda self, batches: time.sleep(0.2) or fetch(self, batches)",
        f"train_world({config!r})",
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", "\n".join(lines)],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),  # on a CPU they decide the rounding
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until = time.monotonic() + KILLED_AFTER_S
        while not (out / "checkpoints" / "step-00000008").exists() and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.3)  # into the steps after it
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    assert not (out / "model.safetensors").exists()
    assert largest_difference(whole, trains("world", "killed", **fields)) == 0
