"""Both readers as sequences of windows: indexing, selection, metadata, other processes."""

import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import DamagedShard, DeltaShards, PatchShards, UsageError
from deltatok.shards.cache import finish_cache
from deltatok.shards.deltas.reader import read_blocks, read_shard_table
from deltatok.shards.plan import Plan, write_plan


def opened(little: Any, folder: Path, kind: str) -> Any:
    if kind == "patches":
        return PatchShards(little.make_patches(folder).folder)
    return DeltaShards(little.make_deltas(folder).folder)


@pytest.fixture(params=["patches", "deltas"])
def reader(request: pytest.FixtureRequest, little: Any, tmp_path: Path) -> Any:
    return opened(little, tmp_path / "cache", request.param)


@pytest.fixture
def labelled(reader: Any, little: Any) -> Any:
    """Clips 0..5 get the labels even and odd, and the splits train (0..3) and test (4; 5: none)."""

    def known(key: str) -> dict[str, str | None]:
        number = int(key.removeprefix("clip").removesuffix(".mp4"))
        split = "train" if number < 4 else "test" if number == 4 else None
        return {"label": ("even", "odd")[number % 2], "split": split}

    plan = [replace(entry, **known(entry.key)) for entry in Plan.open(reader.folder)]
    (reader.folder / "plan.json").unlink()
    write_plan(reader.folder, plan)
    finish_cache(reader.folder)
    return type(reader)(reader.folder)


INDICES: list[Any] = [
    slice(2, 9, 3),
    slice(None, None, -1),
    slice(20, 30),
    [4, -1, 4],
    np.array([0, 10], dtype=np.uint8),
    np.arange(11) % 2 == 0,
    [],
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing_gives_what_an_array_of_all_tokens_gives(reader: Any, index: Any) -> None:
    everything = reader.tokens(np.arange(11))
    where = index if isinstance(index, slice) or len(index) else slice(0, 0)
    np.testing.assert_array_equal(reader[index], everything[where])


@pytest.mark.parametrize("index", [0, -1, 10, np.int64(3)])
def test_one_number_gives_one_window(reader: Any, index: int) -> None:
    everything = reader.tokens(np.arange(11))
    np.testing.assert_array_equal(reader[index], everything[index])


def test_iteration_goes_over_all_windows_once(reader: Any) -> None:
    np.testing.assert_array_equal(list(reader), reader.tokens(np.arange(11)))


@pytest.mark.parametrize("index", [11, -12, [0, -12], [11]])
def test_indexing_refuses_windows_that_are_not_there(reader: Any, index: Any) -> None:
    with pytest.raises(IndexError, match="cache has"):
        reader[index]


@pytest.mark.parametrize("index", [0.5, True, "0", [True], np.ones(10, np.bool_), [[1]], None])
def test_indexing_refuses_what_is_no_index(reader: Any, index: Any) -> None:
    with pytest.raises(TypeError, match="wanted integers"):
        reader[index]


def test_window_tells_the_same_of_both_kinds(little: Any, tmp_path: Path) -> None:
    for kind in ("patches", "deltas"):
        made = getattr(little, f"make_{kind}")(tmp_path / kind)
        reader = (PatchShards if kind == "patches" else DeltaShards)(made.folder)
        for number in (0, 5, 10):
            assert reader.window(number) == {
                "clip": made.expected["key"][number],
                "frames": made.expected["frame_index"][number].tolist(),
                "crop": made.expected["crop"][number].tolist(),
                "flipped": bool(made.expected["flipped"][number]),
            }


def windows_of(reader: Any, numbers: set[int]) -> list[int]:
    """By hand: the windows of clips with these numbers."""
    keys = [reader.window(window)["clip"] for window in range(11)]
    return [window for window, key in enumerate(keys) if int(key[4]) in numbers]


def test_select_by_clip_label_and_split(labelled: Any) -> None:
    assert labelled.select(clips="clip3.mp4").tolist() == windows_of(labelled, {3})
    clips = ["clip3.mp4", "clip0.mp4"]
    assert labelled.select(clips=clips).tolist() == windows_of(labelled, {0, 3})
    assert labelled.select(labels="odd").tolist() == windows_of(labelled, {1, 3, 5})
    assert labelled.select(splits=["test"]).tolist() == windows_of(labelled, {4})
    both = labelled.select(labels="even", splits=("train", "test"), clips=[*clips, "clip4.mp4"])
    assert both.tolist() == windows_of(labelled, {0, 4})
    assert labelled.select().tolist() == list(range(11))
    assert labelled.select(clips=[]).tolist() == []


def test_selected_windows_go_into_every_column(labelled: Any) -> None:
    windows = labelled.select(labels="even")
    assert labelled.tokens(windows).shape == (len(windows), *labelled.shape)
    assert labelled.timestamps_s(windows).shape == (len(windows), 3)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"clips": ["clip3.mp4", "clip33.mp4"]}, "has no clip 'clip33.mp4' .1 of 2 .*'clip3.mp4'"),
        ({"labels": "cat"}, "has no label 'cat'.*known labels: 'even', 'odd'"),
        ({"splits": "trian"}, "has no split 'trian'.*known splits: 'train'"),
    ],
)
def test_select_refuses_what_no_clip_has(labelled: Any, wanted: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        labelled.select(**wanted)


def test_select_refuses_labels_where_none_are_known(reader: Any) -> None:
    with pytest.raises(UsageError, match="known labels: none"):
        reader.select(labels="cat")


def test_a_reader_is_pickled_without_its_data(reader: Any) -> None:
    before = len(pickle.dumps(reader))
    reader.tokens(np.arange(11)), reader.clip_index, reader.keys, reader.timestamps_s([0])
    assert len(pickle.dumps(reader)) == before < 5000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(reader))[[3, 7]], reader[[3, 7]])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_with_a_reader_opened_and_used_here(
    deltas: Any, run_script: Callable[..., str], method: str
) -> None:
    run_script(
        """
import multiprocessing, sys
from deltatok.shards import DeltaShards

def total(reader):
    assert reader.window(7)["clip"] and reader.timestamps_s([1]).shape == (1, 3)
    return float(reader[:].astype("float64").sum())

if __name__ == "__main__":
    reader = DeltaShards(sys.argv[1])
    wanted = total(reader)
    context = multiprocessing.get_context(sys.argv[2])
    with context.Pool(2) as pool:
        assert pool.map_async(total, [reader] * 4, chunksize=1).get(60) == [wanted] * 4
    assert total(reader) == wanted
    assert not {"zarr", "torch", "webdataset"} & set(sys.modules)
""",
        deltas.folder,
        method,
    )


