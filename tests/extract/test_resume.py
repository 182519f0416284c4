"""Killed, stopped or out of disk at any moment, a run loses nothing: again, and it is the same."""

import errno
import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from deltatok.extract import ledger
from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.run import run_extraction
from deltatok.extract.shard_writer import PatchShardWriter
from deltatok.shards import (
    CacheMismatch,
    DamagedShard,
    DeltatokError,
    PatchShards,
    Stopped,
    files,
)
from deltatok.shards.records import DoneRecord, done_shards
from deltatok.shards.windows import ShardRows

PROGRAM = Path(__file__).with_name("interrupted_run.py")

Digests = Callable[[Path], dict[str, str]]
ConfigMaker = Callable[..., ExtractConfig]


@pytest.fixture
def uninterrupted(finished: Path, digests: Digests) -> dict[str, str]:
    """The digests of a cache made in one go."""
    return digests(finished)


@pytest.mark.parametrize("moment", ["batch", "partial", "record"])
def test_killed_run_goes_on_to_the_same_bytes(
    make_config: ConfigMaker,
    backbone: Backbone,
    uninterrupted: dict[str, str],
    digests: Digests,
    run_program: Callable[..., Any],
    tmp_path: Path,
    moment: str,
) -> None:
    config = make_config()
    out = Path(config.out)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    process = run_program(PROGRAM, tmp_path / "config.json", moment)
    assert process.returncode == -signal.SIGKILL, process.stderr
    done_before = done_shards(out)
    assert done_before in ([], [0])  # killed while the second one was made or written
    with pytest.raises(CacheMismatch, match="has not finished"):
        PatchShards(out)
    assert run_extraction(config, backbone=backbone).shards_done_now == 3 - len(done_before)
    assert digests(out) == uninterrupted


def test_run_that_ended_before_the_last_step_only_does_that(
    make_config: ConfigMaker,
    backbone: Backbone,
    uninterrupted: dict[str, str],
    digests: Digests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(*_: object) -> None:
        raise KeyboardInterrupt

    config = make_config()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ledger, "finish_cache", end)
        run_extraction(config, backbone=backbone)
    assert run_extraction(config, backbone=backbone).shards_done_now == 0
    assert digests(Path(config.out)) == uninterrupted


def test_sigterm_ends_with_75_and_leaves_no_partial(
    make_config: ConfigMaker,
    backbone: Backbone,
    uninterrupted: dict[str, str],
    digests: Digests,
    run_program: Callable[..., Any],
    tmp_path: Path,
) -> None:
    config = make_config()
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    process = run_program(PROGRAM, tmp_path / "config.json", "terminate")
    assert process.returncode == 75, process.stderr
    assert "SIGTERM" in process.stderr
    assert "run again to go on" in process.stderr
    assert done_shards(config.out) == [0]
    assert not list(Path(config.out).rglob("*.partial-*"))
    run_extraction(config, backbone=backbone)
    assert digests(Path(config.out)) == uninterrupted


class _StoppingWriter(PatchShardWriter):
    """Gets SIGTERM while the first shard's features are made."""

    def convert(self, tokens: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return super().convert(tokens)


def test_stopped_run_restores_the_signal_handlers(
    make_config: ConfigMaker, backbone: Backbone
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped):
        run_extraction(make_config(), backbone=backbone, writer=_StoppingWriter())
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


class _FailingWriter(PatchShardWriter):
    """The disk is full after the first shard."""

    def write(self, folder: Path, shard: int, rows: ShardRows) -> DoneRecord:
        if shard > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(folder, shard, rows)


def test_full_disk_stops_cleanly_and_goes_on(
    make_config: ConfigMaker, backbone: Backbone, uninterrupted: dict[str, str], digests: Digests
) -> None:
    config = make_config()
    with pytest.raises(DeltatokError, match=r"No space left on device.*make room .*run again"):
        run_extraction(config, backbone=backbone, writer=_FailingWriter())
    assert done_shards(config.out) == [0]
    run_extraction(config, backbone=backbone)
    assert digests(Path(config.out)) == uninterrupted


def test_nearly_full_disk_is_seen_before_the_shard_is_written(
    make_config: ConfigMaker, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(min_free="0")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DeltatokError, match=r"shard 00000\d takes .* GB, there are 1e-06 GB left"):
        run_extraction(config, backbone=backbone)
    assert not list((Path(config.out) / "shards").iterdir())


def test_an_unfinished_plan_is_followed_even_if_shards_would_be_cut_differently(
    make_config: ConfigMaker, backbone: Backbone, uninterrupted: dict[str, str], digests: Digests
) -> None:
    config = make_config()
    with pytest.raises(Stopped):
        run_extraction(config, backbone=backbone, writer=_StoppingWriter())
    run_extraction(make_config(frames_per_shard=1000), backbone=backbone)
    assert digests(Path(config.out)) == uninterrupted


def test_a_shard_without_done_record_is_made_again(
    make_config: ConfigMaker, backbone: Backbone, uninterrupted: dict[str, str], digests: Digests
) -> None:
    config = make_config()
    run_extraction(config, backbone=backbone)
    shard = Path(config.out) / "shards" / "000001.zarr.zip"
    shard.write_bytes(b"")
    (Path(config.out) / "shards" / "000001.json").unlink()
    assert run_extraction(config, backbone=backbone).shards_done_now == 1
    assert digests(Path(config.out)) == uninterrupted


def test_shards_of_another_plan_are_refused(make_config: ConfigMaker, backbone: Backbone) -> None:
    config = make_config()
    run_extraction(config, backbone=backbone)
    (Path(config.out) / "plan.json").unlink()
    with pytest.raises(DamagedShard, match="made of other clips"):
        run_extraction(make_config(frames_per_shard=1), backbone=backbone)
