"""Done-records, quarantine and timings: they come back, and broken ones are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deltatok.shards import records
from deltatok.shards.cache import finish_cache
from deltatok.shards.patches.writer import write_patch_shard
from deltatok.shards.records import (
    Quarantined,
    append_timing,
    done_shards,
    read_done,
    write_quarantine,
)
from deltatok.shards.schema import parse_json


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
    assert record.decoders(keys) == named


def test_closing_a_cache_reads_each_record_once(
    patches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bytes] = []

    def counted(data: bytes, *, where: str) -> Any:
        read.append(data)
        return parse_json(data, where=where)

    monkeypatch.setattr(records, "parse_json", counted)
    again = finish_cache(patches.folder)
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