def test_importing_and_reading_costs_little_beyond_numpy(
    patches: Any, run_script: Callable[..., str]
) -> None:
    """Counted in modules, which no busy machine changes: NumPy and its own imports set aside."""
    counts = run_script(
        """
import sys, json, hashlib, logging, concurrent.futures, numpy
before = set(sys.modules)
from deltatok.shards import PatchShards
PatchShards(sys.argv[1])[0]
new = set(sys.modules) - before
heavy = {"torch", "zarr", "webdataset", "asyncio", "PIL", "matplotlib", "yaml"} & set(sys.modules)
assert not heavy, heavy
print(len({name for name in new if not name.startswith("deltatok")}))
""",
        patches.folder,
    )
    assert int(counts) < 60


def test_the_table_of_both_kinds_holds_every_column(little: Any, tmp_path: Path) -> None:
    for kind in ("patches", "deltas"):
        made = getattr(little, f"make_{kind}")(tmp_path / kind)
        reader = (PatchShards if kind == "patches" else DeltaShards)(made.folder)
        table = reader.table()
        for name in ("timestamps_s", "frame_index", "crop", "flipped"):
            np.testing.assert_array_equal(getattr(table, name), made.expected[name], strict=True)
        assert [reader.keys[clip] for clip in table.clip] == made.expected["key"].tolist()
        np.testing.assert_array_equal(reader.frame_index([9, 0]), table.frame_index[[9, 0]])
        assert reader.crop is table.crop
        assert reader.flipped is table.flipped


def test_numbers_that_no_column_holds_are_refused(deltas: Any) -> None:
    path = deltas.folder / "shards/000000.tar"
    data = path.read_bytes()
    edge = re.search(rb'"crop":\[([0-9.]{6,})', data)
    assert edge is not None
    start, end = edge.span(1)
    path.write_bytes(data[:start] + b"1e300".ljust(end - start) + data[end:])
    with pytest.raises(DamagedShard, match="wanted 3 indices and 4 numbers"):
        read_shard_table(path, read_blocks(path, num_frames=3, hidden_size=6), [], num_frames=3)


@pytest.mark.parametrize("kind", ["PatchShards", "DeltaShards"])
def test_a_reader_that_lives_to_the_end_of_the_program_ends_quietly(
    patches: Any, deltas: Any, kind: str
) -> None:
    folder = (patches if kind == "PatchShards" else deltas).folder
    # Held by `os`, it goes when that is taken apart.
    code = f"import os; from deltatok.shards import {kind}; os.x = {kind}({str(folder)!r}); os.x[0]"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stderr == ""
