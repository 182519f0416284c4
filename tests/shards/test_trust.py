"""What a reader takes for the shard it was promised: missing, empty, swapped, linked, stale."""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import CacheMismatch, DamagedShard, DeltaShards, PatchShards
from deltatok.shards.cache import NOTICE, finish_cache
from deltatok.shards.patches.writer import write_patch_shard
from deltatok.shards.records import INDEX
from deltatok.shards.tools.info import describe_cache
from deltatok.shards.tools.verify import verify_cache


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cache counts as large: opened by its index."""
    monkeypatch.setattr("deltatok.shards.reader.EAGER_SHARDS", 0)


def equal_shards(little: Any, folder: Path, *, kind: str) -> Path:
    """A cache of two shards whose files have the same sizes."""
    cache = little.make_patches(folder) if kind == "patches" else little.make_deltas(folder)
    keys = [entry.key for entry in cache.plan if entry.shard == 1]
    if kind == "patches":
        rows = little.patch_rows(5, keys, seed=9)
        write_patch_shard(folder, 1, rows, dtype="float16", seed=7)
    else:
        from deltatok.shards.deltas.writer import write_delta_shard

        rows = little.delta_rows(5, keys, seed=9)
        write_delta_shard(folder, 1, rows, block_windows=2)
    finish_cache(folder, {"clips": 6})
    return folder


def swap(first: Path, second: Path) -> None:
    third = first.with_name("third")
    first.rename(third)
    second.rename(first)
    third.rename(second)


def test_a_shard_swapped_with_another_is_refused(little: Any, tmp_path: Path) -> None:
    folder = equal_shards(little, tmp_path / "cache", kind="patches")
    shards = folder / "shards"
    first, second = shards / "000000.zarr.zip", shards / "000001.zarr.zip"
    if first.stat().st_size != second.stat().st_size:
        pytest.fail("the two files must be equally long")
    swap(first, second)
    for read in ("tokens", "stored_tokens", "timestamps_s"):
        with pytest.raises(CacheMismatch, match=r"000000\.zarr\.zip: its attribute keys is not"):
            getattr(PatchShards(folder), read)([0])
    with pytest.raises(DamagedShard, match=r"shard 000000: .*000000\.zarr\.zip.*another shard's"):
        PatchShards(folder, verify="sha256")
    assert verify_cache(folder).damaged == [0, 1]


def test_a_tar_swapped_with_another_shards_is_refused(little: Any, tmp_path: Path) -> None:
    folder = equal_shards(little, tmp_path / "cache", kind="deltas")
    swap(folder / "shards/000000.tar", folder / "shards/000001.tar")
    with pytest.raises(DamagedShard, match=r"shard 000000: .*000000\.tar"):
        DeltaShards(folder)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("kind", ["patches", "deltas"])
def test_a_large_cache_opens_by_its_index_alone(
    request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = request.getfixturevalue(kind)
    opened = []
    for module in (os, io):  # pathlib opens by io.open
        real = module.open

        def counting(path: Any, *rest: Any, real: Any = real, **named: Any) -> Any:
            if not isinstance(path, int):  # a descriptor that was opened before
                opened.append(path)
            return real(path, *rest, **named)

        monkeypatch.setattr(module, "open", counting)
    planned = sorted(entry.key for entry in cache.plan)
    opened.clear()
    reader: Any = (PatchShards if kind == "patches" else DeltaShards)(cache.folder, verify="size")
    assert sorted(Path(path).name for path in opened) == ["cache.json", INDEX]
    assert reader.num_windows == 11
    assert sorted(reader.keys) == planned
    assert len(opened) == 2
    monkeypatch.undo()
    wanted = cache.expected["tokens"].astype(np.float16)
    np.testing.assert_array_equal(reader.tokens([7, 2, 10]).astype(np.float16), wanted[[7, 2, 10]])
    names = [reader.keys[clip] for clip in reader.clip_index]
    assert names == cache.expected["key"].tolist()


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "cannot be read"),
        (lambda path: path.write_bytes(b""), "0 bytes, the done-record says"),
    ],
)
def test_a_missing_or_empty_file_of_a_large_cache_is_refused_on_read(
    patches: Any, damage: Any, words: str
) -> None:
    reader = PatchShards(patches.folder)
    reader.tokens([0])
    damage(patches.folder / "shards/000001.zarr.zip")
    with pytest.raises(DamagedShard, match=f"shard 000001: .*{words}"):
        reader.tokens([10])


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", ["000001.zarr.zip", "000001.json"])
def test_a_missing_shard_of_a_large_cache_is_refused_on_opening(patches: Any, name: str) -> None:
    (patches.folder / "shards" / name).rename(patches.folder / "elsewhere")
    with pytest.raises(DamagedShard, match=rf"shard 000001: .*{name}: missing"):
        PatchShards(patches.folder)


@pytest.mark.usefixtures("large")
def test_a_stale_index_is_noticed_and_never_followed(little: Any, patches: Any) -> None:
    rows = little.patch_rows(5, patches.rows[0].keys, seed=11)
    write_patch_shard(patches.folder, 0, rows, dtype="float16", seed=7)
    reader = PatchShards(patches.folder)
    with pytest.raises(DamagedShard, match=r"000000.json: is not the done-record that index"):
        reader.tokens([0])
    assert verify_cache(patches.folder).damaged == [0]
    finish_cache(patches.folder, {})
    assert PatchShards(patches.folder).tokens([0]).shape == (1, 3, 4, 6)


@pytest.mark.usefixtures("large")
def test_a_changed_index_is_refused_and_a_missing_one_done_without(patches: Any) -> None:
    path = patches.folder / INDEX
    path.write_text(path.read_text().replace('"rows": 5', '"rows": 6'))
    with pytest.raises(DamagedShard, match="was changed since the cache was finished: delete it"):
        PatchShards(patches.folder)
    assert any(INDEX in problem.text for problem in verify_cache(patches.folder).problems)
    path.unlink()
    np.testing.assert_array_equal(
        PatchShards(patches.folder).load(), patches.expected["tokens"].astype(np.float16)
    )


@pytest.mark.usefixtures("large")
def test_an_unfinished_cache_is_read_by_its_records(patches: Any) -> None:
    from deltatok.shards.cache import reopen_cache

    reopen_cache(patches.folder)
    (patches.folder / "shards/000001.json").unlink()
    assert PatchShards(patches.folder, allow_incomplete=True).num_windows == 5


@pytest.mark.parametrize("name", ["000000.zarr.zip", "."])
def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(
    patches: Any, tmp_path: Path, name: str
) -> None:
    path = patches.folder / "shards" / name
    outside = tmp_path / "outside"
    shutil.move(path, outside)
    (patches.folder / "shards" / name if name != "." else patches.folder / "shards").symlink_to(
        outside
    )
    with pytest.raises(DamagedShard, match=r"shard 000000: .*is a link to .*outside of the cache"):
        PatchShards(patches.folder)
    assert any("is a link to" in problem.text for problem in verify_cache(patches.folder).problems)


def test_a_cache_that_is_a_link_itself_is_read(patches: Any, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(patches.folder)
    assert PatchShards(tmp_path / "link").tokens([0, 10]).shape == (2, 3, 4, 6)
    assert verify_cache(tmp_path / "link").problems == []


@pytest.mark.parametrize("name", ["cache.json", "plan.json", "black.npy", "shards/000000.json"])
def test_pipes_and_devices_in_place_of_files_are_refused_at_once(patches: Any, name: str) -> None:
    for make in (os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero")):
        path = patches.folder / name
        path.unlink()
        make(path)
        if name != "cache.json":
            assert verify_cache(patches.folder).problems
        with pytest.raises((DamagedShard, ValueError)):
            reader = PatchShards(patches.folder)
            _ = reader.black, reader.labels


def test_every_cache_carries_its_terms(patches: Any, deltas: Any) -> None:
    for cache in (patches, deltas):
        text = (cache.folder / NOTICE).read_text()
        assert cache.info.licence in text
        assert "DINOv3 License" in text
        assert describe_cache(cache.folder)["licence"] == cache.info.licence
    (patches.folder / NOTICE).unlink()
    assert any(NOTICE in problem.text for problem in verify_cache(patches.folder).problems)


def test_verify_finds_any_edit_of_cache_json(patches: Any) -> None:
    path = patches.folder / "cache.json"
    path.write_text(path.read_text().replace("DINOv3 License", "Public Domain"))
    assert any(
        "changed by hand" in problem.text for problem in verify_cache(patches.folder).problems
    )


def test_shards_under_the_cache_json_of_another_cache_are_refused(
    little: Any, patches: Any, tmp_path: Path
) -> None:
    other = little.make_patches(tmp_path / "other", dtype="bfloat16")
    shutil.copy(other.folder / "cache.json", patches.folder / "cache.json")
    with pytest.raises(CacheMismatch, match="the shard belongs to another cache"):
        PatchShards(patches.folder).stored_tokens([0])
