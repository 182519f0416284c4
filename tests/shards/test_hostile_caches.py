"""Caches that someone made to do harm: refused with one of our errors, nothing run, nothing huge.

The forger's done-records, index and cache.json agree with the files, so that nothing but the check
of the contents stands in the way. Every case runs within a few seconds, and within a gigabyte more
of address space.
"""

import importlib
import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import DeltaShards, DeltatokError, PatchShards
from deltatok.shards.cache import checksum, fingerprint
from deltatok.shards.plan import Plan, keys_sha256, write_plan
from deltatok.shards.tools.info import describe_cache
from deltatok.shards.tools.verify import verify_cache

TOKENS = "shards/000000.zarr.zip/tokens/zarr.json"
EXTRA_BYTES = 2**30  # threads reserve most of it


@pytest.fixture(autouse=True)
def little_room_and_time() -> Iterator[None]:
    """A big allocation is a MemoryError, a hang an alarm: neither is an error of ours."""
    for writer in ("zarr", "numcodecs", "webdataset"):  # they take room, and are no readers
        importlib.import_module(writer)
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes cache.json, its fingerprint and checksum with it."""
    path = folder / "cache.json"
    info = json.loads(path.read_text())
    change(info)
    info["fingerprint"] = fingerprint(info["format"], info["format_version"], info["identity"])
    path.write_text(json.dumps({**info, "checksum": checksum(info)}))


def use(folder: Path, kind: str = "patches") -> None:
    reader: Any = (PatchShards if kind == "patches" else DeltaShards)(folder)
    windows = np.arange(min(2, reader.num_windows))
    reader.tokens(windows)
    reader.timestamps_s(windows)
    _ = reader.clip_index, reader.labels


def is_refused(folder: Path, kind: str = "patches") -> None:
    """By the reader, and named by verify, with errors of ours only. An index would tell first."""
    (folder / "index.jsonl").unlink(missing_ok=True)
    with pytest.raises(DeltatokError):
        use(folder, kind)
    with suppress(DeltatokError):
        assert verify_cache(folder, deep=True).problems
    with suppress(DeltatokError):
        json.dumps(describe_cache(folder))


@pytest.mark.parametrize(
    "codec",
    [
        {"name": "numcodecs.pickle"},
        {"name": "numcodecs.json2", "configuration": {"id": "pickle"}},
        {"name": "https://example.com/codec"},
        {"name": "gzip", "configuration": {"level": 9}},
        {"name": "blosc", "configuration": {"cname": "zstd"}},
        {"name": "transpose", "configuration": {"order": [3, 2, 1, 0]}},
        {"name": "vlen-bytes"},
    ],
)
def test_codecs_that_run_code_or_are_not_ours_are_refused(
    patches: Any, codec: dict[str, Any]
) -> None:
    before = patches.read(TOKENS)
    for place in ("outer", "inner", "index"):
        metadata = json.loads(before)
        sharding = metadata["codecs"][0]["configuration"]
        target = {"outer": metadata["codecs"], "inner": sharding["codecs"]}
        target.get(place, sharding["index_codecs"]).insert(0, codec)
        patches.write(TOKENS, json.dumps(metadata).encode())
        patches.reseal()
        is_refused(patches.folder)


@pytest.mark.parametrize(
    "shape",
    [[2**31 - 1, 3, 4, 6], [2**63, 3, 4, 6], [5, 3, 4, -6], [5, 3, 4, 6, 1], [1e9, 3, 4, 6]],
)
def test_shapes_that_overflow_are_refused_without_room_for_them(
    patches: Any, shape: list[Any]
) -> None:
    """The done-record and the chunk grid agree with the shape."""
    metadata = json.loads(patches.read(TOKENS))
    metadata["shape"] = shape
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = shape
    patches.write(TOKENS, json.dumps(metadata).encode())
    patches.reseal()
    record_path = patches.folder / "shards/000000.json"
    record = json.loads(record_path.read_text())
    record_path.write_text(json.dumps({**record, "rows": shape[0]}))
    forge(patches.folder, lambda info: info.update(counts={}, complete=False))
    is_refused(patches.folder)


@pytest.mark.parametrize("axes", [(2**20, 2**20, 2**20), (2**20, 4, 2**20), (3, 4, 2**20)])
def test_a_cache_of_enormous_windows_is_refused(patches: Any, axes: tuple[int, int, int]) -> None:
    frames, tokens, channels = axes
    shape = {"num_frames": frames, "num_tokens": tokens, "hidden_size": channels}
    forge(patches.folder, lambda info: info["shape"].update(shape, grid=[1, tokens]))
    is_refused(patches.folder)


def test_enormous_counts_are_refused_at_once(patches: Any) -> None:
    forge(patches.folder, lambda info: info["counts"].update(shards=2**53, windows=2**53))
    is_refused(patches.folder)


def test_a_plan_with_an_enormous_shard_number_is_refused(patches: Any, edit_plan: Any) -> None:
    edit_plan(patches.folder, lambda lines: lines[1].update(shard=2**53))
    with pytest.raises(DeltatokError, match="shard is 9007"):
        list(Plan.open(patches.folder))
    assert verify_cache(patches.folder).problems


@pytest.mark.parametrize(
    ("entry", "column", "value"),
    [
        (0, 0, 2**63),
        (0, 1, 2**64 - 1),
        (3, 0, 0),
        (14, 1, 2**40),
        (7, 0, 10**6),
        (7, 1, 0),
        (7, 1, 4),
    ],
)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_index_entries_beyond_the_file_or_upon_one_another_are_refused(
    little: Any, tmp_path: Path, entry: int, column: int, value: int, compression: str
) -> None:
    import google_crc32c

    cache = little.make_patches(tmp_path / "cache", compression=compression)
    name = "shards/000000.zarr.zip/tokens/c/0/0/0/0"
    data = cache.read(name)
    index = np.frombuffer(data[-15 * 16 - 4 : -4], "<u8").reshape(15, 2).copy()
    index[entry, column] = value
    crc = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    cache.write(name, data[: -15 * 16 - 4] + index.tobytes() + crc)
    cache.reseal()
    is_refused(cache.folder)


@pytest.mark.parametrize(
    "key", ["../../../etc/passwd", "/etc/passwd", "a/../../b", "a\0b", "", "x" * 100_000]
)
def test_keys_are_names_and_never_paths(
    patches: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forged key comes back as it is; no file is looked for by it."""
    folder = patches.folder
    member = "shards/000000.zarr.zip/zarr.json"
    value = json.loads(patches.read(member))
    keys = value["attributes"]["keys"]
    keys[0] = key
    patches.write(member, json.dumps(value).encode())
    plan = [replace(entry, key=key) if n == 0 else entry for n, entry in enumerate(patches.plan)]
    shutil.rmtree(folder / "plan")
    (folder / "plan.json").unlink()
    write_plan(folder, plan)
    path = folder / "shards/000000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "keys_sha256": keys_sha256(keys)}))
    patches.reseal()
    reader = PatchShards(folder)
    reader.timestamps_s([0])
    assert reader.keys[0] == reader.table().keys[0] == key


