"""deltatok-shards verify: is a cache whole, repair it, hold it against the videos it came from."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..shards.errors import DamagedShard, DeltatokError, UsageError
from ..shards.files import living_partials, write_json
from ..shards.repair import Repaired, repair_cache
from ..shards.verify import VerifyReport, verify_cache

if TYPE_CHECKING:
    from .audit import AuditReport

EXAMPLE = """examples:
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
    parser.epilog = EXAMPLE
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
        "--audit", type=int, metavar="N", help="make N random windows again and compare them"
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
    parser.add_argument("--seed", type=int, help="for --audit: which windows [0]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")


def run_verify(arguments: argparse.Namespace) -> None:
    """Checks, then repairs or audits; prints every problem and raises DamagedShard if there is
    one that is left."""
    folder: Path = arguments.dir
    for flag in ("videos", "root", "backbone", "tokenizer", "device", "seed"):
        if arguments.audit is None and getattr(arguments, flag) is not None:
            raise UsageError(f"--{flag}: only --audit reads it: add --audit N, or leave it out")
    if arguments.audit is not None and arguments.audit < 1:
        raise UsageError(f"--audit {arguments.audit}: wanted the number of windows, 1 or more")
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
    # A shard that is to be made is what the next run does, which replaces what lies there.
    replaced = [f"{folder}/shards/{shard:06d}." for shard in done.shards]
    faults = [
        text
        for text in left
        if ": not finished: " not in text
        and ": not marked" not in text
        and not text.startswith(tuple(replaced))
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
    from .audit import AuditConfig, audit_cache

    report = audit_cache(
        AuditConfig(
            cache=str(arguments.dir),
            windows=arguments.audit,
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
        "problems": report.problems,
        "shards": report.shards,
        "windows": report.windows,
        "bytes": report.bytes,
        "damaged_shards": report.damaged,
        "partials": report.leftovers.partials,
        "orphans": report.leftovers.orphans,
        "deep": report.is_deep,
    }


def _write(path: Path, found: dict[str, Any]) -> None:
    try:
        write_json(path, json.loads(json.dumps(found)))
    except OSError as error:
        raise UsageError(
            f"--json {path}: cannot be written ({error.strerror or error}): give another file"
        ) from error
