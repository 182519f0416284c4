"""Stores to test with: a folder, and those of servers.py."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deltatok.shards.stores.mirror import CACHE_DIR, CACHE_LIMIT
from deltatok.shards.stores.store import NewFile

sys.path.append(str(Path(__file__).parent))
from servers import CLOUD, hub, s3, s3_server

__all__ = ["hub", "s3", "s3_server"]
KINDS = ("file", "s3", "hf")


@pytest.fixture(autouse=True)
def _no_place_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_DIR, str(tmp_path / "cache-dir"))
    monkeypatch.delenv(CACHE_LIMIT, raising=False)


@pytest.fixture
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of the kind `request.param`."""
    kind = request.param
    if kind == "s3":
        return str(request.getfixturevalue("s3"))
    if kind == "hf":
        request.getfixturevalue("hub")
        return "hf://datasets/u/c/caches/one"
    pytest.importorskip("obstore", reason=CLOUD)
    return f"file://{tmp_path / 'store'}"


@pytest.fixture
def new_file() -> Callable[[str, bytes], NewFile]:
    """new_file(name, data): with its SHA-256."""
    return lambda name, data: NewFile(name, data, hashlib.sha256(data).hexdigest())
