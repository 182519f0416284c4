"""deltatok-shards: info, verify, preview, export, bench, push and pull of a cache."""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from ...shards.cache import PATCHES, read_cache_info
from ...shards.deltas.reader import DeltaShards
from ...shards.errors import DamagedShard, DeltatokError, UsageError
from ...shards.files import (
    is_address,
    living_partials,
    read_text,
    size_text,
    write_bytes,
    write_json,
)
from ...shards.patches.reader import PatchShards
from ...shards.schema import PathOrAddress, Place
from ...shards.stores.card import dataset_card
from ...shards.stores.mirror import local_folder
from ...shards.stores.push import pull, push
from ...shards.tools.export import ClipSelection, export_cache
from ...shards.tools.info import describe_cache
from ...shards.tools.repair import Repaired, repair_cache
from ...shards.tools.verify import VerifyReport, verify_cache
from ..cli import Command, run_table

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 3.0
CARD_WINDOWS = 3
"""In the picture on the hub."""


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """What a cache is."""

    dir: Place
    """A cache folder, or the address of one."""
    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """How a cache is checked, and what is done about it."""

    dir: str
    """A cache folder."""
    deep: bool = False
    """Decode everything: checksums of chunks, finite values, shapes, times, crops."""
    repair: bool = False
    """Remove partial work and damaged shards, so that they are made again; refused where a process
    is seen writing to DIR."""
    audit: int | None = None
    """Extract so many random clips again and compare their windows."""
    videos: tuple[PathOrAddress, ...] = ()
    """For --audit: where the videos are, as for deltatok-extract; none given: where the plan
    says."""
    root: PathOrAddress | None = None
    """For --audit: --root of deltatok-extract."""
    backbone: str | None = None
    """For --audit: hub id or folder; none given: the hub id in cache.json."""
    tokenizer: str | None = None
    """For --audit of delta caches: the tokenizer's folder."""
    device: str | None = None
    """For --audit: auto, cpu or cuda:N [auto]."""
    seed: int | None = None
    """For --audit: which clips [0]."""
    json: str | None = None
    """File for what was found."""

    def __post_init__(self) -> None:
        for name in ("videos", "root", "backbone", "tokenizer", "device", "seed"):
            if self.audit is None and getattr(self, name) not in (None, ()):
                raise UsageError(f"--{name}: only --audit reads it: add --audit N, or leave it out")
        if self.audit is not None and self.audit < 1:
            raise UsageError(f"--audit {self.audit}: wanted the number of clips, 1 or more")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which windows become a new cache, and how they are stored."""

    sources: tuple[Place, ...]
    """Finished caches: their folders or addresses."""
    out: str
    """New folder (or one that was begun by this command)."""
    clips: str | None = None
    """Take only the clips of this file: one key a line."""
    split: tuple[str, ...] = ()
    """Take only clips of these splits."""
    label: tuple[str, ...] = ()
    """Take only clips of these classes."""
    limit: int | None = None
    """Take the first so many clips in the plan's seeded order."""
    clips_per_shard: int | None = None
    """None given: as in the largest shard."""
    windows_per_shard: int | None = None
    """At most, instead of clips; whole clips. A shard is held in memory."""
    dtype: Literal["float16", "bfloat16", "int8"] | None = None
    """Of patch tokens; none given: as stored."""
    compression: Literal["none", "zstd"] = "none"
    """Of patch shards."""


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Which windows are shown, and where."""

    dir: Place
    """A finished cache: its folder or address."""
    out: str
    """FILE.html or FILE.png; replaced if it is there."""
    videos: tuple[str, ...] = ()
    """Show their frames too."""
    windows: int = 6
    """How many."""
    seed: int = 0
    """Which ones."""

    def __post_init__(self) -> None:
        out = Path(self.out)
        if out.suffix not in (".html", ".png"):
            raise UsageError(f"--out {out}: wanted a name that ends with .html or .png")
        folder = out.absolute().parent
        if not folder.is_dir():
            raise UsageError(f"--out {out}: there is no folder {folder}: make it first")


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """A cache and an address."""

    places: tuple[PathOrAddress, ...]
    """DIR, the folder of a finished cache, and URL, where it goes."""

    def __post_init__(self) -> None:
        _check_places(self.places, wanted="DIR URL", addresses=(False, True))


@dataclass(frozen=True, kw_only=True)
class PullConfig:
    """An address and a folder."""

    places: tuple[PathOrAddress, ...]
    """URL, where a finished cache lies, and DIR, a new folder (or one that was begun by this
    command)."""

    def __post_init__(self) -> None:
        _check_places(self.places, wanted="URL DIR", addresses=(True, False))


def _check_places(places: tuple[str, ...], *, wanted: str, addresses: tuple[bool, bool]) -> None:
    if tuple(map(is_address, places)) != addresses:
        raise UsageError(
            f"got {' '.join(places) or 'nothing'}, wanted {wanted}: a folder, and an address as "
            "s3://bucket/cache or hf://datasets/owner/name"
        )


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured, and for how long."""

    dir: Place
    """A finished cache: its folder or address."""
    batch_size: int | None = None
    """Windows (deltas) or pairs (patches) [1024; 448]."""
    residency: tuple[Literal["memory", "map", "stream"], ...] = ()
    """The first is the headline; none given: what auto chooses, and map."""
    rounds: int = 5
    """Turns of every contestant."""
    seconds: float = 0.5
    """Of a turn."""
    cold: bool = False
    """Drop the files from the page cache before each turn."""
    json: str | None = None
    """File for the numbers."""

    def __post_init__(self) -> None:
        batch_size = 1 if self.batch_size is None else self.batch_size
        if min(self.rounds, batch_size) < 1 or not self.seconds > 0:
            raise UsageError("--rounds, --batch-size and --seconds: wanted more than 0")


