"""A command that is silent says that it lives, and what it loads."""

import sys
import time
from pathlib import Path

import pytest

from deltatok.pipeline import alive
from deltatok.pipeline.alive import SignOfLife


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "EVERY_S", 0.2)


def test_silence_is_broken_and_words_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    write = sys.stdout.write
    with SignOfLife("at work"), SignOfLife("within"):
        time.sleep(0.5)
        assert "... at work (" in capsys.readouterr().err
        for _ in range(10):
            print("word")
            time.sleep(0.05)
    assert "at work" not in capsys.readouterr().err
    assert sys.stdout.write == write


def test_what_is_being_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slow_package").mkdir()
    (tmp_path / "slow_package" / "__init__.py").write_text("from . import below\n")
    (tmp_path / "slow_package" / "below.py").write_text("import time\ntime.sleep(0.5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with SignOfLife("at work"):
        __import__("slow_package")
    assert "... loading slow_package (" in capsys.readouterr().err
