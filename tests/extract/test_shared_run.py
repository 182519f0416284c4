"""Processes that extract into one folder share the work, whatever becomes of one of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltatok.extract import backbone as devices
from deltatok.extract import common
from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.holder import Holder
from deltatok.extract.leases import Leases
from deltatok.extract.run import run_extraction
from deltatok.extract.stop import stop_on_signals
from deltatok.extract.work import SharedWork
from deltatok.extract.writer import PatchShardWriter, ShardRows
from deltatok.shards import Stopped
from deltatok.shards.plan import clips_by_shard, read_plan
from deltatok.shards.records import DoneRecord, read_done, write_done
from deltatok.shards.tools.verify import verify_cache

PROGRAM = Path(__file__).with_name("shared_run.py")

Digests = Callable[[Path], dict[str, str]]
ConfigMaker = Callable[..., ExtractConfig]


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_of_which_one_is_killed_make_the_same_cache(
    make_config: ConfigMaker,
    backbone: Backbone,
    digests: Digests,
    tmp_path: Path,
    num_processes: int,
) -> None:
    config = make_config(frames_per_shard=12)  # six shards
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    process = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path / "config.json"), str(num_processes)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["ends"] == [-signal.SIGKILL] + [0] * (num_processes - 1), process.stderr
    assert sorted(chain.from_iterable(result["made"])) == list(range(6))  # each one once
    assert result["made"][0] == []
    assert verify_cache(config.out, deep=True).problems == []
    alone = replace(config, out=str(tmp_path / "alone"))
    run_extraction(alone, backbone=backbone)
    assert digests(Path(config.out)) == digests(Path(alone.out))


def _leave(config: ExtractConfig, name: str, holder: dict[str, object]) -> Path:
    path = Path(config.out) / "leases" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(holder))
    return path


def _dead() -> dict[str, object]:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return Holder.of_this_process().to_json() | {"pid": process.pid}


class _StoppingWriter(PatchShardWriter):
    """Gets SIGTERM while the first shard's features are made."""

    def convert(self, tokens: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return super().convert(tokens)


@pytest.fixture
def begun(make_config: ConfigMaker, backbone: Backbone) -> ExtractConfig:
    """The config of a cache of which no shard is done."""
    config = make_config()
    with pytest.raises(Stopped):
        run_extraction(config, backbone=backbone, writer=_StoppingWriter())
    return config


def test_stopped_run_leaves_no_lease(begun: ExtractConfig) -> None:
    assert not (Path(begun.out) / "leases").exists()


def test_leases_of_dead_processes_cost_nothing(
    begun: ExtractConfig, backbone: Backbone, finished: Path, digests: Digests
) -> None:
    for name in ("000000.json", "000002.json", "000002.1.json", "cache.json"):
        _leave(begun, name, _dead())
    run_extraction(replace(begun, lease_timeout="1h"), backbone=backbone)
    assert digests(Path(begun.out)) == digests(finished)


def test_lease_of_a_silent_machine_is_taken_over(
    begun: ExtractConfig, backbone: Backbone, finished: Path, digests: Digests
) -> None:
    _leave(begun, "000001.json", {"host": "h", "pid": 1, "machine": "other", "started": ""})
    partial = Path(begun.out) / "shards" / "000001.zarr.partial-1-00000000"  # of that machine
    partial.mkdir()
    run_extraction(replace(begun, lease_timeout="0.2s"), backbone=backbone)
    assert digests(Path(begun.out)) == digests(finished)
    assert not partial.exists()


def test_lease_left_after_the_last_shard_is_cleared(
    finished: Path, make_config: ConfigMaker, backbone: Backbone, digests: Digests
) -> None:
    config = make_config()
    wanted = digests(finished)
    run_extraction(config, backbone=backbone)
    path = Path(config.out) / "cache.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))
    _leave(config, "000001.json", _dead())
    run_extraction(replace(config, lease_timeout="1h"), backbone=backbone)
    assert digests(Path(config.out)) == wanted


class _SleepingWriter(PatchShardWriter):
    """Sleeps so long over the first shard that another machine takes it over, which then dies."""

    def write(self, folder: Path, shard: int, rows: ShardRows) -> DoneRecord:
        own = folder / "leases" / "000000.json"
        if own.exists():
            own.with_name("000000.1.json").write_text("{}")
            own.unlink()
            raise OSError("what was being written is gone")
        return super().write(folder, shard, rows)


def test_run_that_lost_a_lease_lets_go_of_the_shard_and_goes_on(
    make_config: ConfigMaker,
    backbone: Backbone,
    finished: Path,
    digests: Digests,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make_config(lease_timeout="0.2s")
    summary = run_extraction(config, backbone=backbone, writer=_SleepingWriter())
    assert "shard 000000: another process took it over" in caplog.text
    assert summary.shards_done_now == 3
    assert digests(Path(config.out)) == digests(finished)


class _WaitingFolder(common.CommonFolder):
    """Stops where it would wait for others."""

    def wait(self) -> None:
        raise Stopped("waits")


def test_cache_is_finished_only_after_those_who_still_write(
    finished: Path, backbone: Backbone, tmp_path: Path
) -> None:
    """Another process tries shard 1 again, say, although it is done."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    with (
        Leases(out, timeout_s=60) as others,
        Leases(out, timeout_s=60) as mine,
        stop_on_signals() as stop,
    ):
        folder = _WaitingFolder(out, mine, stop, poll_s=0)
        lease = others.take("000001")
        assert lease is not None
        with pytest.raises(Stopped, match="waits"):
            folder.finish(num_frames=4, changed=True)
        lease.release()
        folder.finish(num_frames=4, changed=True)


def test_shard_tried_again_by_one_process_is_done_for_the_other(
    finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    pending = clips_by_shard(read_plan(out))
    record = read_done(out, 0)
    assert record is not None
    with Leases(out, timeout_s=60) as mine, Leases(out, timeout_s=60) as theirs:
        one, other = SharedWork(out, pending, mine), SharedWork(out, pending, theirs)
        taken = one.take()
        assert taken is not None
        write_done(out, record)
        one.give_back(taken, done=True)
        second = other.take()
        assert second is not None
        assert (taken.shard, second.shard) == (0, 1)
        assert other.done_elsewhere() == [0]
        assert (one.left, other.left) == (2, 2)


@pytest.mark.parametrize(("rank", "wanted"), [("0", "cuda:0"), ("5", "cuda:1"), ("", "cuda:0")])
def test_each_rank_of_a_machine_has_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, rank: str, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert devices.choose_device("auto") == torch.device(wanted)


def test_ranks_of_a_machine_share_its_cores(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltatok.extract.decoding.pool.default_num_workers", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert devices.choose_num_workers(make_config(workers=None)) == 2
    assert devices.choose_num_workers(make_config(workers=3)) == 3
    assert os.environ["LOCAL_WORLD_SIZE"] == "8"
