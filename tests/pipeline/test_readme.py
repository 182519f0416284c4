"""The README says what the committed figures say, and its commands exist."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_quickstart_table_is_the_one_of_the_committed_figures() -> None:
    path = ROOT / "tests" / "benchmarks" / "readme.py"
    spec = importlib.util.spec_from_file_location("readme", path)
    assert spec is not None
    assert spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    figures = json.loads(readme.FIGURES.read_text(encoding="utf-8"))
    assert readme.BEGIN + readme.section(figures) + readme.END in README


def test_the_two_commands_come_first_and_are_in_the_makefile() -> None:
    block = re.search(r"```\n(.*?)```", README, re.DOTALL)
    assert block is not None
    assert [line.split()[:2] for line in block[1].splitlines()] == [
        ["make", "quickstart"],
        ["make", "test"],
    ]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\nquickstart: setup\n" in makefile
    assert "\ntest: setup\n" in makefile


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_python_example_runs(
    tiny_inputs: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "quickstart"
    run.mkdir(parents=True)
    for folder in (*tiny_inputs.iterdir(), *tiny_run.iterdir()):
        (run / folder.name).symlink_to(folder)
    code = block[1].replace("0038", "0001")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["futures"].tokens.shape == (20, 3, 16)
    again = names["state"].predict(horizon_s=0.6)
    assert torch.equal(again.tokens, names["futures"].tokens)
    assert (tmp_path / "futures.png").exists()
    assert (tmp_path / "my-world" / "tokenizer").is_dir()
