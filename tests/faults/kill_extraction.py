"""Kill extractions of one folder with SIGKILL, over and over, and compare with an undisturbed one:

    python tests/faults/kill_extraction.py --kills 200 --videos PATH... --folder F [--json FILE]

--processes processes work on a folder at once, each on its part, by its rank; a random one of them
is killed and started again, until the folder is finished; then the next folder, until there were
--kills kills. Every --alike-th folder is worked on by processes without ranks, as if somebody had
started the same command several times. Half of the kills come at a random moment, half as soon as
something is seen that is being written: a partial shard, a partial record or list, a shard whose
record is not there yet.

Every finished folder must hold the same bytes as the undisturbed one (timings.jsonl, which tells
the clock, excepted), and with ranks no shard made twice. Prints figures as JSON; exits with 1 if a
folder differs. Without --backbone and --videos a tiny random one and little clips are made.
The processes are forked from this one, so that torch is imported only once.
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
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from kill_and_resume import digest
from tqdm import tqdm

from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.run import run_extraction
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
from deltatok.pipeline.little_world.files import make_little_world
from deltatok.pipeline.little_world.simulation import LittleWorldConfig
from deltatok.shards import DeltatokError, Stopped
from deltatok.shards.records import done_shards
from deltatok.shards.tools.verify import verify_cache

LIMIT_S = 600.0
"""No folder takes longer than this (a guess)."""


def unpromised(out: Path) -> int:
    """Shards that are in place without a done-record."""
    found = set(names(out / "shards"))
    return sum(
        name.endswith((".zarr.zip", ".tar")) and f"{name[:6]}.json" not in found for name in found
    )


SIGHTS: dict[str, Callable[[Path], int]] = {
    "a partial shard": lambda out: sum(".zarr.zip.partial-" in n for n in names(out / "shards")),
    "a partial record": lambda out: sum(".json.partial-" in n for n in names(out / "shards")),
    "a partial list": lambda out: sum(".partial-" in name for name in names(out)),
    "a shard without record": unpromised,
}


def names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


@dataclass
class Figures:
    """What is printed at the end."""

    kills: int = 0
    kills_by_moment: Counter[str] = field(default_factory=Counter)
    kills_that_left_partials: int = 0
    shards_done_at_kills: list[int] = field(default_factory=list)
    processes_that_ended_well: int = 0
    folders: int = 0
    folders_equal: int = 0
    folders_without_ranks: int = 0
    shards_made_twice: int = 0
    problems: list[str] = field(default_factory=list)


def start(
    config: ExtractConfig, backbone: Backbone, *, log: Path, environment: Mapping[str, str]
) -> int:
    """The number of a new process that extracts, and writes what it says to `log`."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(written, 1)
        os.dup2(written, 2)
        signal.alarm(int(LIMIT_S))
        tqdm.set_lock(threading.RLock())  # a fork would share its lock with killed ones
        os.environ |= environment
        run_extraction(config, backbone=backbone)
        status = 0
    except (DeltatokError, Stopped) as error:
        logging.error("process %d: %s", os.getpid(), error)
        status = error.exit_code
    except BaseException:
        logging.exception("process %d", os.getpid())
    finally:
        os._exit(status)