def test_a_loop_of_links_is_refused(patches: Any) -> None:
    path = patches.folder / "shards/000000.zarr.zip"
    path.unlink()
    path.symlink_to(path)
    is_refused(patches.folder)


def test_object_arrays_and_pickles_are_never_loaded(patches: Any, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "went off",)

    array = np.empty((4, 6), dtype=object)
    array[:] = Bomb()
    np.save(patches.folder / "black.npy", array, allow_pickle=True)
    forge(patches.folder, lambda info: info["files"].pop("black.npy"))
    with pytest.raises(DeltatokError, match=r"black\.npy: npy header"):
        _ = PatchShards(patches.folder).black
    assert any("black.npy" in problem.text for problem in verify_cache(patches.folder).problems)
    assert not (tmp_path / "went off").exists()


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (b"77777777777\0", "000000.tokens.npy"),
        (b"\x80" + b"\xff" * 11, "000000.tokens.npy"),
        (b"00000000000\0", "../../000000.tokens.npy"),
    ],
)
def test_a_tar_that_claims_too_much_is_refused(deltas: Any, size: bytes, name: str) -> None:
    path = deltas.folder / "shards/000000.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"000000.tokens.npy")
    header = data[at : at + 512]
    header[:100] = name.encode().ljust(100, b"\0")
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[at : at + 512] = header
    path.write_bytes(data)
    deltas.reseal()
    is_refused(deltas.folder, "deltas")


@pytest.mark.parametrize("format", ["pax", "gnu sparse"])
def test_sparse_and_pax_tricks_are_refused(deltas: Any, format: str) -> None:
    """Sizes that an extended header would override, holes that would be gigabytes of zeros."""
    import io
    import tarfile

    path = deltas.folder / "shards/000000.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("000000.tokens.npy")
        info.size = 4
        if format == "pax":
            info.pax_headers = {"size": "99999999999", "GNU.sparse.realsize": "99999999999"}
        else:
            info.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(info, io.BytesIO(b"abcd"))
    deltas.reseal()
    is_refused(deltas.folder, "deltas")
