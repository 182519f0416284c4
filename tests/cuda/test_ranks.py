"""LOCAL_RANK, else srun's SLURM_LOCALID, decides the device, whatever is run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from neighbours import load
from pretended import PretendedDevice, pretend_cuda

from deltatok.evaluate import DeltaWorld
from deltatok.evaluate.forecast.run import run_forecast
from deltatok.extract.run import run_extraction
from deltatok.train.config import TokenizeConfig
from deltatok.train.encode import write_deltas
from deltatok.train.tokenizer import train_tokenizer
from deltatok.train.world import train_world

_api = load("evaluate/inference/test_python_api.py")
run, frames = _api.run, _api.frames
Make = Callable[..., Any]


@pytest.fixture
def second_gpu() -> Iterator[PretendedDevice]:
    """Two devices, of which this process is to use the second; nothing is launched on the first."""
    with pretend_cuda(num_devices=2) as device:
        yield device
    assert device.problems == []
    assert set(device.counts.devices) == {1}


@pytest.fixture(params=["LOCAL_RANK", "SLURM_LOCALID"])
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the second of its machine."""
    monkeypatch.setenv(request.param, "1")


@pytest.fixture
def launched_by_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without a group of processes, which torchrun's LOCAL_RANK asks a trainer to join."""
    monkeypatch.setenv("SLURM_LOCALID", "1")


def test_extraction(launched: None, second_gpu: PretendedDevice, make_config: Make) -> None:
    run_extraction(make_config(device="cuda", limit=2))


def test_training_and_encoding(
    launched_by_srun: None, second_gpu: PretendedDevice, tokenizer_config: Make, tmp_path: Path
) -> None:
    config = tokenizer_config(device="cuda", steps=2)
    train_tokenizer(config)
    write_deltas(
        TokenizeConfig(
            patches=config.patches, tokenizer=config.out, out=str(tmp_path / "d"), device="auto"
        )
    )


def test_world(launched_by_srun: None, second_gpu: PretendedDevice, world_config: Make) -> None:
    train_world(world_config(device="auto", steps=2))


def test_evaluation(launched_by_srun: None, second_gpu: PretendedDevice, tiny: Any) -> None:
    run_forecast(tiny.config(device="cuda", num_samples=1))


def test_python_api(
    launched: None, second_gpu: PretendedDevice, run: Path, frames: np.ndarray
) -> None:
    world = DeltaWorld.from_pretrained(run / "world-model", device="cuda")
    assert world.device == torch.device("cuda:1")
    assert world.predict(frames, fps=5, num_samples=2).mean.device == world.device
