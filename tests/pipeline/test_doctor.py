"""What a machine has is found by trying it."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from deltatok.pipeline import doctor
from deltatok.pipeline.commands.pipeline import main
from deltatok.pipeline.doctor import Finding


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise RuntimeError('no such symbol')", "no such symbol"),
        ("print(3)", "gave '3'"),
        ("import time; time.sleep(60)", "did not end"),
    ],
)
def test_a_broken_decoder_is_found_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, words: str
) -> None:
    monkeypatch.setitem(doctor.PROGRAMS, "decord", program)
    if "sleep" in program:
        monkeypatch.setattr(doctor, "TIMEOUT_S", 0.5)
    decord = doctor._decoder("decord", doctor.PROGRAMS["decord"], "clip.mp4")
    assert decord.state == "broken"
    assert words in decord.text
    assert "--decoder pyav" in decord.text


def test_without_what_everything_needs_the_exit_code_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "TORCH", "print('1.0\\nno CUDA')")
    monkeypatch.setattr(doctor, "CLIP", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert main(["doctor", "--offline", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "PyAV" in said.err
    assert "SIGSEGV" in said.out
    monkeypatch.setattr(doctor, "TORCH", "import not_there")
    assert main(["doctor", "--offline", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "torch" in said.err
    assert "not_there" in said.out


def test_every_part_is_named_also_without_network_or_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["doctor", "--out", str(tmp_path / "not" / "there")]) == 0
    said = capsys.readouterr().out
    for name in ("Python", "torch", "codecs", "PyAV", "decord", "disk", "DINOv3", "decodes H.264"):
        assert name in said
    assert "the hub gives no answer" in said
    assert "none that torch can use" in said


def test_an_account_without_access_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(doctor, "HUB", "print('gated')")
    found = doctor._weights(offline=False)
    assert found.state == "missing"
    assert "accept the licence" in found.text


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