COMMANDS = {
    "info": Command(
        help="format, shape, size, provenance, quarantine",
        summary="Say what a cache is.",
        examples=("deltatok-shards info cache/patches", "deltatok-shards info cache/deltas --json"),
        config="pipeline.commands.shards:InfoConfig",
        run="pipeline.commands.shards:info",
        positional="dir",
    ),
    "verify": Command(
        help="is it whole; --repair; --audit",
        summary="Say whether a cache is whole; repair it, or hold it against its videos.",
        examples=(
            "deltatok-shards verify cache/patches                every byte, against its SHA-256",
            "deltatok-shards verify cache/patches --deep         and every value, time and crop",
            "deltatok-shards verify cache/patches --repair       clear what is broken",
            "deltatok-shards verify cache/patches --audit 20 --videos clips/ "
            "--backbone weights/dinov3",
        ),
        config="pipeline.commands.shards:VerifyConfig",
        run="pipeline.commands.shards:verify",
        positional="dir",
        notes="""\
exit codes: 0 whole (with --repair: nothing is left but to run the command that makes the cache);
1 something is wrong, each thing is named; 2 bad usage; 4 the backbone or tokenizer given is not the
one that made the cache""",
    ),
    "preview": Command(
        help="some windows as pictures: an HTML page or a PNG",
        summary="Show some windows of a cache.",
        examples=(
            "deltatok-shards preview cache/patches --out patches.html --videos my_videos/",
            "deltatok-shards preview cache/deltas --out deltas.png --windows 4 --seed 3",
        ),
        config="pipeline.commands.shards:PreviewConfig",
        run="pipeline.commands.shards:preview",
        done="preview: {out}",
        positional="dir",
        notes="""\
The page is one file and fetches nothing. --videos takes the paths that deltatok-extract
was given.""",
    ),
    "export": Command(
        help="subset, merge, re-shard, another storage type",
        summary="Write windows of finished caches as a new one.",
        examples=(
            "deltatok-shards export cache/patches --split val --out cache/val",
            "deltatok-shards export cache/videos-a cache/videos-b --windows-per-shard 4096 "
            "--out cache/all",
            "deltatok-shards export cache/patches --dtype int8 --out cache/patches-int8",
        ),
        config="pipeline.commands.shards:ExportConfig",
        run="pipeline.commands.shards:export",
        positional="sources",
        notes="""\
A clip is taken whole or not at all. With the dtype kept, every stored number and the fingerprint
stay; another dtype makes another fingerprint. Killed, run the same command again: shards that are
done stay. Caches that are merged must be of one identity. NumPy alone maps a cache in place:
shards/recipes/patches_numpy.py and deltas_numpy.py.""",
    ),
    "bench": Command(
        help="loader and reader rates beside memory, memory-map and disk",
        summary="Measure how fast a cache is read, beside what limits it.",
        examples=(
            "deltatok-shards bench cache/deltas",
            "deltatok-shards bench cache/deltas --residency stream --cold --json bench.json",
        ),
        config="pipeline.commands.shards:BenchConfig",
        run="pipeline.commands.shards:bench",
        positional="dir",
        notes="Rates of one run on a busy machine differ from the next one's; compare the columns "
        "of one run.",
    ),
    "push": Command(
        help="copy a cache to an object store or the hub",
        summary="Copy a finished cache to s3://, gs://, az://, file:// or hf://datasets/.",
        examples=(
            "deltatok-shards push cache/deltas s3://bucket/deltas",
            "deltatok-shards push cache/deltas hf://datasets/me/kinetics-deltas",
        ),
        config="pipeline.commands.shards:PushConfig",
        run="pipeline.commands.shards:push_cache",
        positional="places",
        notes="""\
Stopped, run the same command again: shards that are there are not sent again. Every shard is held
against its SHA-256 before it is sent. On the hub, a data set is made private where there is none,
and README.md (what it is, the licence notice, how to read it) and a picture are written.""",
    ),
    "pull": Command(
        help="copy a cache from an object store or the hub",
        summary="Copy a finished cache from an address into a folder.",
        examples=("deltatok-shards pull hf://datasets/me/kinetics-deltas cache/deltas",),
        config="pipeline.commands.shards:PullConfig",
        run="pipeline.commands.shards:pull_cache",
        positional="places",
        notes="""\
Every file is held against the SHA-256 that the cache promises. Stopped, run the same command again.
To train or evaluate, no pull is needed: an address can stand wherever a finished cache is read.""",
    ),
}


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-shards`."""
    return run_table("deltatok-shards", COMMANDS, words)


def info(config: InfoConfig) -> str:
    """What the cache is, as text or JSON."""
    found = describe_cache(local_folder(config.dir))
    if config.json:
        return json.dumps(found, indent=1)
    return "\n".join(
        f"{key:<20} {value if not isinstance(value, dict | list) else json.dumps(value)}"
        for key, value in found.items()
    )


def verify(config: VerifyConfig) -> None:
    """Checks, then repairs or audits; prints every problem and raises DamagedShard if there is
    one that is left."""
    folder = Path(config.dir)
    report = verify_cache(folder, deep=config.deep, progress=_progress("verify"))
    for problem in report.problems:
        print(problem)
    found = {
        "problems": [problem.text for problem in report.problems],
        "shards": report.shards,
        "windows": report.windows,
        "bytes": report.bytes,
        "damaged_shards": report.damaged,
        "partials": report.partials,
        "orphans": report.orphans,
        "deep": report.is_deep,
    }
    error: DeltatokError | None = None
    if config.repair:
        repaired = _repair(folder, report)
        error = _after_repair(folder, report, repaired)
        found["repair"] = dataclasses.asdict(repaired)
    elif report.problems:
        error = DamagedShard(
            f"{folder}: {report.problems[0]} ({len(report.problems)} problems in all); "
            "run it with --repair, then extract again"
        )
    if config.audit is not None and error is None:
        from ..audit import audit_cache

        audit = audit_cache(config)
        print("\n".join(audit.lines()))
        found["audit"] = dataclasses.asdict(audit)
        if audit.differing:
            error = DamagedShard(
                f"{folder}: {len(audit.differing)} of {audit.clips} clips are not what their "
                "videos give, see above"
            )
    if config.json is not None:
        _write(config.json, found)
    if error is not None:
        raise error
    if not report.problems:
        depth = "every value" if report.is_deep else "every byte"
        print(
            f"{folder}: {report.shards} shards, {report.windows} windows, {report.bytes} bytes, "
            f"{depth} checked: ok"
        )


def _progress(what: str) -> Callable[..., None]:
    """What logs (shards done, all shards, ...) every few seconds, with the time left."""
    start_s = last_s = time.monotonic()

    def tell(done: int, total: int, *_: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if done and now_s - last_s >= PROGRESS_EVERY_S:
            last_s, left_s = now_s, (now_s - start_s) * (total - done) / done
            logger.info("%s: %d of %d shards, %.0f s left", what, done, total, left_s)

    return tell


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


def _write(path: str, found: dict[str, Any]) -> None:
    try:
        write_json(Path(path), found)
    except OSError as error:
        raise UsageError(
            f"--json {path}: cannot be written ({error.strerror or error}): give another file"
        ) from error


def export(config: ExportConfig) -> str:
    """Writes the new cache."""
    selection = ClipSelection(
        clips=None if config.clips is None else _read_keys(Path(config.clips)),
        labels=config.label,
        splits=config.split,
        limit=config.limit,
    )
    info = export_cache(
        config.sources,
        config.out,
        selection=selection,
        clips_per_shard=config.clips_per_shard,
        windows_per_shard=config.windows_per_shard,
        dtype=config.dtype,
        compression=config.compression,
        progress=_progress("export"),
    )
    return f"{info.counts['windows']} windows: {config.out}"


def _read_keys(path: Path) -> frozenset[str]:
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--clips {path}: cannot be read ({error})") from None
    keys = frozenset(line for line in lines if line)
    if not keys:
        raise UsageError(f"--clips {path}: names no clip, wanted one key a line")
    return keys


def preview(config: PreviewConfig) -> None:
    """Writes the page or the picture."""
    is_patches = read_cache_info(config.dir).format == PATCHES
    reader = PatchShards(config.dir) if is_patches else DeltaShards(config.dir, verify="size")
    # Imported here: pictures take seconds to import, the other subcommands need none.
    from ..preview import make_preview, preview_html, preview_png

    made = make_preview(reader, num_windows=config.windows, videos=config.videos, seed=config.seed)
    as_page = Path(config.out).suffix == ".html"
    write_bytes(Path(config.out), preview_html(made).encode() if as_page else preview_png(made))


def bench(config: BenchConfig) -> str:
    """The table of rates; raises what opening the cache does."""
    from ..bench import bench_cache, bench_table

    found = bench_cache(config)
    if config.json is not None:
        _write(config.json, found)
    return bench_table(found)


def push_cache(config: PushConfig) -> str:
    """Copies the cache to the address."""
    folder, url = config.places
    info = read_cache_info(folder)
    size_bytes = describe_cache(folder)["bytes"]
    beside = {}
    if url.startswith("hf:") and info.complete:
        from ..preview import make_preview, preview_png

        is_patches = info.format == PATCHES
        reader = PatchShards(folder) if is_patches else DeltaShards(folder, verify="size")
        beside["preview.png"] = preview_png(make_preview(reader, num_windows=CARD_WINDOWS))
        beside["README.md"] = dataset_card(info, url, size_bytes=size_bytes)
    with _bytes_moved("push", size_bytes) as progress:
        done = push(folder, url, progress=progress, beside=beside)
    return f"{done.moved} of {done.shards} shards sent, {size_text(done.bytes)} in all: {url}"


def pull_cache(config: PullConfig) -> str:
    """Copies the cache into the folder."""
    url, folder = config.places
    with _bytes_moved("pull", None) as progress:
        done = pull(url, folder, progress=progress)
    return f"{done.moved} of {done.shards} shards fetched, {size_text(done.bytes)} in all: {folder}"


@contextmanager
def _bytes_moved(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None) as bar:

        def add(size: int) -> None:
            bar.update(size)

        yield add
