"""What a machine has is found by trying it."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from deltatok.pipeline import doctor
from deltatok.pipeline.commands.pipeline import main
from deltatok.pipeline.doctor import Finding, examine


def found(folder: Path) -> dict[str, Finding]:
    return {finding.part: finding for finding in examine(folder, offline=True)}


def test_every_part_is_named_and_the_decoders_decode(tmp_path: Path) -> None:
    parts = found(tmp_path / "not" / "there")
    assert {"Python", "torch", "codecs", "PyAV", "decord", "disk", "DINOv3"} <= parts.keys()
    assert parts["PyAV"].state == "ok"
    assert "H.264" in parts["PyAV"].text


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise RuntimeError('no such symbol')", "no such symbol"),
        ("print(3)", "gave '3'"),
        ("import time; time.sleep(60)", "did not decode"),
    ],
)
def test_a_broken_decoder_is_found_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, words: str
) -> None:
    monkeypatch.setattr(doctor, "PROGRAMS", {"decord": program})
    monkeypatch.setattr(doctor, "DECODER_TIMEOUT_S", 20.0 if "sleep" not in program else 0.5)
    decord = {f.part: f for f in doctor._decoders()}["decord"]
    assert decord.state == "broken"
    assert words in decord.text
    assert "--decoder pyav" in decord.text


def test_without_what_everything_needs_the_exit_code_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "PROGRAMS", {"PyAV": "raise SystemExit('broken')"})
    assert main(["doctor", "--offline", "--out", str(tmp_path)]) == 1
    assert "PyAV" in capsys.readouterr().err


def test_missing_extras_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return None if name == "wandb" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    wandb = {f.part: f for f in doctor._extras()}["extra wandb"]
    assert wandb == Finding(
        part="extra wandb", state="missing", text="pip install 'deltatok[wandb]'"
    )
