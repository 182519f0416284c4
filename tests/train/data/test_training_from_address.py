"""Training from a cache at an address: the weights of training from its folder, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import DeltaShards
from deltatok.shards.stores.mirror import CACHE_DIR, CACHE_LIMIT, cache_dir
from deltatok.shards.stores.push import push
from deltatok.shards.stores.store import ObjectStore
from deltatok.train.config import TokenizeConfig
from deltatok.train.encode import write_deltas
from deltatok.train.tokenizer import train_tokenizer
from deltatok.train.world import train_world

Make = Callable[..., Any]


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """address(folder): where a copy of the cache lies."""
    pytest.importorskip("obstore", reason="pip install 'deltatok[cloud]'")
    monkeypatch.setenv(CACHE_DIR, str(tmp_path / "cache-dir"))

    def put(folder: Path) -> str:
        url = f"file://{tmp_path / 'store' / folder.name}"
        (tmp_path / "store").mkdir(exist_ok=True)
        push(folder, url, progress=lambda _: None)
        return url

    return put


@pytest.mark.parametrize("residency", ["memory", "map", "stream"])
def test_world_trained_from_an_address_is_the_same(
    world_config: Make, deltas: Path, address: Make, tmp_path: Path, residency: str
) -> None:
    url, weights = address(deltas), []
    for name, cache in (("local", str(deltas)), ("remote", url)):
        config = world_config(deltas=cache, out=str(tmp_path / name), residency=residency)
        weights.append((train_world(config) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_tokenizer_trained_with_little_room_is_the_same(
    tokenizer_config: Make,
    make_patches: Make,
    address: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patches = make_patches(tmp_path / "five", num_shards=5)
    url, weights = address(patches), []
    sizes = [path.stat().st_size for path in (patches / "shards").glob("*.zip")]
    monkeypatch.setenv(CACHE_LIMIT, str(2.5 * max(sizes) / 1e9))
    for name, cache in (("local", str(patches)), ("remote", url)):
        config = tokenizer_config(patches=cache, out=str(tmp_path / name), residency="map")
        weights.append((train_tokenizer(config) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    kept = sum(path.stat().st_size for path in cache_dir().glob("mirrors/*/shards/*.zip"))
    assert kept <= 2.5 * max(sizes)


def test_an_epoch_asks_for_each_shard_once(
    tokenizer_config: Make, patches: Path, address: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked, chunks = address(patches), [], ObjectStore.chunks

    def counted(self: ObjectStore, name: str, **options: Any) -> Any:
        asked.append(name)
        return chunks(self, name, **options)

    monkeypatch.setattr(ObjectStore, "chunks", counted)
    train_tokenizer(tokenizer_config(patches=url, residency="map", steps=12))
    shards = [name for name in asked if name.startswith("shards/")]
    assert sorted(shards) == sorted(set(shards))
    assert len(asked) - len(shards) <= 7


def test_delta_tokens_encoded_between_addresses_are_the_same(
    tokenizer_config: Make, patches: Path, address: Make, tmp_path: Path
) -> None:
    tokenizer = train_tokenizer(tokenizer_config(steps=2))
    config = TokenizeConfig(
        patches=str(patches), tokenizer=str(tokenizer), out=str(tmp_path / "deltas"), device="cpu"
    )
    write_deltas(config)
    (tmp_path / "store").mkdir(exist_ok=True)
    out = f"file://{tmp_path / 'store' / 'deltas'}"
    fields = {**vars(config), "patches": address(patches), "out": out}
    write_deltas(TokenizeConfig(**fields))
    local, remote = DeltaShards(config.out), DeltaShards(out)
    windows = np.arange(len(local))
    np.testing.assert_array_equal(remote.tokens(windows), local.tokens(windows))
    assert (remote.fingerprint, remote.keys) == (local.fingerprint, local.keys)
