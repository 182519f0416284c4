"""Run as a program by test_shared_run.py: several extractions of one folder at once.

    python shared_run.py CONFIG.json PROCESSES

Each process has its rank, as a launcher sets it; with PROCESSES negative none has one, as if
somebody started the same command so often. Rank 0 is killed when its first shard is written, but
not yet in place. Prints the shards that each process made and its exit status, as JSON. Processes
are forked: torch is imported only once.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from deltatok.extract import run
from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.shards import records as publishing

LIMIT_S = 120


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def start(config: ExtractConfig, backbone: Backbone, *, ranks: tuple[int, int], log: Path) -> int:
    """The process number of a child that extracts and appends the shards it made to `log`."""
    child = os.fork()
    if child:
        return child
    signal.alarm(LIMIT_S)
    tqdm.set_lock(threading.RLock())  # a fork would share its lock with the killed one
    rank, num_ranks = ranks
    if num_ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        if rank == 0:
            publishing.publish = die
    append_timing = run.append_timing

    def note(folder: Path, timing: dict[str, Any]) -> None:
        with log.open("a") as file:
            file.write(f"{timing['shard']}\n")
        append_timing(folder, timing)

    run.append_timing = note  # type: ignore[assignment]
    run.run_extraction(config, backbone=backbone)
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = ExtractConfig(**json.loads(Path(sys.argv[1]).read_text()))
    backbone = Backbone.load(config.backbone)
    count = int(sys.argv[2])
    logs = [Path(sys.argv[1]).with_name(f"made-{rank}") for rank in range(abs(count))]
    children = [
        start(config, backbone, ranks=(rank, count), log=log) for rank, log in enumerate(logs)
    ]
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    made = [log.read_text().split() if log.exists() else [] for log in logs]
    print(json.dumps({"ends": ends, "made": [[int(shard) for shard in part] for part in made]}))
