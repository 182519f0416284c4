"""Run as a program by test_shared_run.py: several extractions of one folder at once.

    python shared_run.py CONFIG.json PROCESSES

The first process is killed when its first shard is written, but not yet in place; the others start
once it has taken that shard. Prints the shards that each process made and its exit status, as JSON.
Processes are forked: torch is imported only once.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from deltatok.extract import making
from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.run import run_extraction
from deltatok.shards import records as publishing

LIMIT_S = 120


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def start(config: ExtractConfig, backbone: Backbone, *, to_be_killed: bool, log: Path) -> int:
    """The process number of a child that extracts and appends the shards it made to `log`."""
    child = os.fork()
    if child:
        return child
    signal.alarm(LIMIT_S)
    tqdm.set_lock(threading.RLock())  # a fork would share its lock with the killed one
    if to_be_killed:
        publishing.publish = die
    append_timing = making.append_timing

    def note(folder: Path, timing: dict[str, Any]) -> None:
        with log.open("a") as file:
            file.write(f"{timing['shard']}\n")
        append_timing(folder, timing)

    making.append_timing = note  # type: ignore[assignment]
    run_extraction(config, backbone=backbone)
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = ExtractConfig(**json.loads(Path(sys.argv[1]).read_text()))
    backbone = Backbone.load(config.backbone)
    logs = [Path(sys.argv[1]).with_name(f"made-{index}") for index in range(int(sys.argv[2]))]
    children = [start(config, backbone, to_be_killed=True, log=logs[0])]
    deadline_s = time.monotonic() + LIMIT_S
    leases = Path(config.out) / "leases"
    while not (leases.is_dir() and any(leases.iterdir())) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    children += [start(config, backbone, to_be_killed=False, log=log) for log in logs[1:]]
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    made = [log.read_text().split() if log.exists() else [] for log in logs]
    print(json.dumps({"ends": ends, "made": [[int(shard) for shard in part] for part in made]}))
