"""Where the tests of this folder compute: cuda, or what --device says; else they are skipped.

Parity with the golden cases is in tests/parity (`--device cuda --arithmetic tf32`).
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deltatok.shards.running.devices import choose_device

sys.path.append(str(Path(__file__).parents[1] / "cuda"))
from neighbours import load

_train = load("train/conftest.py")
log_lines = _train.log_lines
tokenizer_config, world_config = _train.tokenizer_config, _train.world_config


@pytest.fixture(autouse=True, scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU; the CPU in the dry form."""
    name = request.config.getoption("--device") or "cuda"
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return choose_device(name)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The GPU; there is no dry form."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture(scope="session")
def need() -> Callable[..., None]:
    """need(package, ...): a test that uses them is skipped where one is not installed."""
    return _need


def _need(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            pytest.skip(f"{package} is not installed where the GPU is")


@pytest.fixture(scope="session")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tests/train's."""
    _need("zarr", "google_crc32c")
    return _train.write_patches(tmp_path_factory.mktemp("caches") / "p", _train.LittleCache())


@pytest.fixture(scope="session")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tests/train's."""
    _need("webdataset")
    return _train.write_deltas_cache(tmp_path_factory.mktemp("caches") / "d")
