"""`deltatok-extract --engine ray` on a cluster of three nodes on this machine, disturbed, against
one process: every cache must hold the same bytes.

    python tests/faults/kill_actors.py --runs 5 --kills 4 --folder F [--json FILE]

Runs: each kind of work undisturbed (patch tokens, int8, fused, delta encoding); a node taken away,
without grace, once a third of the shards is done; then --runs runs, with a node in its place, in
which a random actor is killed with SIGKILL --kills times, at random moments. The head has no CPUs,
two nodes have one each. Needs the extra deltatok[ray]. Prints figures as JSON; exits with 1 if a
cache differs or a run fails.
"""

import argparse
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import psutil
from kill_and_resume import digest
from ray.cluster_utils import Cluster

from deltatok.pipeline.commands.extract import main as extract
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
from deltatok.pipeline.little_world.files import make_little_world
from deltatok.pipeline.little_world.simulation import LittleWorldConfig
from deltatok.shards.records import done_shards
from deltatok.train.models.configs import DeltaTokConfig
from deltatok.train.models.deltatok import DeltaTok

STORE_BYTES = 80 * 2**20
FRAME_SIZE = 64
SHARD_FRAMES = 64
"""Two clips."""


class Machines:
    """A cluster on this machine, a node of which can be taken away."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.add(), self.add()]

    def add(self) -> Any:
        """One more node of one CPU."""
        return self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    def take_one_away(self) -> None:
        """One node less, without grace."""
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)


def actors() -> list[psutil.Process]:
    """The processes of actors that live on this machine below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ShardServer" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class KillActors:
    """Kills a random actor at random moments, of those that make shards and those that start. A
    shard or more is done between two kills, so that not the same one is always lost."""

    def __init__(self, out: Path, kills: int, rng: random.Random, mean_s: float) -> None:
        self._out, self._wanted, self._rng, self._mean_s = out, kills, rng, mean_s
        self.shards_done_at_kills: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        before = 0
        while len(self.shards_done_at_kills) < self._wanted:
            if self._ended.wait(self._rng.expovariate(1 / self._mean_s)):
                return
            num_done = len(list(done_shards(self._out))) if self._out.exists() else 0
            living = actors() if num_done > before else []
            if living:
                os.kill(self._rng.choice(living).pid, signal.SIGKILL)
                self.shards_done_at_kills.append(num_done)
                before = num_done

    def end(self) -> None:
        """No more kills."""
        self._ended.set()
        self._thread.join()


def when(condition: Callable[[], bool], action: Callable[[], None]) -> threading.Thread:
    """Does `action` in a thread once there is reason to."""

    def wait() -> None:
        while not condition():
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def main() -> int:
    """Run all; 0 if every cache is equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--mean-s", type=float, default=0.5, help="mean time between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rng, folder = random.Random(arguments.seed), arguments.folder.absolute()
    words = inputs(folder, num_clips=arguments.clips)
    machines = Machines()
    on_ray = ["--engine", "ray", "--ray-address", machines.cluster.address]
    figures: dict[str, Any] = {"nodes": 3, "clips": arguments.clips, "runs": []}

    def run(name: str, kind: str, **facts: Any) -> None:
        start_s = time.monotonic()
        out = folder / name
        code = extract([*words[kind], "--out", str(out), *on_ray])
        equal = code == 0 and digest(out) == digest(folder / f"one-{kind}")
        seconds = round(time.monotonic() - start_s, 1)
        figures["runs"].append(
            {"run": name, "exit": code, "equal": equal, "seconds": seconds, **facts}
        )
        print(json.dumps(figures["runs"][-1]), file=sys.stderr, flush=True)

    for kind in words:
        if extract([*words[kind], "--out", str(folder / f"one-{kind}")]):
            return 1
        figures["shards"] = len(list(done_shards(folder / f"one-{kind}")))
        run(f"ray-{kind}", kind)
    out = folder / "node"
    third = figures["shards"] // 3
    taking = when(
        lambda: out.exists() and len(list(done_shards(out))) >= third, machines.take_one_away
    )
    run("node", "patches", node_taken_away_at_shard=third)
    taking.join()
    machines.nodes.append(machines.add())
    for number in range(arguments.runs):
        killer = KillActors(folder / f"kills-{number}", arguments.kills, rng, arguments.mean_s)
        facts: dict[str, Any] = {"shards_done_at_kills": killer.shards_done_at_kills}
        run(f"kills-{number}", "patches", **facts)
        killer.end()
    figures["kills"] = sum(len(r.get("shards_done_at_kills", ())) for r in figures["runs"])
    figures["equal"] = all(run["equal"] for run in figures["runs"])
    machines.cluster.shutdown()
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(f"{text}\n")
    return 0 if figures["equal"] else 1


def inputs(folder: Path, *, num_clips: int) -> dict[str, list[str]]:
    """Makes clips and models; kind of work -> its flags."""
    make_little_world(
        LittleWorldConfig(
            out=str(folder / "world"),
            num_train_clips=num_clips,
            num_head_clips=0,
            num_val_clips=1,
            frame_size=FRAME_SIZE,
        )
    )
    backbone = TinyBackboneConfig(
        out=str(folder / "backbone"), hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    make_tiny_backbone(backbone)
    model = DeltaTokConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    DeltaTok(model).save_pretrained(folder / "tokenizer", {})
    videos = ["--videos", str(folder / "world" / "train"), "--backbone", backbone.out]
    videos += ["--frame-size", str(FRAME_SIZE), "--frames-per-shard", str(SHARD_FRAMES)]
    videos += ["--workers", "1"]
    tokenizer = ["--tokenizer", str(folder / "tokenizer")]
    return {
        "patches": videos,
        "int8": [*videos, "--dtype", "int8"],
        "fused": [*videos, *tokenizer],
        "deltas": ["--patches", str(folder / "one-patches"), *tokenizer],
    }


if __name__ == "__main__":
    logging.getLogger("ray").setLevel(logging.ERROR)
    sys.exit(main())
