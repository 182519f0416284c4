"""For the whole suite: the --golden option, and a check of which deltatok is being tested."""

import sysconfig
from pathlib import Path

import pytest

import deltatok

TREE = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        action="append",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder of golden cases for tests/parity; may be given several times "
        "(default: tests/golden, and ../shared/golden where it is present)",
    )


def pytest_report_header() -> str:
    """Say whether this tree or an installed wheel is tested; refuse any third thing."""
    imported = Path(deltatok.__file__).resolve().parent
    if imported == TREE:
        return f"deltatok: this tree, {imported}"
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    if imported.parent in installed:
        return f"deltatok: an installed wheel, {imported}"
    raise pytest.UsageError(
        f"the imported deltatok is {imported}, neither this tree ({TREE}) nor an installed wheel; "
        "install this tree with `pip install -e .`"
    )