class Driver:
    """Starts and kills processes on one folder after the other."""

    def __init__(self, config: ExtractConfig, backbone: Backbone, arguments: Any) -> None:
        self.config, self.backbone = config, backbone
        self.folder: Path = arguments.folder
        self.max_kills: int = arguments.kills
        self.num_processes: int = arguments.processes
        self.alike: int = arguments.alike
        self.rng = random.Random(arguments.seed)
        self.whole_s = 0.0
        self.figures = Figures()
        self.has_ranks = True
        self.running: dict[int, int] = {}
        """Process -> its rank."""

    def start(self, out: Path, rank: int = 0, num_ranks: int = 1) -> int:
        """The number of a new process that extracts its part into `out`."""
        return start(
            replace(self.config, out=str(out)),
            self.backbone,
            log=self.folder / f"{out.name}.log",
            environment={"RANK": str(rank), "WORLD_SIZE": str(num_ranks)},
        )

    def undisturbed(self) -> Path:
        """A folder made by one process in one go."""
        out = self.folder / "undisturbed"
        start_s = time.monotonic()
        status = os.waitstatus_to_exitcode(os.waitpid(self.start(out), 0)[1])
        self.whole_s = time.monotonic() - start_s
        if status != 0:
            sys.exit(f"the undisturbed run ended with {status}: see {out}.log")
        return out

    def disturbed(self, out: Path) -> None:
        """A folder whose processes are killed until it is finished all the same."""
        self.has_ranks = not self.alike or (self.figures.folders + 1) % self.alike != 0
        num_ranks = self.num_processes if self.has_ranks else 1
        wanted = set(range(self.num_processes))
        deadline_s = time.monotonic() + LIMIT_S
        while wanted and time.monotonic() < deadline_s and not self.figures.problems:
            for rank in wanted.difference(self.running.values()):
                self.running[self.start(out, rank % num_ranks, num_ranks)] = rank
            moment = None
            if self.figures.kills < self.max_kills:
                moment = self.watch(out, wanted)
            else:
                self.wait(out, wanted, until=lambda: False)
            if moment is not None and self.running:
                self.kill(self.rng.choice([*self.running]), out, moment, wanted)
        for child in self.running:  # out of time
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            self.figures.problems.append(f"{out.name}: not finished after {LIMIT_S:.0f} s")
        self.running.clear()

    def watch(self, out: Path, wanted: set[int]) -> str:
        """Returns at the next moment to kill somebody; gives what was seen, or "any"."""
        moment = self.rng.choice(["any"] * len(SIGHTS) + [*SIGHTS])
        end_s = time.monotonic() + self.rng.uniform(0, self.whole_s)
        if moment == "any":
            self.wait(out, wanted, until=lambda: time.monotonic() >= end_s)
            return moment
        sight, end_s = SIGHTS[moment], end_s + self.whole_s
        before = sight(out)
        self.wait(out, wanted, until=lambda: sight(out) > before or time.monotonic() >= end_s)
        return moment if sight(out) > before else "any"

    def kill(self, child: int, out: Path, moment: str, wanted: set[int]) -> None:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            self.note_end(child, status, out, wanted)
            return
        del self.running[child]
        self.figures.kills += 1
        self.figures.kills_by_moment[moment] += 1
        self.figures.shards_done_at_kills.append(len(done_shards(out)))
        ours = [n for n in names(out) + names(out / "shards") if f".partial-{child}-" in n]
        self.figures.kills_that_left_partials += bool(ours)

    def wait(self, out: Path, wanted: set[int], *, until: Callable[[], bool]) -> None:
        """Returns when `until` says so, or when all processes have ended."""
        while self.running and not until():
            for child in list(self.running):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    self.note_end(child, status, out, wanted)
            time.sleep(0.0002)

    def note_end(self, child: int, status: int, out: Path, wanted: set[int]) -> None:
        """One process less; `wanted`: ranks that have their part to make yet."""
        code = os.waitstatus_to_exitcode(status)
        wanted.discard(self.running.pop(child))
        self.figures.processes_that_ended_well += code == 0
        if code != 0:
            self.figures.problems.append(f"{out.name}: process {child} ended with {code}")

    def compare(self, out: Path, wanted: str) -> None:
        self.figures.folders += 1
        equal = digest(out) == wanted
        self.figures.folders_equal += equal
        self.figures.problems += [] if equal else [f"{out.name}: differs from undisturbed"]
        self.figures.problems += map(str, verify_cache(out, deep=True).problems)
        lines = (out / "timings.jsonl").read_text().splitlines()
        made = Counter(json.loads(line)["shard"] for line in lines)
        twice = sum(count - 1 for count in made.values())
        if self.has_ranks:
            self.figures.shards_made_twice += twice
            self.figures.problems += [f"{out.name}: {twice} shards made twice"] if twice else []
        else:
            self.figures.folders_without_ranks += 1


def main() -> int:
    """Run the comparison; 0 if all folders are equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2, help="ranks of a folder")
    parser.add_argument("--alike", type=int, default=3, help="0: all folders with ranks")
    parser.add_argument("--videos", nargs="+", default=None)
    parser.add_argument("--backbone", default=None)
    parser.add_argument("--frame-size", type=int, default=64)
    parser.add_argument("--frames-per-shard", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="new or empty")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # before anything: a pool of threads does not survive a fork
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tiny = TinyBackboneConfig(out=str(arguments.folder / "backbone"))
    config = ExtractConfig(
        videos=tuple(arguments.videos or [little_clips(arguments.folder)]),
        out=str(arguments.folder / "undisturbed"),
        backbone=arguments.backbone or str(make_tiny_backbone(tiny)),
        frame_size=arguments.frame_size,
        frames_per_shard=arguments.frames_per_shard,
        batch_frames=16,
        num_windows=2,
        workers=1,
        max_quarantined=1.0,
    )
    driver = Driver(config, Backbone.load(config.backbone), arguments)
    wanted = digest(driver.undisturbed())
    start_s = time.monotonic()
    figures = driver.figures
    while figures.kills < arguments.kills and not figures.problems:
        out = arguments.folder / f"killed-{figures.folders}"
        driver.disturbed(out)
        driver.compare(out, wanted)
    shown = {
        **vars(figures),
        "shards": len(done_shards(arguments.folder / "undisturbed")),
        "undisturbed_s": round(driver.whole_s, 2),
        "seconds": round(time.monotonic() - start_s, 1),
        "equal": not figures.problems,
    }
    text = json.dumps(shown, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(f"{text}\n")
    return 0 if not figures.problems else 1


def little_clips(folder: Path) -> str:
    """Some clips of the little world, and one file that is no video."""
    config = LittleWorldConfig(
        out=str(folder / "world"), num_train_clips=10, num_head_clips=1, num_val_clips=1
    )
    clips = make_little_world(config) / "train"
    (clips / "broken.mp4").write_bytes(b"this is no video")
    return str(clips)


if __name__ == "__main__":
    sys.exit(main())
