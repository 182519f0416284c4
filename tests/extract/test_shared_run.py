"""Processes that extract into one folder make a part each, whatever becomes of one of them."""

import gc
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltatok.extract import ledger, run
from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.decoding import pool
from deltatok.extract.decoding.pool import choose_num_workers
from deltatok.extract.ledger import close_cache
from deltatok.extract.run import run_extraction
from deltatok.extract.shard_queue import ShardQueue
from deltatok.extract.shard_writer import PatchShardWriter
from deltatok.extract.sources.clip import Clip
from deltatok.shards import (
    PatchShards,
    Stopped,
    TooManyQuarantined,
    UsageError,
    read_cache_info,
)
from deltatok.shards.files import partial_path
from deltatok.shards.plan import PlanEntry
from deltatok.shards.records import done_shards
from deltatok.shards.running import devices
from deltatok.shards.running.parts import Part
from deltatok.shards.tools.verify import verify_cache

PROGRAM = Path(__file__).with_name("shared_run.py")
LAUNCHER = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_STEP_ID")

Digests = Callable[[Path], dict[str, str]]
ConfigMaker = Callable[..., ExtractConfig]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run_shared(
    run_program: Callable[..., Any], tmp_path: Path
) -> Callable[[ExtractConfig, int], dict[str, Any]]:
    def run(config: ExtractConfig, count: int) -> dict[str, Any]:
        (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
        process = run_program(PROGRAM, tmp_path / "config.json", str(count))
        assert process.returncode == 0, process.stderr
        return {**json.loads(process.stdout), "said": process.stderr}

    return run


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_of_which_one_is_killed_make_the_same_cache(
    make_config: ConfigMaker,
    backbone: Backbone,
    digests: Digests,
    run_shared: Callable[..., dict[str, Any]],
    tmp_path: Path,
    num_processes: int,
) -> None:
    config = make_config(frames_per_shard=12)  # six shards
    result = run_shared(config, num_processes)
    assert result["ends"] == [-signal.SIGKILL] + [0] * (num_processes - 1), result["said"]
    others = sorted(chain.from_iterable(result["made"]))
    assert others == [shard for shard in range(6) if shard % num_processes]  # each one once
    assert not read_cache_info(config.out).complete
    again = run_extraction(config, backbone=backbone)  # without ranks: all that is left
    assert again.shards_done_now == 6 - len(others)
    assert verify_cache(config.out, deep=True).problems == []
    alone = replace(config, out=str(tmp_path / "alone"))
    run_extraction(alone, backbone=backbone)
    assert digests(Path(config.out)) == digests(Path(alone.out))


def test_the_same_command_started_twice_does_no_harm(
    make_config: ConfigMaker,
    finished: Path,
    digests: Digests,
    run_shared: Callable[..., dict[str, Any]],
) -> None:
    config = make_config()
    result = run_shared(config, -2)
    assert result["ends"] == [0, 0], result["said"]
    assert set(chain.from_iterable(result["made"])) == {0, 1, 2}
    assert verify_cache(config.out, deep=True).problems == []
    assert digests(Path(config.out)) == digests(finished)


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_ranks_make_their_parts_and_the_last_one_closes_the_cache(
    make_config: ConfigMaker,
    backbone: Backbone,
    finished: Path,
    digests: Digests,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    names: tuple[str, str],
) -> None:
    config = make_config()
    monkeypatch.setenv(names[1], "2")
    monkeypatch.setenv(names[0], "1")
    with caplog.at_level("INFO"):
        assert run_extraction(config, backbone=backbone).shards_done_now == 1
    assert done_shards(config.out) == [1]
    assert "1 of 3 shards are done" in caplog.text
    assert "rank 0 of 2" in caplog.text
    assert not read_cache_info(config.out).complete
    monkeypatch.setenv(names[0], "0")
    assert run_extraction(config, backbone=backbone).shards_done_now == 2
    assert digests(Path(config.out)) == digests(finished)


def test_a_rank_holds_the_clips_of_its_own_shards_alone(
    make_config: ConfigMaker, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = (Clip, PlanEntry)
    before = {id(one) for one in gc.get_objects() if type(one) in kinds}
    held: list[str] = []
    own: list[str] = []

    def count(_: object, queue: ShardQueue[Clip], **__: object) -> None:
        own.extend(clip.key for _, clips in queue.shards() for clip in clips)
        there = [one for one in gc.get_objects() if type(one) in kinds]
        held.extend(one.key for one in there if id(one) not in before)

    monkeypatch.setattr(run, "make_shards", count)
    run_extraction(make_config(), backbone=backbone, part=Part(rank=1, num_ranks=2))
    assert sorted(held) == sorted(own)
    assert len(own) == 2  # of five clips in three shards


def test_who_is_not_the_last_leaves_the_share_in_quarantine_to_the_last(
    make_config: ConfigMaker, backbone: Backbone
) -> None:
    """A launcher ends all its processes when one fails: the others would never finish."""
    config = make_config(max_quarantined=0.0)
    run_extraction(replace(config, shard_of="0/2"), backbone=backbone)
    with pytest.raises(TooManyQuarantined):
        run_extraction(replace(config, shard_of="1/2"), backbone=backbone)
    assert len(PatchShards(config.out)) == 15


@pytest.mark.parametrize(
    ("shard_of", "environment", "wanted"),
    [
        (None, {}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("1/2", {}, [1, 3, 5, 7]),
        (None, {"RANK": "2", "WORLD_SIZE": "3"}, [2, 5]),
        ("1/2", {"RANK": "1", "WORLD_SIZE": "2"}, [3, 7]),
        (None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, [1, 5]),
        # torchrun, one a node, below srun
        (
            None,
            {"RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            [5],
        ),
        # srun, and a batch script, which srun did not start
        (
            None,
            {
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "4",
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_ID": "0",
            },
            [0, 4],
        ),
        (
            None,
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"},
            [0, 1, 2, 3, 4, 5, 6, 7],
        ),
    ],
)
def test_part_of_a_process(
    monkeypatch: pytest.MonkeyPatch,
    shard_of: str | None,
    environment: dict[str, str],
    wanted: list[int],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    part = Part.of_this_process(shard_of)
    assert [shard for shard in range(8) if shard in part] == wanted


@pytest.mark.parametrize("rank", ["2", "-1", "x"])
def test_rank_that_is_none_is_refused_before_anything_is_written(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=f"RANK is '{rank}'"):
        run_extraction(make_config())
    assert not Path(make_config().out).exists()


def test_what_is_left_is_said_with_who_makes_it() -> None:
    text = Part(index=1, count=4, rank=0, num_ranks=2).elsewhere([0, 3, 4, 5])
    assert "rank 1 of 2" in text
    assert "--shard-of 0/4, 3/4" in text


class _StoppingWriter(PatchShardWriter):
    """Gets SIGTERM while the first shard's features are made."""

    def convert(self, tokens: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return super().convert(tokens)


def test_partials_of_another_machine_are_gone_from_a_finished_cache(
    make_config: ConfigMaker, backbone: Backbone, finished: Path, digests: Digests
) -> None:
    config = make_config()
    with pytest.raises(Stopped):
        run_extraction(config, backbone=backbone, writer=_StoppingWriter())
    shards = Path(config.out) / "shards"
    old, fresh = (shards / f"000001.zarr.zip.partial-1-0000000{number}" for number in (0, 1))
    for partial in (old, fresh):
        partial.touch()
    long_ago = old.stat().st_mtime - 2 * ledger.STALE_AFTER_S
    os.utime(old, (long_ago, long_ago))
    run_extraction(config, backbone=backbone)
    assert not old.exists()
    fresh.unlink()  # kept: somebody may be writing it
    assert digests(Path(config.out)) == digests(finished)


def test_partials_of_living_processes_are_kept(
    make_config: ConfigMaker, backbone: Backbone, finished: Path
) -> None:
    config = make_config()
    with pytest.raises(Stopped):
        run_extraction(config, backbone=backbone, writer=_StoppingWriter())
    own = partial_path(Path(config.out) / "shards" / "000001.zarr.zip")
    living = own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-"))
    living.touch()
    run_extraction(config, backbone=backbone)
    assert living.exists()


def test_closing_a_cache_twice_changes_no_byte(
    finished: Path, digests: Digests, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for _ in range(2):
        close_cache(out, changed=True, part=Part())
        assert digests(out) == digests(finished)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_LOCALID"])
@pytest.mark.parametrize(("rank", "wanted"), [("0", "cuda:0"), ("5", "cuda:1"), ("", "cuda:0")])
def test_each_rank_of_a_machine_has_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, rank: str, wanted: str
) -> None:
    for other in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setenv(name, rank)
    assert devices.choose_device("auto") == torch.device(wanted)


def test_ranks_of_a_machine_share_its_cores(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltatok.extract.decoding.pool.num_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert choose_num_workers(make_config(workers=None)) == 2
    assert choose_num_workers(make_config(workers=3)) == 3


def test_ranks_of_a_machine_share_its_cores_also_to_fit_the_scales_of_int8(
    make_config: ConfigMaker, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def make_pool(*_: object, num_workers: int, **__: object) -> None:
        started.append(num_workers)
        raise Stopped

    monkeypatch.setattr("deltatok.extract.decoding.pool.num_cores", lambda: 16)
    monkeypatch.setattr(pool.DecodePool, "__init__", make_pool)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(Stopped):
        run_extraction(make_config(workers=None, dtype="int8"), backbone=backbone)
    assert started == [2]
