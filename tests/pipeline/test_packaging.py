"""The wheel holds every folder, and nothing imports against the one-way order."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("shards", "extract", "train", "evaluate", "pipeline")
MAY_IMPORT = {
    "shards": {"shards"},
    "extract": {"extract", "shards"},
    "train": {"train", "shards"},
    "evaluate": {"evaluate", "train", "extract", "shards"},
    "pipeline": set(ROOMS),
}


def test_every_folder_with_code_is_listed_as_a_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    found = {".".join(("deltatok", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert found | {"deltatok"} == set(listed)


def test_every_template_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["deltatok"]
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    templates = {
        path for room in ROOMS for path in (ROOT / room).glob("**/templates/*") if path.is_file()
    }
    assert templates
    assert templates <= found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        depth = len(path.relative_to(ROOT).parts)
        pattern = rf"from \.{{{depth}}}(\w+)"
        other = set(re.findall(pattern, path.read_text(encoding="utf-8")))
        assert other <= MAY_IMPORT[room], f"{path}: imports {other - MAY_IMPORT[room]}"


def test_the_root_init_holds_a_docstring_and_nothing_else() -> None:
    text = (ROOT / "__init__.py").read_text(encoding="utf-8").strip()
    assert re.fullmatch(r'"""[^"]*"""', text)
