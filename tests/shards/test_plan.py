"""The plan: it comes back, part by part; what differs from it, and what is damaged, is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deltatok.shards import CacheMismatch, DamagedShard, PatchShards, UsageError, read_cache_info
from deltatok.shards import plan as plans
from deltatok.shards.plan import (
    Plan,
    begins,
    check_same_clips,
    copied_plan,
    keys_sha256,
    longer_plan,
    make_plan,
    mended_plan,
    remove_strangers,
    shard_keys,
    write_plan,
)
from deltatok.shards.tools.verify import verify_cache


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part has three shards instead of 1,000."""
    monkeypatch.setattr(plans, "SHARDS_PER_PART", 3)


def clips(little: Any, numbers: Any) -> dict[str, Any]:
    found = [little.Clip(f"d/clip{n}.mp4", Path(f"/v/d/clip{n}.mp4"), n) for n in numbers]
    return {clip.key: clip for clip in found}


def planned(little: Any, folder: Path, numbers: Any, **how: Any) -> Plan:
    found = clips(little, numbers).values()
    folder.mkdir(exist_ok=True)
    return write_plan(folder, make_plan(found, **{"clips_per_shard": 2, "seed": 3, **how}))


def test_plan_does_not_depend_on_the_order_clips_are_found_in(little: Any) -> None:
    found = list(clips(little, range(50)).values())
    plan = list(make_plan(found, clips_per_shard=8, seed=3))
    assert list(make_plan(found[::-1], clips_per_shard=8, seed=3)) == plan
    assert list(make_plan(found, clips_per_shard=8, seed=4)) != plan
    assert [entry.shard for entry in plan] == [place // 8 for place in range(50)]
    assert {entry.key for entry in plan} == {clip.key for clip in found}
    digests = [
        hashlib.blake2b(f"clip:3:{entry.key}".encode(), digest_size=16).digest() for entry in plan
    ]
    assert digests == sorted(digests)


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


def test_plan_comes_back_whole_and_by_shard(little: Any, tmp_path: Path) -> None:
    made = list(make_plan(clips(little, range(17)).values(), clips_per_shard=2, seed=3))
    made[3] = replace(made[3], source="/elsewhere/x.tar", label="a class", split="train")
    plan = write_plan(tmp_path, made)
    assert plan == Plan.open(tmp_path)
    assert (plan.num_shards, plan.num_clips, len(plan.parts)) == (9, 17, 3)
    assert list(plan) == made
    by_shard = [[entry for entry in made if entry.shard == shard] for shard in range(9)]
    assert dict(plan.shards()) == dict(enumerate(by_shard))
    assert dict(plan.shards({1, 7, 99})) == {1: by_shard[1], 7: by_shard[7]}
    assert plan.shard(8) == by_shard[8]


def test_parts_of_other_shards_are_not_read(little: Any, tmp_path: Path) -> None:
    plan = planned(little, tmp_path, range(17))
    for part in (plan.parts[0], plan.parts[2]):
        (tmp_path / part.file).unlink()
    assert [shard for shard, _ in plan.shards({3, 5})] == [3, 5]
    with pytest.raises(DamagedShard, match=r"plan/000006-.*jsonl: cannot be read"):
        plan.shard(6)


def test_a_clip_takes_its_key_and_its_size(little: Any, tmp_path: Path) -> None:
    plan = planned(little, tmp_path, range(17))
    assert plan.root == "/v/"
    line = (tmp_path / plan.parts[0].file).read_text().splitlines()[0]
    first, second = list(plan)[:2]
    assert json.loads(line) == {
        "shard": 0,
        "clips": [{"key": e.key, "size_bytes": e.size_bytes} for e in (first, second)],
    }
    assert first.source == f"/v/{first.key}"


def test_a_plan_without_clips_has_no_part(tmp_path: Path) -> None:
    write_plan(tmp_path, [])
    plan = Plan.open(tmp_path)
    assert (plan.num_shards, plan.num_clips, list(plan)) == (0, 0, [])


def test_the_same_plan_is_kept_and_any_other_refused(little: Any, tmp_path: Path) -> None:
    plan = planned(little, tmp_path, range(17))
    moved = [replace(entry, source=f"/moved/{entry.key}") for entry in plan]
    assert write_plan(tmp_path, moved) == plan
    for other, words in (
        (moved[:-1], "clip 'd/clip.*' is in the plan of this cache but not asked for"),
        ([*moved, replace(moved[0], key="new", shard=9)], "more clips are asked for than the 17"),
        ([replace(moved[0], size_bytes=99), *moved[1:]], "bytes when the plan was made, now 99"),
        ([replace(moved[0], key="new"), *moved[1:]], "has clip 'd/clip.*' where 'new' in shard"),
    ):
        with pytest.raises(CacheMismatch, match=words):
            write_plan(tmp_path, other)
    assert Plan.open(tmp_path) == plan


def test_processes_that_plan_the_same_at_once_agree(
    little: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, elsewhere = plans.create_bytes, planned(little, tmp_path / "other", range(17))

    def late(path: Path, data: bytes) -> bool:
        assert create(path, elsewhere.to_bytes())  # the other process is a moment faster
        return create(path, data)

    monkeypatch.setattr(plans, "create_bytes", late)
    assert planned(little, tmp_path / "cache", range(17)) == elsewhere
    assert list(Plan.open(tmp_path / "cache")) == list(elsewhere)


def test_a_plan_whose_writer_was_killed_is_written_again(little: Any, tmp_path: Path) -> None:
    plan = planned(little, tmp_path, range(17))
    wanted = tree(tmp_path)
    (tmp_path / "plan.json").unlink()
    (tmp_path / plan.parts[1].file).unlink()
    (tmp_path / plan.parts[2].file).write_bytes(b"torn")
    planned(little, tmp_path, range(17))
    assert tree(tmp_path) == wanted


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (range(4), "clip 'd/clip4.mp4' is in the plan of this cache but not asked for"),
        (range(6), "clip 'd/clip5.mp4' is asked for but not in the plan"),
        ([0, 1, 2, 3, 9], "clip 'd/clip9.mp4' is asked for but"),
    ],
)
def test_other_clips_than_planned_are_refused(
    little: Any, tmp_path: Path, numbers: Any, words: str
) -> None:
    plan = planned(little, tmp_path, range(5), clips_per_shard=1)
    check_same_clips(plan, clips(little, range(5)))
    with pytest.raises(CacheMismatch, match=words):
        check_same_clips(plan, clips(little, numbers))


