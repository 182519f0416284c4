"""docs/scale.md says what growth.json says, and no step grows faster than the clips."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FIGURES = json.loads((BENCHMARKS / "growth.json").read_text(encoding="utf-8"))
LINEAR = 1.15
"""Above 1 by what the noise of a busy machine and the logarithm of a sort make of it."""


def load_scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", BENCHMARKS / "scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_committed_figures() -> None:
    scale = load_scale()
    page = scale.PAGE.read_text(encoding="utf-8")
    for name, section in scale.sections().items():
        begin, end = scale.marks(name)
        assert begin + section + end in page


@pytest.mark.parametrize("step", FIGURES["steps"])
def test_no_step_grows_faster_than_the_clips(step: str) -> None:
    found = FIGURES["steps"][step]
    assert (found["time_exponent"] or 0) < LINEAR
    assert (found["memory_exponent"] or 0) < LINEAR
