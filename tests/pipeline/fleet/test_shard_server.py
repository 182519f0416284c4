"""What an actor does, without Ray: real shards, given one by one, are those of one process."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from deltatok.extract.run import begin, run_extraction
from deltatok.extract.shard_queue import ShardQueue
from deltatok.extract.sources.select import clips_of
from deltatok.pipeline.commands.extract import VideosConfig
from deltatok.pipeline.fleet import shard_server
from deltatok.pipeline.fleet.jobs import Extraction
from deltatok.pipeline.fleet.shard_server import ShardServer, sees
from deltatok.shards import DeltatokError
from deltatok.shards.files import sha256_file
from deltatok.shards.records import DoneRecord, done_shards
from deltatok.shards.running.interrupts import StopRequest
from deltatok.shards.running.parts import Part


class Sleeper:
    """A job whose shards take as many seconds as they have items; 13 cannot be made, 14 not even
    be tried."""

    def open(self, stop: StopRequest) -> int:
        self.stop = stop
        return 2

    def make(self, queue: ShardQueue[int], when_done: Callable[[DoneRecord], None]) -> None:
        for shard, items in queue.shards():
            if shard == 13:
                raise DeltatokError("disk full")
            if shard == 14:
                raise RuntimeError("a bug")
            for _ in items:
                self.stop.check()
                time.sleep(0.02)
            when_done(DoneRecord(shard=shard, clips=0, keys_sha256="", rows=0))

    def seconds(self) -> Mapping[str, float]:
        return {"sleep": 1.0}

    def clip_keys(self, items: Sequence[Any]) -> list[str]:
        return []


@pytest.fixture
def server(tmp_path: Path) -> ShardServer:
    server = ShardServer(Sleeper())
    (tmp_path / "probe").touch()
    assert server.open(str(tmp_path), tmp_path / "probe").limit == 2
    return server


def test_says_what_is_done_and_where_the_time_went(server: ShardServer) -> None:
    report = server.work([(4, [1]), (5, [1])])
    done = [record.shard for record in report.done]
    while len(done) < 2:
        report = server.work([])
        done += [record.shard for record in report.done]
    assert done == [4, 5]
    assert set(report.seconds) == {"sleep", "wait for shards"}
    server.close()


def test_an_error_of_ours_is_told_and_any_other_raised(server: ShardServer) -> None:
    error = server.work([(13, [])]).error
    assert str(error) == "disk full"
    other = ShardServer(Sleeper())
    other._job.open(StopRequest())
    other._thread.start()
    with pytest.raises(RuntimeError, match="a bug"):
        other.work([(14, [])])


def test_close_abandons_the_shard_at_hand(server: ShardServer) -> None:
    threading.Timer(0.1, server.close).start()
    assert server.work([(1, [0] * 1000)]).done == []
    server.close()
    assert not server._thread.is_alive()


def test_a_folder_that_is_another_one_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_server, "SHARED_WITHIN_S", 0.0)
    assert not sees(tmp_path / "probe")
    opened = ShardServer(Sleeper()).open(str(tmp_path), tmp_path / "probe")
    assert "is not the same folder everywhere" in str(opened.error)
    assert opened.error is not None
    assert opened.error.exit_code == 2


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_shards_given_one_by_one_are_those_of_one_process(
    tiny_inputs: Path,
    tmp_path: Path,
    dtype: Any,
) -> None:
    """With one at a time the queue runs dry within every shard, so that decoding begins anew."""
    config = VideosConfig(
        videos=(str(tiny_inputs / "world" / "train"),),
        out=str(tmp_path / "out"),
        backbone=str(tiny_inputs / "backbone"),
        frame_size=32,
        frames_per_shard=32,
        workers=1,
        dtype=dtype,
    )
    clips = clips_of(config)
    server = ShardServer(Extraction(config=config, policy=config.sampling_policy(), sample=clips))
    (tmp_path / "out").mkdir()
    probe = tmp_path / "out" / "probe.partial-1-00000000"
    probe.touch()
    opened = server.open(str(tmp_path), probe)
    assert opened.error is None
    assert opened.limit >= 2
    _, shards = begin(config, clips, Part())
    assert len(shards) == 3
    for number, items in reversed(shards.items()):
        done = server.work([(number, items)]).done
        while not done:
            done = server.work([]).done
        assert [record.shard for record in done] == [number]
    server.close()
    assert sorted(done_shards(tmp_path / "out")) == [0, 1, 2]
    whole = VideosConfig(**{**vars(config), "out": str(tmp_path / "whole")})
    run_extraction(whole)
    made, wanted = (_digests(tmp_path / name / "shards") for name in ("out", "whole"))
    assert wanted
    assert made == wanted


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
