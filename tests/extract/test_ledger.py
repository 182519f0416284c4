"""quarantine.jsonl is kept up to date without reading the done-records again and again."""

import json
from pathlib import Path

import pytest

from deltatok.extract.ledger import Ledger
from deltatok.shards import records
from deltatok.shards.plan import PlanEntry, keys_sha256, write_plan
from deltatok.shards.records import DoneRecord, Quarantined, write_done, write_quarantine


def record_of(shard: int) -> DoneRecord:
    lost = Quarantined(clip=f"c{9 - shard}", stage="open", reason="empty", attempts=1)
    return DoneRecord(shard=shard, clips=0, keys_sha256=keys_sha256([]), rows=0, quarantined=[lost])


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Of three finished shards, each with a clip in quarantine."""
    (tmp_path / "shards").mkdir()
    entries = [
        PlanEntry(key=f"c{shard + 7}", source="", size_bytes=1, shard=shard) for shard in range(3)
    ]
    ledger = Ledger(tmp_path, plan=write_plan(tmp_path, entries))
    for shard in range(3):
        write_done(tmp_path, record_of(shard))
        ledger.add(record_of(shard))
    return ledger


def test_listing_the_quarantine_reads_no_done_record(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "read_file", None)
    ledger.list_quarantined(now=True)
    lines = (ledger.folder / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["clip"] for line in lines] == ["c7", "c8", "c9"]


def test_list_is_that_of_all_done_records(ledger: Ledger) -> None:
    ledger.list_quarantined(now=True)
    listed = (ledger.folder / "quarantine.jsonl").read_bytes()
    write_quarantine(ledger.folder)
    assert (ledger.folder / "quarantine.jsonl").read_bytes() == listed


def test_shard_made_again_leaves_the_quarantine(ledger: Ledger) -> None:
    ledger.add(DoneRecord(shard=1, clips=1, keys_sha256=keys_sha256(["c8"]), rows=0))
    ledger.list_quarantined(now=True)
    assert "c8" not in (ledger.folder / "quarantine.jsonl").read_text()
