"""plan.jsonl, done-records, quarantine and timings: they come back, and broken ones are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deltatok.shards import CacheMismatch, DamagedShard, UsageError, records
from deltatok.shards.cache import finish_cache
from deltatok.shards.patches.writer import write_patch_shard
from deltatok.shards.plan import (
    clips_by_shard,
    count_planned,
    make_plan,
    num_shards,
    read_plan,
    write_plan,
)
from deltatok.shards.records import (
    Quarantined,
    append_timing,
    done_shards,
    read_done,
    write_quarantine,
)
from deltatok.shards.schema import parse_json


def clips(little: Any, count: int) -> list[Any]:
    return [little.Clip(f"clip{index}.mp4", Path(f"/v/{index}"), index) for index in range(count)]


def test_plan_does_not_depend_on_the_order_clips_are_found_in(little: Any, tmp_path: Path) -> None:
    found = clips(little, 50)
    plan = make_plan(found, clips_per_shard=8, seed=3)
    assert make_plan(found[::-1], clips_per_shard=8, seed=3) == plan
    assert make_plan(found, clips_per_shard=8, seed=4) != plan
    assert num_shards(plan) == 7
    assert write_plan(tmp_path, plan) == plan
    assert count_planned(tmp_path) == 7
    assert [len(clips_by_shard(plan)[shard]) for shard in range(7)] == [8] * 6 + [2]
    assert {entry.key for entry in plan} == {clip.key for clip in found}
    assert [entry.key for entry in plan[:4]] != sorted(entry.key for entry in plan)[:4]


def test_plan_refuses_names_that_cannot_be_told_apart_or_stored(little: Any) -> None:
    clip = little.Clip
    for keys, words in (
        (["a", "a"], "are both called 'a'"),
        ([""], "an empty name"),
        (["\udc80.mp4"], "no valid UTF-8"),
    ):
        with pytest.raises(UsageError, match=words):
            make_plan([clip(key, Path("x"), 1) for key in keys], clips_per_shard=1, seed=0)
    with pytest.raises(UsageError, match="clips_per_shard is 0"):
        make_plan([], clips_per_shard=0, seed=0)


def test_plan_comes_back_and_is_kept(little: Any, tmp_path: Path) -> None:
    plan = make_plan(clips(little, 5), clips_per_shard=2, seed=3)
    assert write_plan(tmp_path, plan) == plan
    assert read_plan(tmp_path) == plan
    moved = [replace(clip, path=Path("/moved") / clip.key) for clip in clips(little, 5)]
    followed = write_plan(tmp_path, make_plan(moved, clips_per_shard=5, seed=9))
    assert [entry.shard for entry in followed] == [entry.shard for entry in plan]
    assert {entry.source for entry in followed} == {str(clip.path) for clip in moved}
    assert read_plan(tmp_path) == plan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found[:-1], "clip 'clip4.mp4' is in the plan of this cache but not"),
        (lambda found: [*found, replace(found[0], key="new")], "clip 'new' is asked for but"),
        (lambda found: [replace(found[0], size_bytes=99), *found[1:]], "had 0 bytes .* now 99"),
    ],
)
def test_a_plan_of_other_clips_is_refused(
    little: Any, tmp_path: Path, change: Callable[[list[Any]], list[Any]], words: str
) -> None:
    found = clips(little, 5)
    write_plan(tmp_path, make_plan(found, clips_per_shard=2, seed=3))
    with pytest.raises(CacheMismatch, match=words):
        write_plan(tmp_path, make_plan(change(found), clips_per_shard=2, seed=3))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        '{"key": "a", "source": "", "size_bytes": 1}',
        '{"key": 1, "source": "", "size_bytes": 1, "shard": 0}',
        '{"key": "a", "source": "", "size_bytes": -1, "shard": 0}',
        '{"key": "a", "source": "", "size_bytes": 1, "shard": 7}',
        '{"key": "clip0.mp4", "source": "", "size_bytes": 1, "shard": 0}',
    ],
)
def test_a_broken_plan_is_refused_with_the_line(little: Any, tmp_path: Path, line: str) -> None:
    write_plan(tmp_path, make_plan(clips(little, 2), clips_per_shard=2, seed=3))
    with (tmp_path / "plan.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DamagedShard, match=r"plan\.jsonl: line 3"):
        read_plan(tmp_path)


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedShard, match=r"plan\.jsonl: cannot be read"):
        read_plan(tmp_path)


def test_done_record_comes_back(little: Any, patches: Any) -> None:
    quarantined = [Quarantined(clip="x", stage="decode", reason="no frames", attempts=2)]
    rows = replace(patches.rows[1], quarantined=quarantined)
    written = write_patch_shard(patches.folder, 1, rows, dtype="float16", seed=7)
    assert read_done(patches.folder, 1) == written
    assert written.quarantined == quarantined
    assert read_done(patches.folder, 2) is None
    assert done_shards(patches.folder) == [0, 1]


@pytest.mark.parametrize(
    ("decoders", "most", "others"),
    [
        ({}, None, []),
        ({0: "pyav", 1: "pyav", 2: "pyav"}, "pyav", []),
        ({0: "decord", 1: "pyav", 2: "decord"}, "decord", [(1, "pyav")]),
        ({0: "pyav", 2: "decord"}, "decord", [(0, "pyav"), (1, None)]),
    ],
)
def test_done_record_names_the_decoder_of_each_clip_once(
    patches: Any, decoders: dict[int, str], most: str | None, others: list[tuple[int, str | None]]
) -> None:
    keys = patches.rows[1].keys
    named = {keys[clip]: decoder for clip, decoder in decoders.items()}
    rows = replace(patches.rows[1], decoders=named)
    write_patch_shard(patches.folder, 1, rows, dtype="float16", seed=7)
    record = read_done(patches.folder, 1)
    assert record is not None
    assert record.decoder == most
    assert record.other_decoders == {keys[clip]: decoder for clip, decoder in others}
    assert record.decoders() == named


def test_closing_a_cache_reads_each_record_once(
    patches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bytes] = []

    def counted(data: bytes, *, where: str) -> Any:
        read.append(data)
        return parse_json(data, where=where)

    monkeypatch.setattr(records, "parse_json", counted)
    again = finish_cache(patches.folder, patches.info.counts)
    assert again == patches.info
    assert len(read) == 2


def test_quarantine_lists_the_entries_of_all_done_records_sorted(patches: Any) -> None:
    for shard, clip in ((0, "z"), (1, "a")):
        entry = Quarantined(clip=clip, stage="open", reason="é", attempts=2)
        rows = replace(patches.rows[shard], quarantined=[entry])
        write_patch_shard(patches.folder, shard, rows, dtype="float16", seed=7)
    write_quarantine(patches.folder)
    lines = (patches.folder / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["clip"] for line in lines] == ["a", "z"]
    before = (patches.folder / "quarantine.jsonl").read_bytes()
    write_quarantine(patches.folder)
    assert (patches.folder / "quarantine.jsonl").read_bytes() == before


def test_timings_are_appended(tmp_path: Path) -> None:
    append_timing(tmp_path, {"shard": 0, "seconds": 1.5})
    append_timing(tmp_path, {"shard": 1, "seconds": 2.5})
    lines = (tmp_path / "timings.jsonl").read_text().splitlines()
    assert [json.loads(line)["seconds"] for line in lines] == [1.5, 2.5]
