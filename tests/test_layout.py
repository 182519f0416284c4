"""The tree tells the flow: folders of few files, and a file that is named somewhere is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("shards", "extract", "train", "evaluate", "pipeline")
SOURCES = sorted(
    path for room in ROOMS for path in (ROOT / room).rglob("*.py") if "recipes" not in path.parts
)
PUBLIC = {"shards", "evaluate"}
"""Packages whose __init__ is a public door; of any other it holds one docstring."""
MOST_IN_A_FOLDER = 14
OF_USERS = {"hubconf.py"}


def test_only_public_packages_have_code_in_their_init() -> None:
    inits = [path for path in SOURCES if path.name == "__init__.py"]
    with_code = {
        path.parent.relative_to(ROOT).as_posix()
        for path in inits
        if len(ast.parse(path.read_text(encoding="utf-8")).body) != 1
    }
    assert with_code == PUBLIC


def test_a_folder_can_be_read_at_a_glance() -> None:
    folders = {path.parent for path in SOURCES}
    full = {
        folder.relative_to(ROOT).as_posix(): count
        for folder in folders
        if (count := len(list(folder.glob("*.py"))) - 1) > MOST_IN_A_FOLDER
    }
    assert not full


def test_files_that_are_named_are_there() -> None:
    """COMMIT:path names a file of the past."""
    pages = [*SOURCES, *(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "shards/FORMAT.md"]
    names = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts} | OF_USERS
    gone = {
        (page.relative_to(ROOT).as_posix(), name)
        for page in pages
        for name in re.findall(r"(?<![\w*/:])[\w/]*?(\w+\.py)\b", page.read_text(encoding="utf-8"))
        if name not in names
    }
    assert not gone


def test_the_tree_of_the_architecture_page_is_complete() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    missing = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if path.name != "__init__.py" and f"](../{path.relative_to(ROOT).as_posix()})" not in page
    ]
    assert not missing
