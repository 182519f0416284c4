"""--engine ray on a cluster of this machine: the bytes of one process, whoever is killed; and what
cannot work is said before a shard is made."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from deltatok.extract.shard_queue import ShardQueue
from deltatok.pipeline.commands.extract import main as extract
from deltatok.shards import DeltatokError
from deltatok.shards.files import sha256_file
from deltatok.shards.records import DoneRecord, done_shards
from deltatok.shards.running.interrupts import StopRequest

ray: Any = pytest.importorskip("ray", reason="an extra: pip install deltatok[ray]")

from ray.cluster_utils import Cluster  # noqa: E402

from deltatok.pipeline.fleet import driver  # noqa: E402
from deltatok.pipeline.fleet.options import FleetOptions, Share  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

Fails = Callable[..., None]
STORE_BYTES = 80 * 2**20


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster whose head has no CPUs, and whose two nodes have one each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        yield cluster.address
        cluster.shutdown()


@pytest.fixture
def words(tiny_inputs: Path) -> list[str]:
    """Flags of an extraction of twelve shards."""
    return [
        *["--videos", str(tiny_inputs / "world"), "--backbone", str(tiny_inputs / "backbone")],
        *["--frame-size", "32", "--frames-per-shard", "1", "--windows", "24", "--workers", "1"],
    ]


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timings.jsonl"
    }


def kill_an_actor(done: Callable[[], bool]) -> threading.Thread:
    """Kills one as soon as there is reason to."""

    def kill() -> None:
        while not done():
            time.sleep(0.02)
        processes = psutil.Process().children(recursive=True)
        actors = [p for p in processes if "ShardServer" in " ".join(p.cmdline())]
        os.kill(actors[0].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def test_bytes_of_one_process_though_an_actor_is_killed(
    words: list[str], address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert extract([*words, "--out", str(tmp_path / "one")]) == 0
    out = tmp_path / "ray"
    killed = kill_an_actor(lambda: out.exists() and len(list(done_shards(out))) > 0)
    code = extract([*words, "--out", str(out), "--engine", "ray", "--ray-address", address])
    assert code == 0, capfd.readouterr().err
    killed.join()
    assert digests(out) == digests(tmp_path / "one")


def test_a_stop_leaves_what_is_done(words: list[str], address: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = [*words, "--out", str(out), "--engine", "ray", "--ray-address", address]

    def stop() -> None:
        while not (out.exists() and list(done_shards(out))):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    assert extract(flags) == 75
    thread.join()
    num_done = len(list(done_shards(out)))
    assert num_done >= 1
    assert not list(out.rglob("*.partial-*"))
    assert extract(flags) == 0


def test_what_cannot_work_is_said_before_the_first_shard(
    words: list[str],
    address: str,
    tmp_path: Path,
    fails: Fails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    flags = [*words, "--out", str(out), "--engine", "ray", "--ray-address"]
    fails(extract, [*flags, "127.0.0.1:1"], 2, "no cluster answers at 127.0.0.1:1")
    fails(extract, [*flags, "nonsense"], 2, "no cluster answers at nonsense")
    fails(extract, [*flags, address, "--actors", "3"], 2, "room for 2 actors", "wanted 3")
    fails(extract, [*flags, address, "--gpus-per-actor", "1"], 2, "room for 0 actors of 1 GPUs")
    monkeypatch.setattr(driver, "sees", lambda probe: False)
    fails(extract, [*flags, address], 2, f"out: {out} is not the same folder everywhere")
    assert not list(out.iterdir())


class Deadly:
    """A job whose shard 3 kills the process."""

    def open(self, stop: StopRequest) -> int:
        return 2

    def make(self, queue: ShardQueue[str], when_done: Callable[[DoneRecord], None]) -> None:
        for shard, _ in queue.shards():
            if shard == 3:
                os._exit(11)
            when_done(DoneRecord(shard=shard, clips=0, keys_sha256="", rows=0))

    def seconds(self) -> Mapping[str, float]:
        return {}

    def clip_keys(self, items: Sequence[str]) -> list[str]:
        return list(items)


def test_a_shard_that_kills_its_actors_ends_the_run_by_name(address: str, tmp_path: Path) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    stop, made = StopRequest(), []
    with driver.connected(FleetOptions(ray_address=address)):
        share = Share(gpus=0, cpus=1, actors=2)
        with driver.Fleet(Deadly(), tmp_path / "out", share, driver.node_resources()) as fleet:
            fleet.open(stop)
            shards = {shard: [f"clip-{shard}", f"other-{shard}"] for shard in range(6)}
            text = "shard 000003: 4 actors died .* its clips: clip-3, other-3"
            with pytest.raises(DeltatokError, match=text):
                fleet.make(
                    shards,
                    stop,
                    when_done=lambda record: made.append(record.shard),
                    when_spent=lambda stage, seconds: None,
                    when_actors=lambda number: None,
                )
    assert set(made) >= {0, 1, 2}
    assert 3 not in made
