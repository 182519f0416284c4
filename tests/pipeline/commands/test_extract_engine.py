"""The flags of `--engine ray` are refused where they mean nothing, and where Ray is not there."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltatok.pipeline.commands.extract import main as extract

Fails = Callable[..., None]
VIDEOS = ["--videos", "clips", "--out", "out"]


def test_flags_without_the_engine(fails: Fails) -> None:
    for flag in ("--actors", "--gpus-per-actor", "--cpus-per-actor"):
        fails(extract, [*VIDEOS, flag, "2"], 2, f"{flag}: only --engine ray reads it")
    fails(extract, [*VIDEOS, "--ray-address", "auto"], 2, "only --engine ray reads it")


def test_a_plan_is_made_without_the_engine(fails: Fails) -> None:
    fails(extract, [*VIDEOS, "--engine", "ray", "--plan"], 2, "leave --engine out")


def test_an_unknown_engine(fails: Fails) -> None:
    fails(extract, [*VIDEOS, "--engine", "spark"], 2, "invalid choice: 'spark'")


@pytest.mark.parametrize("source", ["--videos", "--patches", "--dataset"])
def test_ray_is_an_extra(
    fails: Fails, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def find_all_but_ray(name: str, *more: Any) -> Any:
        return None if name == "ray" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_all_but_ray)
    words = [source, "vspw", "--out", str(tmp_path / "out"), "--engine", "ray"]
    words += {"--patches": ["--tokenizer", "t"], "--dataset": ["--root", "r"]}.get(source, [])
    fails(extract, words, 2, 'Ray is not installed: pip install "deltatok[ray]"')
    assert not (tmp_path / "out").exists()
