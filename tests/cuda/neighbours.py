"""Conftests and tests of other rooms as modules, whose fixtures make the little inputs here."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).resolve().parents[1]


def load(path: str) -> ModuleType:
    """The module of a file below tests/, under a name of its own."""
    name = f"cuda_neighbour_{path.removesuffix('.py').replace('/', '_')}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / path)
        if spec is None or spec.loader is None:
            raise AssertionError(f"no module in tests/{path}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
