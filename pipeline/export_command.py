"""deltatok-shards export: a subset, a merger, other shards, another storage type, npy files."""

import argparse
import logging
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..shards.dtypes import STORED_DTYPES
from ..shards.errors import UsageError
from ..shards.export import export_cache
from ..shards.export_plan import Selection
from ..shards.npy_folder import VALUE_DTYPES, export_npy
from ..shards.zstd import COMPRESSIONS

logger = logging.getLogger(__name__)

EPILOG = """examples:
  deltatok-shards export cache/patches --split val --out cache/val
  deltatok-shards export cache/videos-a cache/videos-b --windows-per-shard 4096 --out cache/all
  deltatok-shards export cache/patches --dtype int8 --out cache/patches-int8
  deltatok-shards export cache/deltas --format npy --out deltas-npy

A clip is taken whole or not at all. With the dtype kept, every stored number and the fingerprint
stay; another dtype makes another fingerprint. Killed, run the same command again: it goes on
(npy: begins again). Caches that are merged must be of one identity."""

PROGRESS_EVERY_S = 5.0


def add_export(kinds: Any) -> None:
    """Adds the subcommand to those of deltatok-shards."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "export",
        help="subset, merge, re-shard, another storage type, npy files",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("sources", metavar="SRC", nargs="+", type=Path, help="finished cache folders")
    add(
        "--out", required=True, type=Path, help="new folder (or one that was begun by this command)"
    )
    add("--format", choices=("cache", "npy"), default="cache", help="default: cache")
    add("--clips", metavar="FILE", type=Path, help="take only these clips: one key a line")
    add("--split", metavar="NAME", nargs="+", default=(), help="take only clips of these splits")
    add("--label", metavar="NAME", nargs="+", default=(), help="take only clips of these classes")
    add("--limit", metavar="N", type=int, help="take the first N clips in the plan's seeded order")
    add("--clips-per-shard", metavar="N", type=int, help="default: as in the largest shard given")
    add(
        "--windows-per-shard",
        metavar="N",
        type=int,
        help="at most, instead of clips; whole clips. A shard is held in memory",
    )
    dtypes = sorted({*STORED_DTYPES, *VALUE_DTYPES})
    add(
        "--dtype",
        choices=dtypes,
        help=f"default: as stored; caches: {', '.join(STORED_DTYPES)}; npy: "
        f"{', '.join(VALUE_DTYPES)}",
    )
    add("--compression", choices=COMPRESSIONS, help="of patch shards; default: none")


def run_export(arguments: Namespace) -> None:
    """Does what `add_export` parsed."""
    selection = Selection(
        clips=None if arguments.clips is None else _read_keys(arguments.clips),
        labels=tuple(arguments.label),
        splits=tuple(arguments.split),
        limit=arguments.limit,
    )
    if arguments.format == "npy":
        for name in ("clips_per_shard", "windows_per_shard", "compression"):
            if getattr(arguments, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} with --format npy, which has no shards: leave it out")
        num_windows = export_npy(
            arguments.sources,
            arguments.out,
            selection=selection,
            dtype=arguments.dtype,
            progress=_progress("windows"),
        )
    else:
        info = export_cache(
            arguments.sources,
            arguments.out,
            selection=selection,
            clips_per_shard=arguments.clips_per_shard,
            windows_per_shard=arguments.windows_per_shard,
            dtype=arguments.dtype,
            compression=arguments.compression or "none",
            progress=_progress("shards"),
        )
        num_windows = info.counts["windows"]
    print(f"{num_windows} windows: {arguments.out}")


def _read_keys(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--clips {path}: cannot be read ({error})") from None
    keys = frozenset(line for line in lines if line)
    if not keys:
        raise UsageError(f"--clips {path}: names no clip, wanted one key a line")
    return keys


def _progress(what: str) -> Callable[[int, int], None]:
    """Logs rate and time left, now and then."""
    start = time.monotonic()
    told = start

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= PROGRESS_EVERY_S:
            told = now
            left_s = (now - start) * (total - done) / done
            rate = done / (now - start)
            logger.info("%d of %d %s, %.1f/s, %.0f s left", done, total, what, rate, left_s)

    return tell
