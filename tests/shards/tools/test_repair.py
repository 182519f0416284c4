"""repair_cache clears what is broken and what is half made, and nothing else."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import DamagedShard, DeltaShards, PatchShards
from deltatok.shards.cache import finish_cache, read_cache_info
from deltatok.shards.deltas.writer import write_delta_shard
from deltatok.shards.patches.writer import write_patch_shard
from deltatok.shards.tools.repair import Repaired, repair_cache
from deltatok.shards.tools.verify import verify_cache


def repair(folder: Path, *, deep: bool = False) -> Repaired:
    return repair_cache(folder, verify_cache(folder, deep=deep))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("kind", ["patches", "deltas"])
def test_a_whole_cache_is_left_as_it_is(request: pytest.FixtureRequest, kind: str) -> None:
    folder = request.getfixturevalue(kind).folder
    before = snapshot(folder)
    assert repair(folder, deep=True) == Repaired(removed=[], shards=[], rewritten=[])
    assert snapshot(folder) == before


def test_a_damaged_patch_shard_goes_and_can_be_made_again(little: Any, patches: Any) -> None:
    before = snapshot(patches.folder)
    little.flip_byte(patches.folder / "shards/000001.zarr.zip", 100)
    done = repair(patches.folder)
    assert done.shards == [1]
    assert done.removed == ["shards/000001.json", "shards/000001.zarr.zip"]
    assert not (patches.folder / "shards/000001.zarr.zip").exists()
    assert not read_cache_info(patches.folder).complete
    kept = snapshot(patches.folder)
    assert all(kept[name] == before[name] for name in kept if name.startswith("shards/000000"))
    write_patch_shard(patches.folder, 1, patches.rows[1], dtype="float16", seed=7)
    finish_cache(patches.folder)
    assert snapshot(patches.folder) == before


def test_a_damaged_tar_goes_and_can_be_made_again(little: Any, deltas: Any) -> None:
    before = snapshot(deltas.folder)
    (deltas.folder / "shards/000000.tar").write_bytes(b"")
    assert repair(deltas.folder).removed == ["shards/000000.json", "shards/000000.tar"]
    write_delta_shard(deltas.folder, 0, deltas.rows[0], block_windows=2)
    finish_cache(deltas.folder)
    assert snapshot(deltas.folder) == before


def test_only_partials_are_removed_among_what_nobody_knows(patches: Any) -> None:
    shards = patches.folder / "shards"
    (shards / "000007.zarr.zip.partial-1-0123abcd").touch()
    (patches.folder / "plan.json.partial-1-0123abcd").touch()
    (shards / "000009.tar").write_text("mine")
    assert repair(patches.folder).removed == [
        "plan.json.partial-1-0123abcd",
        "shards/000007.zarr.zip.partial-1-0123abcd",
    ]
    left = verify_cache(patches.folder)
    assert left.orphans == {"shards/000009.tar": 1}
    assert len(PatchShards(patches.folder)) == 11


def test_a_folder_in_the_place_of_a_shard_stays(patches: Any) -> None:
    path = patches.folder / "shards/000000.zarr.zip"
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    assert repair(patches.folder).removed == ["shards/000000.json"]
    assert (path / "notes.txt").read_text() == "mine"


def test_links_are_removed_and_never_followed(patches: Any, tmp_path: Path) -> None:
    path, outside = patches.folder / "shards/000000.zarr.zip", tmp_path / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)
    before = outside.read_bytes()
    assert repair(patches.folder).shards == [0]
    assert not path.is_symlink()
    assert outside.read_bytes() == before


def test_a_partial_that_is_a_link_is_removed_and_not_followed(patches: Any, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    link = patches.folder / "shards/000001.zarr.zip.partial-999999999-0123abcd"
    link.symlink_to(outside)
    repair(patches.folder)
    assert not link.is_symlink()
    assert (outside / "file").read_text() == "mine"


def test_nothing_is_touched_where_shards_is_a_link(patches: Any, tmp_path: Path) -> None:
    shutil.move(patches.folder / "shards", tmp_path / "outside")
    (patches.folder / "shards").symlink_to(tmp_path / "outside")
    before = snapshot(tmp_path)
    with pytest.raises(DamagedShard, match="is a link: nothing was removed"):
        repair(patches.folder)
    assert snapshot(tmp_path) == before


def test_nothing_is_removed_by_a_cache_json_that_was_changed(patches: Any) -> None:
    path = patches.folder / "cache.json"
    path.write_text(path.read_text().replace('"num_frames": 3', '"num_frames": 4'))
    before = snapshot(patches.folder)
    assert verify_cache(patches.folder, deep=True).problems
    with pytest.raises(DamagedShard, match="was changed by hand or damaged: nothing was removed"):
        repair(patches.folder, deep=True)
    assert snapshot(patches.folder) == before


def test_a_plan_that_cannot_be_trusted_condemns_no_shard(
    little: Any, tmp_path: Path, edit_plan: Any
) -> None:
    cache = little.make_patches(tmp_path / "cache", finish=False)
    edit_plan(cache.folder, lambda lines: lines[0]["clips"][0].update(key="clip9.mp4"))
    report = verify_cache(cache.folder, deep=True)
    assert any("made of other clips than the plan" in problem.text for problem in report.problems)
    assert report.damaged == []


def test_shards_of_another_cache_are_not_removed(little: Any, patches: Any, deltas: Any) -> None:
    """Whole shards under another cache.json: more likely that one is wrong."""
    other = little.make_patches(patches.folder.parent / "other", dtype="bfloat16")
    shutil.copy(other.folder / "cache.json", patches.folder / "cache.json")
    report = verify_cache(patches.folder, deep=True)
    assert any("belongs to another cache" in problem.text for problem in report.problems)
    before = {name for name in snapshot(patches.folder) if ".zarr" in name}
    repair_cache(patches.folder, verify_cache(patches.folder, deep=True))
    assert before <= set(snapshot(patches.folder))


@pytest.mark.parametrize("name", ["index.jsonl", "quarantine.jsonl", "NOTICE.txt"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("x")])
def test_derived_files_are_made_again(patches: Any, name: str, damage: Any) -> None:
    before = snapshot(patches.folder)
    damage(patches.folder / name)
    done = repair(patches.folder)
    assert (done.removed, done.shards) == ([], [])
    assert done.rewritten in ([name], [])  # an empty quarantine.jsonl may as well be missing
    assert verify_cache(patches.folder, deep=True).problems == []
    assert snapshot(patches.folder) == before


def test_an_unreadable_record_goes_and_its_data_stays_for_the_writer(patches: Any) -> None:
    (patches.folder / "shards/000000.json").write_text("{")
    assert repair(patches.folder).removed == ["shards/000000.json"]
    assert (patches.folder / "shards/000000.zarr.zip").exists()
    write_patch_shard(patches.folder, 0, patches.rows[0], dtype="float16", seed=7)
    finish_cache(patches.folder)
    assert verify_cache(patches.folder, deep=True).problems == []


def test_a_repaired_delta_cache_reads_what_is_left(little: Any, deltas: Any) -> None:
    little.flip_byte(deltas.folder / "shards/000000.tar", 700)
    repair(deltas.folder)
    reader = DeltaShards(deltas.folder, allow_incomplete=True)
    np.testing.assert_array_equal(reader.load()[0], deltas.expected["tokens"][5:])
