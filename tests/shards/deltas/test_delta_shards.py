"""Delta-token shards: what is written comes back, by our reader and by others'."""

import copy
import json
import pickle
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatok.shards import (
    CacheInfo,
    CacheMismatch,
    CacheShape,
    DeltaShards,
    DeltatokError,
)
from deltatok.shards.cache import finish_cache, open_cache
from deltatok.shards.deltas.writer import write_delta_shard
from deltatok.shards.files import sha256_file
from deltatok.shards.plan import PlanEntry, window_order, write_plan
from deltatok.shards.records import read_done
from deltatok.shards.windows import ShardRows


def plain_gather(folder: Path, windows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """tokens and timestamps of `windows`, by tarfile and NumPy, one window at a time."""
    tokens, timestamps = [], []
    for path in sorted((folder / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".npy"):
                    file = tar.extractfile(member)
                    assert file is not None
                    (tmp := path.parent / "member.npy").write_bytes(file.read())
                    columns = tokens if member.name.endswith(".tokens.npy") else timestamps
                    columns.extend(np.load(tmp, allow_pickle=False))
                    tmp.unlink()
    return np.array([tokens[w] for w in windows]), np.array([timestamps[w] for w in windows])


def test_tokens_come_in_the_order_asked_across_blocks_and_shards(deltas: Any) -> None:
    windows = np.array([10, 0, 7, 7, 3, 5, 4])
    got = DeltaShards(deltas.folder).tokens(windows)
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, deltas.expected["tokens"][windows])


def test_columns_come_back_with_their_windows(deltas: Any) -> None:
    reader = DeltaShards(deltas.folder)
    windows = np.arange(11)[::-1]
    np.testing.assert_array_equal(
        reader.timestamps_s(windows), deltas.expected["timestamps_s"][windows]
    )
    assert [reader.keys[clip] for clip in reader.clip_index] == deltas.expected["key"].tolist()
    for number in (0, 4, 5, 10):
        assert reader.window(number) == {
            "clip": deltas.expected["key"][number],
            "frames": deltas.expected["frame_index"][number].tolist(),
            "crop": deltas.expected["crop"][number].tolist(),
            "flipped": bool(deltas.expected["flipped"][number]),
        }


def test_reader_tells_what_the_cache_holds(deltas: Any) -> None:
    reader = DeltaShards(deltas.folder)
    assert (len(reader), reader.shape) == (11, (3, 6))
    assert reader.fingerprint == deltas.info.fingerprint
    tokens, timestamps = reader.load()
    np.testing.assert_array_equal(tokens, deltas.expected["tokens"])
    np.testing.assert_array_equal(timestamps, deltas.expected["timestamps_s"])
    assert reader.size_bytes == tokens.nbytes


def test_gather_equals_the_plain_one(little: Any, tmp_path: Path) -> None:
    cache = little.make_deltas(tmp_path / "cache", block_windows=4)
    reader = DeltaShards(cache.folder)
    for seed in range(20):
        windows = np.random.default_rng(seed).integers(0, 11, size=seed).tolist()
        tokens, timestamps = plain_gather(cache.folder, windows)
        np.testing.assert_array_equal(reader.tokens(windows), tokens.reshape(-1, 3, 6))
        np.testing.assert_array_equal(reader.timestamps_s(windows), timestamps.reshape(-1, 3))


@settings(deadline=None, max_examples=25)
@given(
    windows=st.integers(1, 9),
    frames=st.integers(1, 3),
    channels=st.integers(1, 40),
    block_windows=st.integers(1, 10),
    shards=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_any_shape_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    windows: int,
    frames: int,
    channels: int,
    block_windows: int,
    shards: int,
    seed: int,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    shape = CacheShape(num_frames=frames, num_tokens=None, grid=None, hidden_size=channels)
    open_cache(folder, CacheInfo(format="deltatok-deltas", identity={}, shape=shape))
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((shards, windows, frames, channels)).astype(np.float16)
    keys = [f"é☃ {shard}.mp4" for shard in range(shards)]
    entries = enumerate(keys)
    write_plan(folder, [PlanEntry(key=k, source=k, size_bytes=1, shard=s) for s, k in entries])
    for shard in range(shards):
        rows = ShardRows(
            tokens=tokens[shard],
            timestamps_s=rng.random((windows, frames)).astype(np.float32),
            frame_index=np.zeros((windows, frames), np.int32),
            crop=np.zeros((windows, 4), np.float32),
            flipped=np.zeros(windows, np.bool_),
            clip=np.zeros(windows, np.int32),
            keys=[keys[shard]],
        )
        write_delta_shard(folder, shard, rows, block_windows=block_windows)
    finish_cache(folder)
    reader = DeltaShards(folder)
    asked = data.draw(st.lists(st.integers(0, shards * windows - 1), max_size=12))
    wanted = tokens.reshape(-1, frames, channels)[np.array(asked, dtype=int)]
    np.testing.assert_array_equal(reader.tokens(asked), wanted)
    assert reader.window(shards * windows - 1)["clip"] == f"é☃ {shards - 1}.mp4"


def test_reader_maps_few_shards_at_once(deltas: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltatok.shards.deltas.reader.MAX_MAPPED_SHARDS", 1)
    reader = DeltaShards(deltas.folder)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        np.testing.assert_array_equal(reader.load()[0], deltas.expected["tokens"])
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1


def test_out_is_filled_and_returned(deltas: Any) -> None:
    reader = DeltaShards(deltas.folder)
    out = np.empty((2, 3, 6), dtype=np.float16)
    assert reader.tokens([1, 2], out=out) is out
    np.testing.assert_array_equal(out, deltas.expected["tokens"][1:3])


@pytest.mark.parametrize("windows", [[11], [-1]])
def test_reader_refuses_windows_that_are_not_there(deltas: Any, windows: list[int]) -> None:
    reader = DeltaShards(deltas.folder)
    for read in (reader.tokens, reader.timestamps_s, lambda numbers: reader.window(numbers[0])):
        with pytest.raises(IndexError, match=r"cache has 0\.\.10"):
            read(windows)


def test_writing_twice_gives_the_same_bytes(little: Any, tmp_path: Path) -> None:
    first = little.make_deltas(tmp_path / "first").folder
    second = little.make_deltas(tmp_path / "second").folder
    files = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    assert len(files) == 2 * 2 + 6
    for name in files:
        assert sha256_file(first / name) == sha256_file(second / name), name


def test_seed_permutes_as_it_does_in_patch_shards(deltas: Any) -> None:
    write_delta_shard(deltas.folder, 0, deltas.rows[0], seed=7)
    finish_cache(deltas.folder)
    got = DeltaShards(deltas.folder).tokens(np.arange(5))
    order = window_order(5, seed=7, shard=0)
    np.testing.assert_array_equal(got, deltas.rows[0].tokens[order])


def test_tar_is_plain_ustar_of_blocks(little: Any, tmp_path: Path) -> None:
    cache = little.make_deltas(tmp_path / "cache", block_windows=4)
    with tarfile.open(cache.folder / "shards/000000.tar") as tar:
        members = tar.getmembers()
        names = [member.name for member in members]
        assert names == [
            f"{block:06d}.{part}"
            for block in range(2)
            for part in ("timestamps.npy", "tokens.npy", "windows.json")
        ]
        assert {member.mtime for member in members} == {0}
        assert {(member.uid, member.gid, member.uname) for member in members} == {(0, 0, "")}
        assert all(member.isreg() and not member.pax_headers for member in members)
        file = tar.extractfile("000001.windows.json")
        assert file is not None
        windows = json.load(file)
    assert len(windows) == 1
    assert sorted(windows[0]) == ["clip", "crop", "flipped", "frames"]


def test_shard_reads_with_plain_webdataset_alone(
    deltas: Any, run_script: Callable[..., str], tmp_path: Path
) -> None:
    np.save(tmp_path / "wanted.npy", deltas.expected["tokens"])
    run_script(
        """
import sys, warnings, numpy
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own imports are not ours to mend
    import webdataset
dataset = webdataset.WebDataset(sys.argv[1], shardshuffle=False, empty_check=False).decode()
samples = list(dataset)
tokens = numpy.concatenate([sample["tokens.npy"] for sample in samples])
assert tokens.dtype == numpy.float16
assert (tokens == numpy.load(sys.argv[2])).all()
assert [len(sample["windows.json"]) for sample in samples] == [2, 2, 1, 2, 2, 2]
assert samples[0]["timestamps.npy"].shape == (2, 3)
assert samples[0]["windows.json"][0]["clip"].endswith(".mp4")
assert "deltatok" not in sys.modules
""",
        str(deltas.folder / "shards") + "/{000000..000001}.tar",
        tmp_path / "wanted.npy",
    )


def test_done_record_has_the_largest_value(deltas: Any) -> None:
    record = read_done(deltas.folder, 0)
    assert record is not None
    assert record.abs_max == np.abs(deltas.rows[0].tokens.astype(np.float64)).max()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_writer_refuses_tokens_that_are_not_finite_and_names_the_clip(
    deltas: Any, value: float
) -> None:
    rows = copy.deepcopy(deltas.rows[0])
    rows.tokens[3, 1, 2] = value
    key = rows.keys[rows.clip[3]]
    with pytest.raises(DeltatokError, match=f"1 of 90 delta token values .* clip '{key}'"):
        write_delta_shard(deltas.folder, 0, rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": np.zeros((5, 3, 7), np.float16)}, r"tokens is float16 \(5, 3, 7\), wanted"),
        ({"tokens": np.zeros((5, 3, 6), np.float32)}, "tokens is float32"),
        ({"timestamps_s": np.zeros((4, 3), np.float32)}, r"timestamps_s is float32 \(4, 3\)"),
        ({"clip": np.full(5, 3, np.int32)}, "outside of the 3 keys"),
    ],
)
def test_writer_refuses_rows_of_another_shape(
    deltas: Any, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(CacheMismatch, match=words):
        write_delta_shard(deltas.folder, 0, replace(deltas.rows[0], **change))


def test_shard_without_windows_is_only_a_done_record(little: Any, deltas: Any) -> None:
    rows = replace(little.delta_rows(0, [], seed=0), quarantined=little.lost(deltas.rows[0].keys))
    record = write_delta_shard(deltas.folder, 0, rows)
    assert (record.rows, record.file) == (0, None)
    finish_cache(deltas.folder)
    np.testing.assert_array_equal(
        DeltaShards(deltas.folder).load()[0], deltas.expected["tokens"][5:]
    )


def test_threads_may_read_together(deltas: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltatok.shards.deltas.reader.MAX_MAPPED_SHARDS", 1)
    reader = DeltaShards(deltas.folder)
    wrong: list[int] = []

    def read(seed: int) -> None:
        for _ in range(50):
            windows = np.random.default_rng(seed).integers(0, 11, 20)
            if not np.array_equal(reader.tokens(windows), deltas.expected["tokens"][windows]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_pickled_reader_opens_the_same_cache(deltas: Any) -> None:
    reader = pickle.loads(pickle.dumps(DeltaShards(deltas.folder)))
    np.testing.assert_array_equal(reader.load()[0], deltas.expected["tokens"])