def test_a_clip_of_another_size_is_refused(little: Any, tmp_path: Path) -> None:
    plan = planned(little, tmp_path, range(5))
    for key, words in (
        ("d/clip3.mp4", "'d/clip3.mp4' had 3 bytes when the plan was made, now 99: restore"),
        ("d/clip0.mp4", "'d/clip0.mp4' had 0 bytes .* add --retry-quarantined"),
    ):
        asked = clips(little, range(5))
        asked[key] = replace(asked[key], size_bytes=99)
        with pytest.raises(CacheMismatch, match=words):
            check_same_clips(plan, asked)


def test_longer_plan_keeps_all_parts_and_adds_new_ones(little: Any, tmp_path: Path) -> None:
    plan = planned(little, tmp_path, range(9))
    before = tree(tmp_path)
    how = {"clips_per_shard": 2, "seed": 3}
    assert longer_plan(plan, clips(little, range(9)), **how) == plan
    longer = longer_plan(plan, clips(little, range(7, 20)), **how)
    assert Plan.open(tmp_path) == plan  # until it is committed
    longer.commit()
    assert Plan.open(tmp_path) == longer
    before.pop("plan.json")
    assert before.items() <= tree(tmp_path).items()
    assert longer.parts[:2] == plan.parts
    assert [part.first_shard for part in longer.parts] == [0, 3, 5, 8]
    alone = make_plan(clips(little, range(9, 20)).values(), first_shard=5, **how)
    assert list(longer)[9:] == list(alone)


def test_old_clips_under_new_names_are_not_appended(little: Any, tmp_path: Path) -> None:
    plan = planned(little, tmp_path, range(5))
    renamed = [replace(clip, key=f"x/{clip.key}") for clip in clips(little, range(3, 7)).values()]
    with pytest.raises(CacheMismatch, match=r"is in this cache as 'd/clip[34].mp4', and would be"):
        longer_plan(plan, {clip.key: clip for clip in renamed}, clips_per_shard=2, seed=3)


