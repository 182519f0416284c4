"""What every kind of store promises: whole files, made once, and errors that say what to do."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deltatok.shards import CacheMismatch, DamagedShard, DeltatokError, UsageError
from deltatok.shards.stores import store as stores
from deltatok.shards.stores.store import NewFile, open_store

New = Callable[[str, bytes], NewFile]
every_store = pytest.mark.parametrize("address", ["file", "s3", "hf"], indirect=True)


@every_store
def test_what_is_created_is_listed_and_read(address: str, new_file: New) -> None:
    store = open_store(address)
    store.probe()
    assert list(store.list()) == []
    assert store.create([new_file("shards/a", b"one"), new_file("shards/a.json", b"{}")])
    found = {item.name: item.size for item in store.list("shards/")}
    assert found == {"shards/a": 3, "shards/a.json": 2}
    assert store.read("shards/a", max_bytes=3) == b"one"
    assert store.read("shards/b", max_bytes=3) is None


@every_store
def test_created_twice_is_the_same_or_refused(address: str, new_file: New) -> None:
    store = open_store(address)
    store.probe()
    assert store.create([new_file("a", b"one")])
    assert not store.create([new_file("a", b"one")])
    with pytest.raises(CacheMismatch, match="/a: is there with other bytes"):
        store.create([new_file("a", b"two")])
    assert store.read("a", max_bytes=9) == b"one"


@pytest.mark.parametrize("address", ["file", "s3"], indirect=True)
def test_of_many_writers_one_creates(address: str, new_file: New) -> None:
    store = open_store(address)
    store.probe()
    start = threading.Barrier(8)

    def create(_: int) -> bool:
        start.wait()
        return store.create([new_file("a", b"one")])

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(create, range(8))).count(True) >= 1
    assert store.read("a", max_bytes=9) == b"one"


@every_store
def test_replaced_file_has_another_stamp(address: str) -> None:
    store = open_store(address)
    store.probe()
    store.replace("cache.json", b"1")
    before = next(iter(store.list())).stamp
    store.replace("cache.json", b"2")
    assert store.read("cache.json", max_bytes=1) == b"2"
    assert next(iter(store.list())).stamp != before


@every_store
@pytest.mark.parametrize("change", ["size", "sha256", "gone"])
def test_fetched_file_is_as_promised_or_not_there(
    address: str, new_file: New, tmp_path: Path, change: str
) -> None:
    store, data = open_store(address), bytes(range(256)) * 40
    store.probe()
    store.create([new_file("shards/a", data)])
    sha256, path = hashlib.sha256(data).hexdigest(), tmp_path / "mirror" / "a"
    store.fetch("shards/a", path, size=len(data), sha256=sha256)
    assert path.read_bytes() == data
    path.unlink()
    name = "shards/b" if change == "gone" else "shards/a"
    with pytest.raises(DamagedShard, match=name):
        store.fetch(
            name,
            path,
            size=len(data) - (change == "size"),
            sha256="0" * 64 if change == "sha256" else sha256,
        )
    assert list(path.parent.iterdir()) == []


@every_store
def test_file_larger_than_it_may_be_is_refused(address: str, new_file: New) -> None:
    store = open_store(address)
    store.probe()
    store.create([new_file("cache.json", b"12345")])
    with pytest.raises(DamagedShard, match=r"cache\.json"):
        store.read("cache.json", max_bytes=4)


def test_transfer_that_breaks_off_goes_on(
    tmp_path: Path, new_file: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore", reason="pip install 'deltatok[cloud]'")
    store, data = open_store(f"file://{tmp_path / 'store'}"), bytes(range(256)) * 40
    store.probe()
    store.create([new_file("a", data)])
    whole, tries = store.chunks, []

    def breaks_off(name: str, *, stamp: str = ""):  # type: ignore[no-untyped-def]
        tries.append(name)
        for chunk in whole(name, stamp=stamp):
            yield chunk[:1000]
            if len(tries) < 3:
                raise DeltatokError("the network is gone")
            yield chunk[1000:]

    monkeypatch.setattr(store, "chunks", breaks_off)
    monkeypatch.setattr(stores.time, "sleep", lambda _: None)
    path, sha256 = tmp_path / "a", hashlib.sha256(data).hexdigest()
    store.fetch("a", path, size=len(data), sha256=sha256)
    assert (path.read_bytes(), len(tries)) == (data, 3)


@pytest.mark.parametrize("url", ["ftp://host/cache", "s3://", "hf://models/a", "hf://datasets/a"])
def test_unknown_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"wanted|not an address|not installed"):
        open_store(url)


def test_folder_that_is_not_there_is_named_and_not_made(tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="pip install 'deltatok[cloud]'")
    store = open_store(f"file://{tmp_path / 'misspelt'}")
    for ask in (lambda: store.read("a", max_bytes=1), lambda: list(store.list())):
        with pytest.raises(UsageError, match="no such folder"):
            ask()
    assert not (tmp_path / "misspelt").exists()


def test_wrong_bucket_is_named(s3: str) -> None:
    store = open_store(s3.replace("bucket", "no-such-bucket"))
    for ask in (store.probe, lambda: store.read("a", max_bytes=1), lambda: list(store.list())):
        with pytest.raises(UsageError, match="no such bucket"):
            ask()


def test_missing_credentials_are_named(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    stores.forget_stores()
    with pytest.raises(UsageError, match="AWS_ACCESS_KEY_ID"):
        open_store(s3).read("a", max_bytes=1)


def test_store_without_a_network_is_an_error_after_a_while(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    stores.forget_stores()
    with pytest.raises(DeltatokError, match="cannot be reached") as caught:
        open_store(s3).read("a", max_bytes=1)
    assert caught.value.exit_code == 1


def test_store_that_replaces_what_is_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstore = pytest.importorskip("obstore", reason="pip install 'deltatok[cloud]'")
    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda store, name, data, mode=None: put(store, name, data))
    with pytest.raises(UsageError, match="If-None-Match"):
        open_store(f"file://{tmp_path / 'store'}").probe()


def test_read_only_folder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="pip install 'deltatok[cloud]'")
    with pytest.raises(UsageError, match=r"cannot be made|may not be written|read-only"):
        open_store("file:///proc/store").probe()


def test_object_that_no_store_takes_is_refused(
    tmp_path: Path, new_file: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore", reason="pip install 'deltatok[cloud]'")
    monkeypatch.setattr(stores, "MAX_OBJECT_BYTES", 2)
    with pytest.raises(UsageError, match="frames_per_shard"):
        open_store(f"file://{tmp_path / 'store'}").create([new_file("a", b"123")])
