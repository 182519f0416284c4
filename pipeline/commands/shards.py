"""deltatok-shards: info, verify, preview, export and bench of a cache.

Each subcommand is a function that adds its flags and one that does what was parsed.
"""

import argparse
import json
import logging
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tqdm import tqdm

from ...evaluate.tables import markdown_table
from ...shards.cache import PATCHES, read_cache_info
from ...shards.deltas.reader import DeltaShards
from ...shards.errors import CacheMismatch, DamagedShard, DeltatokError, UsageError
from ...shards.files import living_partials, write_bytes, write_json
from ...shards.patches.layout import STORED_DTYPES
from ...shards.patches.reader import PatchShards
from ...shards.patches.zarr_arrays import COMPRESSIONS
from ...shards.tools.export import Selection, export_cache
from ...shards.tools.info import describe_cache
from ...shards.tools.repair import Repaired, repair_cache
from ...shards.tools.verify import VerifyReport, verify_cache
from ...train.config import Residency
from ..bench import BenchSettings, bench_deltas, bench_patches, first_residency
from ..cli import Parser, example_help, run_command

if TYPE_CHECKING:
    from ..audit import AuditReport

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-shards`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(words))


def _parser() -> Parser:
    parser = Parser(
        prog="deltatok-shards",
        description="Look at a cache of patch-token or delta-token shards.",
        **example_help(
            "deltatok-shards info cache/patches",
            "deltatok-shards verify cache/patches",
            "deltatok-shards preview cache/patches --out preview.html",
            "deltatok-shards bench cache/deltas",
            "deltatok-shards export cache/patches --split val --out cache/val",
        ),
    )
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=Parser)
    info = kinds.add_parser(
        "info",
        help="format, shape, size, provenance, quarantine",
        **example_help("deltatok-shards info cache/patches --json"),
    )
    verify = kinds.add_parser("verify", help="is it whole; --repair; --audit")
    for kind in (info, verify):
        kind.add_argument("dir", metavar="DIR", type=Path, help="a cache folder")
    info.add_argument("--json", action="store_true", help="print JSON instead of text")
    add_verify_flags(verify)
    add_preview(kinds)
    add_export(kinds)
    add_bench(kinds)
    return parser


def _run(words: list[str]) -> None:
    arguments = _parser().parse_args(words)
    if arguments.kind == "info":
        _info(arguments.dir, as_json=arguments.json)
    elif arguments.kind == "export":
        run_export(arguments)
    elif arguments.kind == "preview":
        run_preview(arguments)
    elif arguments.kind == "bench":
        run_bench(arguments)
    else:
        run_verify(arguments)


def _info(folder: Path, *, as_json: bool) -> None:
    found = describe_cache(folder)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for key, value in found.items():
        print(f"{key:<20} {value if not isinstance(value, dict | list) else json.dumps(value)}")


VERIFY_EXAMPLE = """examples:
  deltatok-shards verify cache/patches                     every byte, against its SHA-256
  deltatok-shards verify cache/patches --deep              and every value, time, crop, statistic
  deltatok-shards verify cache/patches --repair            clear what is broken, then extract again
  deltatok-shards verify cache/patches --audit 20 --videos clips/ --backbone weights/dinov3

exit codes: 0 whole (with --repair: nothing is left but to run the command that makes the cache);
1 something is wrong, each thing is named; 2 bad usage; 4 the backbone or tokenizer given is not the
one that made the cache"""


def add_verify_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `verify` beside DIR."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = VERIFY_EXAMPLE
    parser.add_argument(
        "--deep",
        action="store_true",
        help="decode everything: checksums of chunks, finite values, shapes, times, crops, "
        "statistics",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="remove partial work and damaged shards, so that they are made again; refused where a "
        "process is seen writing to DIR",
    )
    parser.add_argument(
        "--audit",
        type=int,
        metavar="N",
        help="extract N random clips again and compare their windows",
    )
    parser.add_argument(
        "--videos",
        nargs="+",
        metavar="PATH",
        help="for --audit: where the videos are, as for deltatok-extract [where the plan says]",
    )
    parser.add_argument("--root", metavar="DIR", help="for --audit: --root of deltatok-extract")
    parser.add_argument(
        "--backbone", metavar="DIR", help="for --audit: hub id or folder [the hub id in cache.json]"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="for --audit of delta caches: the tokenizer's folder"
    )
    parser.add_argument("--device", help="for --audit: auto, cpu or cuda:N [auto]")
    parser.add_argument("--seed", type=int, help="for --audit: which clips [0]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")


def run_verify(arguments: argparse.Namespace) -> None:
    """Checks, then repairs or audits; prints every problem and raises DamagedShard if there is
    one that is left."""
    folder: Path = arguments.dir
    for flag in ("videos", "root", "backbone", "tokenizer", "device", "seed"):
        if arguments.audit is None and getattr(arguments, flag) is not None:
            raise UsageError(f"--{flag}: only --audit reads it: add --audit N, or leave it out")
    if arguments.audit is not None and arguments.audit < 1:
        raise UsageError(f"--audit {arguments.audit}: wanted the number of clips, 1 or more")
    report = _verify(folder, deep=arguments.deep)
    for problem in report.problems:
        print(problem)
    found = _as_json(report)
    error: DeltatokError | None = None
    if arguments.repair:
        repaired = _repair(folder, report)
        error = _after_repair(folder, report, repaired)
        found["repair"] = {
            "removed": repaired.removed,
            "shards": repaired.shards,
            "rewritten": repaired.rewritten,
        }
    elif report.problems:
        error = DamagedShard(
            f"{folder}: {report.problems[0]} ({len(report.problems)} problems in all); "
            "run it with --repair, then extract again"
        )
    if arguments.audit is not None and error is None:
        audit = _audit(arguments)
        found["audit"] = audit.as_json()
        if audit.differing:
            error = DamagedShard(
                f"{folder}: {len(audit.differing)} of {audit.windows} windows are not what the "
                "videos give, see above"
            )
    if arguments.json is not None:
        _write(arguments.json, found)
    if error is not None:
        raise error
    if not report.problems:
        depth = "every value" if report.is_deep else "every byte"
        print(
            f"{folder}: {report.shards} shards, {report.windows} windows, {report.bytes} bytes, "
            f"{depth} checked: ok"
        )


def _verify(folder: Path, *, deep: bool) -> VerifyReport:
    # disable=None: no bar where nobody looks at a terminal.
    with tqdm(desc="verify", unit="shard", disable=None, leave=False) as bar:

        def progress(done: int, total: int, num_bytes: int) -> None:
            bar.total = total
            bar.set_postfix_str(f"{num_bytes / 1e9:.2f} GB", refresh=False)
            bar.update(done - bar.n)

        return verify_cache(folder, deep=deep, progress=progress)


def _repair(folder: Path, report: VerifyReport) -> Repaired:
    try:
        _check_nobody_writes(folder)
        return repair_cache(folder, report)
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder}: cannot be removed or written "
            f"({error.strerror or error}): check the permissions of the folder"
        ) from error


def _check_nobody_writes(folder: Path) -> None:
    """UsageError while a process of this machine is seen at work in the cache."""
    for place in (folder, folder / "shards"):
        for partial in living_partials(place):
            raise UsageError(
                f"{partial}: a process is writing to it: wait for it or stop it, then repair"
            )


def _after_repair(folder: Path, before: VerifyReport, done: Repaired) -> DeltatokError | None:
    for name in done.removed:
        print(f"removed {folder / name}")
    for name in done.rewritten:
        print(f"made again {folder / name}")
    left = verify_cache(folder).problems if before.problems else []
    # The next run makes the missing shards, and replaces what lies in their places.
    faults = [
        problem
        for problem in left
        if problem.kind != "unfinished"
        and not (problem.kind == "leftover" and problem.shard in done.shards)
    ]
    if faults:
        return DamagedShard(
            f"{folder}: {len(faults)} problems are left that nothing here may mend, first: "
            f"{faults[0]}"
        )
    if left:
        print(f"{folder}: repaired; run the command that made it again, to make what is missing")
    elif before.problems:
        print(f"{folder}: repaired, and whole")
    return None


def _audit(arguments: argparse.Namespace) -> "AuditReport":
    from ..audit import AuditConfig, audit_cache

    report = audit_cache(
        AuditConfig(
            cache=str(arguments.dir),
            clips=arguments.audit,
            videos=tuple(arguments.videos or ()),
            root=arguments.root,
            backbone=arguments.backbone,
            tokenizer=arguments.tokenizer,
            device=arguments.device or "auto",
            seed=arguments.seed or 0,
        )
    )
    for line in report.lines():
        print(line)
    return report


def _as_json(report: VerifyReport) -> dict[str, Any]:
    return {
        "problems": [problem.text for problem in report.problems],
        "shards": report.shards,
        "windows": report.windows,
        "bytes": report.bytes,
        "damaged_shards": report.damaged,
        "partials": report.partials,
        "orphans": report.orphans,
        "deep": report.is_deep,
    }


def _write(path: Path, found: dict[str, Any]) -> None:
    try:
        write_json(path, json.loads(json.dumps(found)))
    except OSError as error:
        raise UsageError(
            f"--json {path}: cannot be written ({error.strerror or error}): give another file"
        ) from error


EXPORT_EXAMPLE = """examples:
  deltatok-shards export cache/patches --split val --out cache/val
  deltatok-shards export cache/videos-a cache/videos-b --windows-per-shard 4096 --out cache/all
  deltatok-shards export cache/patches --dtype int8 --out cache/patches-int8

A clip is taken whole or not at all. With the dtype kept, every stored number and the fingerprint
stay; another dtype makes another fingerprint. Killed, run the same command again: shards that are
done stay. Caches that are merged must be of one identity. NumPy alone maps a cache in place:
shards/recipes/patches_numpy.py and deltas_numpy.py."""


def add_export(kinds: Any) -> None:
    """Adds the subcommand to those of deltatok-shards."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "export",
        help="subset, merge, re-shard, another storage type",
        epilog=EXPORT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("sources", metavar="SRC", nargs="+", type=Path, help="finished cache folders")
    add(
        "--out", required=True, type=Path, help="new folder (or one that was begun by this command)"
    )
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
    add("--dtype", choices=sorted(STORED_DTYPES), help="of patch tokens; default: as stored")
    add("--compression", choices=COMPRESSIONS, help="of patch shards; default: none")


def run_export(arguments: Namespace) -> None:
    """Does what `add_export` parsed."""
    selection = Selection(
        clips=None if arguments.clips is None else _read_keys(arguments.clips),
        labels=tuple(arguments.label),
        splits=tuple(arguments.split),
        limit=arguments.limit,
    )
    info = export_cache(
        arguments.sources,
        arguments.out,
        selection=selection,
        clips_per_shard=arguments.clips_per_shard,
        windows_per_shard=arguments.windows_per_shard,
        dtype=arguments.dtype,
        compression=arguments.compression or "none",
        progress=_log_progress(),
    )
    print(f"{info.counts['windows']} windows: {arguments.out}")


def _read_keys(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--clips {path}: cannot be read ({error})") from None
    keys = frozenset(line for line in lines if line)
    if not keys:
        raise UsageError(f"--clips {path}: names no clip, wanted one key a line")
    return keys


def _log_progress() -> Callable[[int, int], None]:
    """Logs rate and time left every few seconds."""
    start = last = time.monotonic()

    def log(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_EVERY_S:
            last, rate = now, done / (now - start)
            left_s = (total - done) / rate
            logger.info("%d of %d shards, %.1f/s, %.0f s left", done, total, rate, left_s)

    return log


PREVIEW_EXAMPLE = """examples:
  deltatok-shards preview cache/patches --out patches.html --videos my_videos/
  deltatok-shards preview cache/deltas --out deltas.png --windows 4 --seed 3

The page is one file and fetches nothing. --videos takes the paths that deltatok-extract
was given."""


def add_preview(kinds: Any) -> None:
    """Adds the subcommand to those of deltatok-shards."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "preview",
        help="some windows as pictures: an HTML page or a PNG",
        epilog=PREVIEW_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("dir", metavar="DIR", type=Path, help="a finished cache folder")
    add("--out", required=True, type=Path, help="FILE.html or FILE.png; replaced if it is there")
    add("--videos", metavar="PATH", nargs="+", default=(), help="show their frames too")
    add("--windows", metavar="N", type=int, default=6, help="windows to show; default: 6")
    add("--seed", type=int, default=0, help="which windows; default: 0")


def run_preview(arguments: Namespace) -> None:
    """Does what `add_preview` parsed."""
    out: Path = arguments.out
    if out.suffix not in (".html", ".png"):
        raise UsageError(f"--out {out}: wanted a name that ends with .html or .png")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.absolute().parent}: make it first")
    is_patches = read_cache_info(arguments.dir).format == PATCHES
    reader = PatchShards(arguments.dir) if is_patches else DeltaShards(arguments.dir, verify="size")
    # Imported here: pictures take seconds to import, the other subcommands need none.
    from ..preview import make_preview, preview_html, preview_png

    preview = make_preview(
        reader, num_windows=arguments.windows, videos=arguments.videos, seed=arguments.seed
    )
    data = preview_html(preview).encode() if out.suffix == ".html" else preview_png(preview)
    write_bytes(out, data)
    print(f"preview: {out}")


BENCH_EXAMPLE = """examples:
  deltatok-shards bench cache/deltas
  deltatok-shards bench cache/deltas --residency stream --cold --json bench.json

Rates of one run on a busy machine differ from the next one's; compare the columns of one run."""


def add_bench(kinds: Any) -> None:
    """Adds the subcommand to those of deltatok-shards."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "bench",
        help="loader and reader rates beside memory, memory-map and disk",
        epilog=BENCH_EXAMPLE,
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
    header = ["", f"{unit}/s", f"of {'memory' if 'in_memory' in rates else 'memmap'}"]
    body = [
        [name, f"{rate:,.0f}", f"{rate / limit:.2f}" if limit else ""]
        for name, rate in rates.items()
    ]
    return markdown_table(header, body)
