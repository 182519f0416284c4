"""deltatok-shards bench: how fast a cache is read, beside what limits it."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any, get_args

from ..shards.cache import PATCHES, read_cache_info
from ..shards.errors import CacheMismatch, UsageError
from ..shards.files import write_json
from ..train.config import Residency
from .bench import BenchSettings, bench_deltas, bench_patches, first_residency

EPILOG = """examples:
  deltatok-shards bench cache/deltas
  deltatok-shards bench cache/deltas --residency stream --cold --json bench.json

Rates of one run on a busy machine differ from the next one's; compare the columns of one run."""


def add_bench(kinds: Any) -> None:
    """Adds the subcommand to those of deltatok-shards."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "bench",
        help="loader and reader rates beside memory, memory-map and disk",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("dir", metavar="DIR", type=Path, help="a finished cache folder")
    add("--batch-size", type=int, help="windows (deltas) or pairs (patches) [1024; 448]")
    add("--workers", default="0,1", help="threads that read ahead, several with commas [0,1]")
    names = [name for name in get_args(Residency) if name not in ("auto", "device")]
    add("--residency", nargs="+", choices=names, help="the first is the headline [auto, map]")
    add("--rounds", type=int, default=5, help="turns of every contestant [5]")
    add("--seconds", type=float, default=0.5, help="of a turn [0.5]")
    add("--cold", action="store_true", help="drop the files from the page cache before each turn")
    add("--json", type=Path, metavar="FILE", help="also write the numbers")


def run_bench(arguments: Namespace) -> None:
    """Prints the table; raises what opening the cache does."""
    info = read_cache_info(arguments.dir)
    patches = info.format == PATCHES
    if not info.complete:
        raise CacheMismatch(
            f"{arguments.dir}: is not finished: first let the command that makes it come to its end"
        )
    if info.counts.get("windows", 0) == 0:
        raise UsageError(f"{arguments.dir}: holds no windows, so there is nothing to measure")
    auto = first_residency(arguments.dir, patches=patches)
    residencies = tuple(arguments.residency or dict.fromkeys((auto, "map")))
    wanted = arguments.batch_size or (448 if patches else 1024)
    pairs = info.shape.num_frames - 1 if patches else 1
    settings = BenchSettings(
        batch_size=min(wanted, info.counts["windows"] * pairs),
        workers=_workers(arguments.workers),
        residencies=residencies,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        cold=arguments.cold,
    )
    if min(settings.rounds, settings.batch_size) < 1 or not settings.seconds > 0:
        raise UsageError("--rounds, --batch-size and --seconds: wanted more than 0")
    found = (bench_patches if patches else bench_deltas)(arguments.dir, settings)
    print(_table(found, "pairs" if patches else "windows"))
    if arguments.json is not None:
        write_json(arguments.json, found)


def _workers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (-1,)
    if min(numbers) < 0 or max(numbers) > 64:
        raise UsageError(f"--workers {text}: wanted numbers from 0 to 64, like 0,1,2")
    return numbers


def _table(found: dict[str, Any], unit: str) -> str:
    suffix = f"_{unit}_per_s"
    rates = {name.removesuffix(suffix): rate for name, rate in found["rates"].items()}
    limit = rates.get("in_memory") or rates.get("memmap")
    lines = [
        f"| | {unit}/s | of {'memory' if 'in_memory' in rates else 'memmap'} |",
        "|---|---:|---:|",
    ]
    for name, rate in rates.items():
        share = f"{rate / limit:.2f}" if limit else ""
        lines.append(f"| {name} | {rate:,.0f} | {share} |")
    return "\n".join(lines)
