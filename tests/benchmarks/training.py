"""Training from caches beside training on the fly, and what is left of a step's time.

    python tests/benchmarks/training.py --json FILE

Random weights, tokens and pixels of the released sizes; the cached paths run through the real
trainers, on caches the real writers made. Goals: flops_ratio and seconds_ratio >= 20 (on the fly
over cached, a window), selection_speedup >= 1.5 (K = 256, exact), loader_wait_share < 0.05,
tokenizer_over_memory >= 0.95, schedule_gpu_hours <= 24 (on an H200). Ratios of one run, what is
compared taking turns.

JSON: flops_ratio, seconds_ratio, selection_speedup, selection_agreement, selection_regret (the
lower precision's), loader_wait_share, tokenizer_over_memory, schedule_gpu_hours (null without a
GPU), device, and under `parts` what they are made of.
"""

import argparse
import json
import logging
import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import selection
import torch
from loaders import make_deltas, make_patches
from on_the_fly import OnTheFly
from trainer_runs import tokenizer_rate, world_rate

from deltatok.evaluate.flops import FlopsConfig, flops_rows
from deltatok.evaluate.tables import markdown_table

SCHEDULE_WINDOWS = 305_000 * 1024
"""Released schedule: 300,000 steps and a cooldown of 5,000, batch 1,024 (PAPER.md)."""
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}


def main() -> None:
    """Runs the benchmark; prints a table and writes --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--folder", type=Path, help="where the caches are made [the system's]")
    parser.add_argument("--frame-size", type=int, default=512, help="pixels a side [512]")
    parser.add_argument("--windows", type=int, help="windows a step of (a) [cpu 4, cuda 1024]")
    parser.add_argument("--rounds", type=int, default=3, help="turns of what is compared [3]")
    parser.add_argument("--tokenizer-layers", type=int, help="blocks in (d) [cpu 2, cuda 12]")
    parser.add_argument("--compile", action="store_true", help="torch.compile the trained models")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with TemporaryDirectory(dir=arguments.folder) as name:
        result = _measure(Path(name), arguments, device)
    arguments.json.write_text(f"{json.dumps(result, indent=1)}\n")
    print(table(result))


def _measure(folder: Path, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    windows = arguments.windows or (1024 if device.type == "cuda" else 4)
    parts: dict[str, Any] = {"tflop_per_s_of_products": products_rate(device)}
    deltas = make_deltas(folder / "deltas", max(4096, 2 * windows), 4096)
    on_the_fly = OnTheFly(folder, frame_size=arguments.frame_size, device=device)
    cached, direct = [], []
    for step in range(arguments.rounds):
        cached.append(
            world_rate(
                deltas, folder / f"world-{step}", batch_size=windows, compiled=arguments.compile
            )
        )
        direct.append(on_the_fly.seconds_per_window(1 if device.type == "cpu" else 8))
    released = {
        row.name: row.gflops for row in flops_rows(FlopsConfig(frame_size=arguments.frame_size))
    }
    gflops = statistics.median(run["gflop_per_window"] for run in cached)
    windows_per_s = statistics.median(run["windows_per_s"] for run in cached)
    on_the_fly_gflops = released["window: whole, on the fly (released)"]
    parts["window"] = {
        "windows_a_step": windows,
        "on_the_fly_gflops": on_the_fly_gflops,
        "cached_gflops": gflops,
        "on_the_fly_seconds": direct,
        "cached": cached,
    }
    parts["selection"] = selection.measure(device=device)
    layers = arguments.tokenizer_layers or (12 if device.type == "cuda" else 2)
    patches = make_patches(folder / "patches", 16, 0.3 if device.type == "cpu" else 4.0)
    tokenizer = _take_turns(
        arguments.rounds,
        lambda number, in_memory: tokenizer_rate(
            patches,
            folder / f"tokenizer-{number}-{in_memory}",
            num_layers=layers,
            batch_size=14 if device.type == "cpu" else 1024,
            in_memory=in_memory,
            compiled=arguments.compile,
        ),
    )
    parts["tokenizer"] = {"num_hidden_layers": layers, **tokenizer}
    return {
        "flops_ratio": on_the_fly_gflops / gflops,
        "seconds_ratio": statistics.median(direct) * windows_per_s,
        **selection.summary(parts["selection"]),
        "loader_wait_share": max(run["loader_wait_share"] for run in cached),
        "tokenizer_over_memory": statistics.median(tokenizer["cache"])
        / statistics.median(tokenizer["memory"]),
        "schedule_gpu_hours": (
            SCHEDULE_WINDOWS / windows_per_s / 3600 if device.type == "cuda" else None
        ),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "parts": parts,
    }


def _take_turns(rounds: int, rate: Callable[[int, bool], float]) -> dict[str, list[float]]:
    """Pairs/s from the cache and from memory, one after the other, `rounds` times."""
    found: dict[str, list[float]] = {"cache": [], "memory": []}
    for number in range(rounds):
        found["cache"].append(rate(number, False))
        found["memory"].append(rate(number, True))
    return found


def products_rate(device: torch.device) -> float:
    """TFLOP/s of one large matrix product, bfloat16: what the chip can do here."""
    size = MATRIX_SIZE[device.type]
    a = torch.randn(size, size, device=device).bfloat16()
    best = min(selection.seconds_of(lambda: a @ a, device=device) for _ in range(10))
    return 2 * size**3 / best / 1e12


def table(result: dict[str, Any]) -> str:
    """The keys beside their goals, as Markdown."""
    goals = {
        "flops_ratio": ">= 20",
        "seconds_ratio": ">= 20",
        "selection_speedup": ">= 1.5",
        "selection_agreement": "-",
        "selection_regret": "-",
        "loader_wait_share": "< 0.05",
        "tokenizer_over_memory": ">= 0.95",
        "schedule_gpu_hours": "<= 24 (H200)",
    }
    body = [
        [name, "not measured" if result[name] is None else f"{result[name]:.4g}", goal]
        for name, goal in goals.items()
    ]
    return markdown_table([result["device"], "measured", "goal"], body)


if __name__ == "__main__":
    main()
