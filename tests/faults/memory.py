"""Memory of an extraction over many clips: of the process itself and of its decoding processes.

    python tests/faults/memory.py --videos PATH --clips 2000 --json FILE

Repeats the same files under other names (links in a temporary folder) until there are --clips,
extracts them through a tiny random backbone at a small frame size, and samples the memory of the
process and its children. Fits a line through the last 80 % and exits 1 if it rises faster than
--limit MB per 1,000 clips, for the process itself, or for the children on average.

Memory is what a process has for itself (RssAnon). Decoded frames on their way lie in memory that
processes share and is bounded by pool.py; the most there was of it is told apart (RssShmem).
Children come and go: pool.py replaces them after some clips, so their sum goes up and down.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from deltatok.extract.sources.find import find_clips
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
from deltatok.shards.records import iterate_done

EXTRACT = "from deltatok.pipeline.commands.extract import main; raise SystemExit(main())"
FIRST_SHARE = 0.2
"""Of the clips: before that the process still loads, and fills its buffers."""


@dataclass(frozen=True)
class Sample:
    """Memory at one moment."""

    clips: int
    """Done by then."""
    parent_mb: float
    children_mb: float
    """Of all of them together."""
    shared_mb: float
    """Decoded frames that the process itself sees."""


def main() -> int:
    """Runs the check; prints the result and writes it to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", required=True, nargs="+", help="files, folders or lists")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--clips", type=int, default=2000, help="how many [2000]")
    parser.add_argument("--frame-size", type=int, default=64, help="pixels a side [64]")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes [2]")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between samples [1]")
    parser.add_argument(
        "--limit", type=float, default=20.0, help="MB per 1,000 clips that are allowed [20]"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with TemporaryDirectory() as folder:
        result = _measure(arguments, Path(folder))
    text = json.dumps(result, indent=1)
    arguments.json.write_text(f"{text}\n")
    print(text)
    return 0 if result["flat"] else 1


def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    videos = [clip.path for clip in find_clips(arguments.videos) if clip.source is None]
    (folder / "clips").mkdir()
    for number in range(arguments.clips):
        video = videos[number % len(videos)]
        (folder / "clips" / f"{number:06d}-{video.name}").symlink_to(video)
    make_tiny_backbone(
        TinyBackboneConfig(
            out=str(folder / "backbone"), hidden_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )
    words = ["--videos", folder / "clips", "--out", folder / "cache"]
    words += ["--backbone", folder / "backbone", "--frame-size", arguments.frame_size]
    words += ["--windows", 4, "--workers", arguments.workers, "--max-quarantined", 1]
    start_s = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", EXTRACT, *map(str, words)], stdout=log, stderr=log
        )
        samples = list(_samples(process, folder / "cache", every_s=arguments.every))
    seconds = time.monotonic() - start_s
    if process.returncode != 0:
        sys.exit(f"extraction ended with {process.returncode}:\n{(folder / 'log').read_text()}")
    parent, children = _slope(samples, "parent_mb"), _slope(samples, "children_mb")
    return {
        "clips": arguments.clips,
        "seconds": seconds,
        "workers": arguments.workers,
        "samples": len(samples),
        "parent_mb": _at_shares(samples, "parent_mb"),
        "children_mb": _at_shares(samples, "children_mb"),
        "shared_mb_most": max(sample.shared_mb for sample in samples),
        "parent_mb_per_1000_clips": parent,
        "children_mb_per_1000_clips": children,
        "child_mb_per_1000_clips": children / arguments.workers,
        "limit_mb_per_1000_clips": arguments.limit,
        "flat": max(parent, children / arguments.workers) <= arguments.limit,
    }


def _samples(
    process: "subprocess.Popen[bytes]", cache: Path, *, every_s: float
) -> Iterator[Sample]:
    """Until the process ends."""
    while process.poll() is None:
        time.sleep(every_s)
        parent, shared = _memory_mb(process.pid)
        children = [_memory_mb(pid)[0] for pid in _children(process.pid)]
        if parent > 0 and children:  # not while it starts, nor while it tidies up at the end
            yield Sample(_clips_done(cache), parent, sum(children), shared)


def _clips_done(cache: Path) -> int:
    return sum(record.clips + len(record.quarantined) for record in iterate_done(cache))


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:  # the thread ended meanwhile
            continue
    return found


def _memory_mb(pid: int) -> tuple[float, float]:
    """Its own and shared memory, megabytes of 10**6 bytes; 0 of a process that ended meanwhile."""
    found = {"RssAnon": 0.0, "RssShmem": 0.0}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) * 1024 / 1e6
    return found["RssAnon"], found["RssShmem"]


def _at_shares(samples: Sequence[Sample], name: str) -> dict[str, float]:
    """At 10, 25, 50, 75 and 100 % of the clips, each the median of the samples around there."""
    values = [getattr(sample, name) for sample in samples]
    clips = np.array([sample.clips for sample in samples])
    found = {}
    for percent in (10, 25, 50, 75, 100):
        middle = int(np.searchsorted(clips, clips[-1] * percent / 100))
        around = values[max(0, middle - 10) : middle + 11] or values[-3:]
        found[f"{percent} %"] = float(np.median(around))
    return found


def _slope(samples: Sequence[Sample], name: str) -> float:
    """MB per 1,000 clips, the line of least squares through the last 80 % of the clips."""
    first = samples[-1].clips * FIRST_SHARE
    late = [sample for sample in samples if sample.clips >= first]
    clips = np.array([sample.clips for sample in late], dtype=np.float64)
    if len(late) < 3 or clips.min() == clips.max():
        sys.exit(f"{len(late)} samples are too few: wanted more clips, or a shorter --every")
    return float(np.polyfit(clips, [getattr(sample, name) for sample in late], 1)[0]) * 1000


if __name__ == "__main__":
    sys.exit(main())