def test_mended_plan_fills_in_what_had_no_bytes_in_its_part_alone(
    little: Any, tmp_path: Path
) -> None:
    plan = planned(little, tmp_path, range(17))
    asked = clips(little, range(17))
    assert mended_plan(plan, asked) == plan
    asked["d/clip0.mp4"] = replace(asked["d/clip0.mp4"], size_bytes=70)
    asked["d/clip1.mp4"] = replace(asked["d/clip1.mp4"], size_bytes=70)  # it had a byte: stays
    mended = mended_plan(plan, asked)
    mended.commit()
    changed = [new for old, new in zip(plan, Plan.open(tmp_path), strict=True) if old != new]
    assert [(entry.key, entry.size_bytes) for entry in changed] == [("d/clip0.mp4", 70)]
    differing = [a != b for a, b in zip(plan.parts, mended.parts, strict=True)]
    assert sum(differing) == 1
    (stranger,) = mended.strangers()
    assert stranger == tmp_path / plan.parts[differing.index(True)].file
    (tmp_path / "plan/notes.txt").touch()
    remove_strangers(tmp_path)
    assert mended.strangers() == [tmp_path / "plan/notes.txt"]  # not ours


def test_copied_plan_is_the_same_bytes(little: Any, tmp_path: Path) -> None:
    plan = planned(little, tmp_path / "a", range(17))
    (tmp_path / "b").mkdir()
    copied_plan(plan, tmp_path / "b").commit()
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_plan_that_goes_on_begins_with_the_stored_one(little: Any, tmp_path: Path) -> None:
    plan = planned(little, tmp_path, range(9))
    longer = longer_plan(plan, clips(little, range(12)), clips_per_shard=2, seed=3)
    assert begins(plan, longer)
    assert not begins(plan, plan)
    mended = [replace(entry, size_bytes=entry.size_bytes or 5) for entry in longer]
    assert begins(plan, mended, may_be_mended=True)
    with pytest.raises(CacheMismatch, match="had 0 bytes"):
        begins(plan, mended)


def test_keys_of_a_shard_are_those_with_windows_in_plan_order() -> None:
    assert shard_keys("dbca", {"b"}) == ["d", "c", "a"]
    wanted = hashlib.sha256(b'["d","c","\\u00e9"]').hexdigest()
    assert keys_sha256(["d", "c", "é"]) == wanted


def _drop(field: str) -> Callable[[dict[str, Any]], object]:
    return lambda value: value.pop(field)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_drop("root"), "no field 'root'"),
        (_drop("parts"), "no field 'parts'"),
        (lambda plan: plan.update(shards=8), "says 8 shards with 17 clips, its parts have 9"),
        (lambda plan: plan.update(clips=2**53), "its parts have 9 with 17"),
        (lambda plan: plan.update(format_version=0), "format_version is 0"),
        (lambda plan: plan["parts"].pop(1), r"plan/000006-.* from 6 on, wanted 1 to 3 from 3 on"),
        (lambda plan: plan["parts"].reverse(), "wanted 1 to 3 from 0 on"),
        (lambda plan: plan["parts"].insert(1, plan["parts"][0]), "from 0 on, wanted .* from 3 on"),
        (lambda plan: plan["parts"][0].update(shards=2**50), "has 1125899906842624 shards from 0"),
        (lambda plan: plan["parts"][0].update(shards=0), "has 0 shards from 0 on"),
        (lambda plan: plan["parts"][0].update(file="../../etc/passwd"), "names the part '../../"),
        (lambda plan: plan["parts"][0].update(file="/etc/passwd"), "names the part '/etc/"),
        (lambda plan: plan["parts"][0].update(sha256="0" * 64), "names the part 'plan/000000-"),
        (lambda plan: plan["parts"][0].update(sha256="x"), "names the part"),
    ],
)
def test_a_made_up_plan_is_refused(
    little: Any, tmp_path: Path, edit: Callable[[dict[str, Any]], object], words: str
) -> None:
    planned(little, tmp_path, range(17))
    value = json.loads((tmp_path / "plan.json").read_text())
    edit(value)
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(DamagedShard, match=words):
        Plan.open(tmp_path)


def test_a_newer_plan_names_both_versions(little: Any, tmp_path: Path) -> None:
    planned(little, tmp_path, range(3))
    path = tmp_path / "plan.json"
    path.write_text('{"format_version": 2}')
    with pytest.raises(CacheMismatch, match="format_version 2, this release reads up to 1"):
        Plan.open(tmp_path)


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedShard, match=r"plan\.json: cannot be read"):
        Plan.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-9], "was changed since the plan was made"),
        (lambda data: data.replace(b"clip1", b"clip2"), "was changed since the plan was made"),
        (lambda data: b"", "was changed since the plan was made"),
    ],
)
def test_a_changed_part_is_refused(
    little: Any, tmp_path: Path, change: Callable[[bytes], bytes], words: str
) -> None:
    plan = planned(little, tmp_path, range(17))
    part = next(p for p in plan.parts if b"clip1" in (tmp_path / p.file).read_bytes())
    path = tmp_path / part.file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DamagedShard, match=f"{path.name}: {words}"):
        plan.shard(part.first_shard)


