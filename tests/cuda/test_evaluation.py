"""Evaluation and the Python API on the pretended device give the CPU's numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from neighbours import load
from pretended import PretendedDevice

from deltatok.evaluate import DeltaWorld
from deltatok.evaluate.cache_fidelity import CacheFidelityConfig, run_cache_fidelity
from deltatok.evaluate.forecast.run import run_forecast

_api = load("evaluate/inference/test_python_api.py")
run, frames = _api.run, _api.frames


def numbers(value: Any) -> list[float]:
    """Every number of a report's rows, in order."""
    if isinstance(value, dict):
        return [number for name in sorted(value) for number in numbers(value[name])]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def test_a_report_has_the_cpus_numbers(cuda: PretendedDevice, tiny: Any, tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        config = tiny.config(
            device=device,
            autocast="float32",
            num_samples=2,
            drift_steps=3,
            out=str(tmp_path / device),
        )
        run_forecast(config)
        report = json.loads((tmp_path / device / "report.json").read_text())
        found[device] = [report[part] for part in ("rows", "rank_histogram", "drift")]
    assert numbers(found["cuda"]) == pytest.approx(numbers(found["cpu"]), rel=1e-4, abs=1e-5)
    assert len(numbers(found["cpu"])) > 20


def test_bfloat16_and_pictures_are_made(cuda: PretendedDevice, tiny: Any) -> None:
    run_forecast(tiny.config(device="cuda", autocast="bfloat16", num_samples=2, num_pictures=1))


def test_the_python_api_gives_the_cpus_futures(
    cuda: PretendedDevice, run: Path, frames: np.ndarray, tmp_path: Path
) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        world = DeltaWorld.from_pretrained(run / "world-model", device=device, precision="float32")
        futures = world.predict(frames, fps=5, num_samples=4, seed=1)
        assert world.device.type == futures.tokens.device.type == device
        futures.save_grid(tmp_path / f"{device}.png")
        found[device] = [t.cpu() for t in (futures.tokens, futures.mean, futures.outputs)]
    for one, other in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_cache_fidelity_has_the_cpus_numbers(cuda: PretendedDevice, tiny: Any) -> None:
    def found(device: str) -> dict[str, Any]:
        config = CacheFidelityConfig(
            patches=tiny.path("patches"),
            reference=tiny.path("patches"),
            tokenizer=tiny.path("tokenizer"),
            head=tiny.path("head"),
            labels=tiny.path("labels"),
            device=device,
            autocast="float32",
        )
        return run_cache_fidelity(config)

    assert numbers(found("cuda")) == pytest.approx(numbers(found("cpu")), rel=1e-5)
