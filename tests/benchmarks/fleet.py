"""Throughput of `deltatok-extract --engine ray` with one and two actors against one process, on the
same cores:

    python tests/benchmarks/fleet.py --clips 200 --folder F [--json FILE]

Contestants: one process; an actor with all cores; two actors with half of them each. Each has as
many decoding processes and threads as cores. They take turns, --rounds times, every other round in
reverse. frames/s are those of the command's own progress line: of the loop, without the start of
Ray and of the processes; `seconds` is the whole command. Needs the extra deltatok[ray] and an even
number of cores. The backbone has random weights: of the size of a ViT-S/16 unless --hidden-size and
--layers say otherwise.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
from deltatok.pipeline.little_world.files import make_little_world
from deltatok.pipeline.little_world.simulation import LittleWorldConfig
from deltatok.shards.running.devices import num_cores

COMMAND = (sys.executable, "-P", "-m", "deltatok.pipeline.commands.extract")
RATE = re.compile(r"([0-9.]+) frames/s")


def main() -> int:
    """Run all; 0 if every run ended well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--frame-size", type=int, default=128)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder, cores = arguments.folder.absolute(), num_cores()
    words = inputs(folder, arguments)
    on_ray = ["--engine", "ray", "--actors"]
    contestants = {
        "one process": [],
        "1 actor": [*on_ray, "1", "--cpus-per-actor", str(cores)],
        "2 actors": [*on_ray, "2", "--cpus-per-actor", str(cores // 2)],
    }
    runs: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            out = folder / f"{name.replace(' ', '-')}-{number}"
            runs.append(
                {"contestant": name, **run([*words, "--out", str(out), *contestants[name]])}
            )
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    rates = {
        name: median(run["frames_per_s"] for run in runs if run["contestant"] == name)
        for name in contestants
    }
    figures = {
        "cores": cores,
        "clips": arguments.clips,
        "frames_per_s": rates,
        "over_one_process": {
            name: round(rate / rates["one process"], 3) for name, rate in rates.items()
        },
        "runs": runs,
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(f"{text}\n")
    return 0


def run(words: list[str]) -> dict[str, float]:
    """What the command says of itself, and how long it took."""
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("OMP_NUM_THREADS", None)  # torch: a thread a core; Ray: one a core of the actor
    start_s = time.monotonic()
    process = subprocess.run(
        [*COMMAND, *words], env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    if process.returncode:
        sys.exit(f"ended with {process.returncode}: {process.stderr[-2000:]}")
    return {
        "frames_per_s": float(RATE.findall(process.stderr)[-1]),
        "seconds": round(time.monotonic() - start_s, 1),
    }


def inputs(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Makes clips and a backbone, where they are not there; the flags that name them."""
    world, backbone, size = folder / "world", folder / "backbone", arguments.frame_size
    if not world.exists():
        make_little_world(
            LittleWorldConfig(
                out=str(world),
                num_train_clips=arguments.clips,
                num_head_clips=0,
                num_val_clips=1,
                frame_size=size,
            )
        )
    if not backbone.exists():
        make_tiny_backbone(
            TinyBackboneConfig(
                out=str(backbone),
                hidden_size=arguments.hidden_size,
                num_hidden_layers=arguments.layers,
                num_attention_heads=arguments.hidden_size // 64,
            )
        )
    words = ["--videos", str(world / "train"), "--backbone", str(backbone)]
    words += ["--limit", str(arguments.clips)]
    return [*words, "--frame-size", str(size), "--frames-per-shard", "128"]


if __name__ == "__main__":
    sys.exit(main())