CLIP = '{"key": "a", "size_bytes": 1}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "is .*, wanted a JSON object"),
        ('{"shard": 0}', "no field 'clips'"),
        (f'{{"clips": [{CLIP}]}}', "no field 'shard'"),
        (f'{{"shard": 1, "clips": [{CLIP}]}}', "shard is 1, wanted 0"),
        ('{"shard": 0, "clips": ["a"]}', "a clip is 'a', wanted a JSON object"),
        ('{"shard": 0, "clips": [{"key": "a"}]}', "no field 'size_bytes'"),
        ('{"shard": 0, "clips": [{"key": 1, "size_bytes": 1, "source": ""}]}', "key is 1, wanted"),
        ('{"shard": 0, "clips": [{"key": "a", "size_bytes": -1}]}', "size_bytes is -1"),
        (f'{{"shard": 0, "clips": [{CLIP}, {CLIP}]}}', "clip 'a' a second time"),
        ('{"shard": 0, "clips": []}', "has 0 clips, plan.json says 1"),
        (f'{{"shard": 0, "clips": [{CLIP}]}}\n{{}}', "has 2 shards in .* says 1"),
    ],
)
def test_a_malformed_part_is_refused_with_the_line(
    little: Any, tmp_path: Path, line: str, words: str
) -> None:
    data = f"{line}\n".encode()
    digest = hashlib.sha256(data).hexdigest()
    plan = planned(little, tmp_path, [1])
    (part,) = plan.parts
    name = f"plan/000000-{digest[:16]}.jsonl"
    (tmp_path / name).write_bytes(data)
    replace(plan, parts=(replace(part, file=name, sha256=digest, bytes=len(data)),)).commit()
    with pytest.raises(DamagedShard, match=words):
        list(Plan.open(tmp_path))


def test_verify_finds_a_clip_in_two_shards(patches: Any, edit_plan: Any) -> None:
    def edit(lines: list[Any]) -> None:
        lines[1]["clips"].append(lines[0]["clips"][0])

    edit_plan(patches.folder, edit)
    texts = [str(problem) for problem in verify_cache(patches.folder).problems]
    assert any("is in two shards (1 such clips)" in text for text in texts), texts


def test_verify_names_every_damaged_part(little: Any, patches: Any) -> None:
    entries = list(Plan.open(patches.folder))
    (patches.folder / "plan.json").unlink()
    shutil.rmtree(patches.folder / "plan")
    more = [replace(entries[0], key=f"new{shard}", shard=shard) for shard in range(2, 8)]
    plan = write_plan(patches.folder, [*entries, *more])
    for part in plan.parts[1:]:
        (patches.folder / part.file).write_bytes(b"")
    texts = [str(problem) for problem in verify_cache(patches.folder).problems]
    for part in plan.parts[1:]:
        assert any(part.file in text and "was changed" in text for text in texts), texts
    assert not any(plan.parts[0].file in text for text in texts)


def test_verify_names_a_part_that_is_a_link_out_of_the_cache(patches: Any, tmp_path: Path) -> None:
    (path,) = (patches.folder / "plan").iterdir()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    (problem,) = verify_cache(patches.folder).problems
    assert f"{path}: is a link out of the cache" in problem.text


def test_a_cache_of_the_unreleased_format_is_refused(patches: Any) -> None:
    (patches.folder / "plan.jsonl").write_text("{}\n")
    with pytest.raises(CacheMismatch, match=r"made before format 1 was fixed.*extract again"):
        PatchShards(patches.folder)
    (patches.folder / "plan.jsonl").unlink()
    value = json.loads((patches.folder / "cache.json").read_text())
    value["files"]["plan.jsonl"] = value["files"].pop("plan.json")
    (patches.folder / "cache.json").write_text(json.dumps(value))
    with pytest.raises(CacheMismatch, match=r"made before format 1 was fixed.*extract again"):
        read_cache_info(patches.folder)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
