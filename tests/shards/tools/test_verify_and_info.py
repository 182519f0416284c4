"""verify_cache says all that is wrong with a cache, describe_cache what it is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deltatok.shards import CacheMismatch, UsageError
from deltatok.shards.cache import finish_cache
from deltatok.shards.patches.writer import write_patch_shard
from deltatok.shards.records import Quarantined, write_quarantine
from deltatok.shards.tools.info import describe_cache
from deltatok.shards.tools.verify import verify_cache


@pytest.mark.parametrize("kind", ["patches", "deltas"])
def test_a_whole_cache_has_no_problems(request: pytest.FixtureRequest, kind: str) -> None:
    cache = request.getfixturevalue(kind)
    report = verify_cache(cache.folder)
    assert report.problems == []
    assert (report.shards, report.windows) == (2, 11)
    stored = [path for path in (cache.folder / "shards").rglob("*") if path.is_file()]
    data = [path for path in stored if path.suffix in (".zip", ".tar")]
    assert report.bytes == sum(path.stat().st_size for path in data)


def test_a_bfloat16_cache_has_no_problems(little: Any, tmp_path: Path) -> None:
    assert (
        verify_cache(
            little.make_patches(tmp_path / "c", dtype="bfloat16").folder, deep=True
        ).problems
        == []
    )


def append(text: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text((path.read_text() if path.exists() else "") + text)

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("shards/000000.json", Path.unlink, ["1 of 2 shards are not done", "in no done-record"]),
        ("shards/000007.json", append("{"), ["000007.json: not valid JSON"]),
        ("shards/000007.tar", append("x"), ["000007.tar: 1 files in no done-record"]),
        ("shards/000000.zarr", Path.mkdir, []),
        ("shards/000007.zarr.zip", append("x"), ["000007.zarr.zip: 1 files in no done-record"]),
        ("shards/x.partial-1-01234567", append("x"), ["left by a killed run"]),
        ("cache.json.partial-1-01234567", append("x"), ["left by a killed run"]),
        ("black.npy", Path.unlink, ["black.npy: cannot be read"]),
        ("plan.json", Path.unlink, ["plan.json: cannot be read"]),
        ("plan.json", append("{}"), ["was changed since", "plan.json: not valid JSON"]),
        ("plan/notes", append("x"), ["plan/notes: no part of plan.json"]),
        (
            "quarantine.jsonl",
            append("{}\n"),
            ["was changed since", "does not list the quarantined"],
        ),
        ("timings.jsonl", append("{}\n"), []),
    ],
)
def test_verify_names_what_is_wrong(
    patches: Any, name: str, change: Callable[[Path], None], words: list[str]
) -> None:
    change(patches.folder / name)
    problems = verify_cache(patches.folder, deep=True).problems
    assert len(problems) == len(words), problems
    for word in words:
        assert any(word in problem.text for problem in problems), (word, problems)


@pytest.mark.parametrize(
    ("name", "change", "kinds"),
    [
        ("shards/000001.json", Path.unlink, {("unfinished", None), ("leftover", 1)}),
        ("shards/000001.json", append("{"), {("shard", 1), ("leftover", 1), ("unfinished", None)}),
        ("shards/000001.zarr.zip", Path.unlink, {("shard", 1)}),
        ("shards/stranger", append("x"), {("leftover", None)}),
        ("black.npy", Path.unlink, {("folder", None)}),
    ],
)
def test_every_problem_has_a_kind_and_its_shard(
    patches: Any, name: str, change: Callable[[Path], None], kinds: set[tuple[str, int | None]]
) -> None:
    change(patches.folder / name)
    report = verify_cache(patches.folder)
    assert {(problem.kind, problem.shard) for problem in report.problems} == kinds
    assert report.damaged == [shard for kind, shard in kinds if kind == "shard"]


def test_verify_finds_several_problems_at_once(little: Any, patches: Any) -> None:
    little.flip_byte(patches.folder / "shards/000000.zarr.zip", 3)
    (patches.folder / "shards/000001.zarr.zip").unlink()
    (patches.folder / "shards/stranger").touch()
    problems = verify_cache(patches.folder, deep=True).problems
    assert len(problems) == 3


def test_verify_holds_clips_against_the_plan(little: Any, patches: Any) -> None:
    rows = little.patch_rows(5, [*patches.rows[0].keys[:2], "stranger"], seed=0)
    write_patch_shard(patches.folder, 0, rows, dtype="float16", seed=7)
    (problem,) = verify_cache(patches.folder, deep=True).problems
    assert "shard 000000 was made of other clips than the plan says" in problem.text


def test_quarantined_clips_are_accounted_for(little: Any, patches: Any) -> None:
    *keys, missing = patches.rows[0].keys
    entry = Quarantined(clip=missing, stage="decode", reason="no frames", attempts=2)
    rows = little.patch_rows(5, keys, seed=0)
    rows = replace(rows, quarantined=[entry])
    write_patch_shard(patches.folder, 0, rows, dtype="float16", seed=7)
    problems = verify_cache(patches.folder).problems  # nothing else is brought up to date yet
    assert len(problems) == 2
    assert "000000.json: is not the done-record that index.jsonl tells of" in problems[0].text
    assert "quarantine.jsonl: does not list" in problems[1].text
    write_quarantine(patches.folder)
    finish_cache(patches.folder)
    assert verify_cache(patches.folder, deep=True).problems == []
    assert describe_cache(patches.folder)["quarantined"] == 1


def test_verify_says_that_a_cache_is_not_finished(little: Any, tmp_path: Path) -> None:
    cache = little.make_deltas(tmp_path / "cache", finish=False)
    (problem,) = verify_cache(cache.folder, deep=True).problems
    assert "not marked complete" in problem.text
    (cache.folder / "shards/000001.json").unlink()
    (cache.folder / "shards/000001.tar").unlink()
    (problem,) = verify_cache(cache.folder, deep=True).problems
    assert "not finished: 1 of 2 shards are not done, first 000001" in problem.text


def test_verify_refuses_what_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        verify_cache(tmp_path / "missing")
    with pytest.raises(CacheMismatch, match="not a deltatok cache"):
        verify_cache(tmp_path)


def test_info_describes_a_patch_cache(patches: Any) -> None:
    found = describe_cache(patches.folder)
    assert json.loads(json.dumps(found)) == found
    assert found["format"] == "deltatok-patches 1"
    assert found["dtype"] == "float16"
    assert (found["shards"], found["shards_planned"], found["windows"]) == (2, 2, 11)
    assert (found["clips"], found["clips_planned"], found["quarantined"]) == (6, 6, 0)
    assert (found["frames_per_window"], found["tokens_per_frame"], found["channels"]) == (3, 4, 6)
    assert found["bytes"] == verify_cache(patches.folder).bytes
    assert [step["step"] for step in found["provenance"]] == ["backbone", "patches"]


def test_info_gives_the_chain_of_a_delta_cache(deltas: Any) -> None:
    chain = describe_cache(deltas.folder)["provenance"]
    assert [step["step"] for step in chain] == ["backbone", "patches", "tokenizer", "deltas"]
    assert chain[0]["weights_sha256"] == "ab" * 32
    assert chain[1]["fingerprint"] == deltas.info.parent_fingerprint
    assert chain[2]["weights_sha256"] == "cd" * 32
    assert chain[3]["fingerprint"] == deltas.info.fingerprint


def test_info_reads_an_unfinished_cache_without_plan(little: Any, tmp_path: Path) -> None:
    cache = little.make_patches(tmp_path / "cache", finish=False)
    (cache.folder / "plan.json").unlink()
    (cache.folder / "shards/000001.zarr.zip").unlink()
    found = describe_cache(cache.folder)
    assert (found["complete"], found["shards"], found["shards_planned"]) == (False, 2, None)
