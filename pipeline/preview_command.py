"""deltatok-shards preview: look at a cache."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..shards.cache import PATCHES, read_cache_info
from ..shards.deltas import DeltaShards
from ..shards.errors import UsageError
from ..shards.files import write_bytes
from ..shards.patches import PatchShards

EPILOG = """examples:
  deltatok-shards preview cache/patches --out patches.html --videos my_videos/
  deltatok-shards preview cache/deltas --out deltas.png --windows 4 --seed 3

The page is one file and fetches nothing. --videos takes the paths that deltatok-extract
was given."""


def add_preview(kinds: Any) -> None:
    """Adds the subcommand to those of deltatok-shards."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "preview",
        help="some windows as pictures: an HTML page or a PNG",
        epilog=EPILOG,
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
    from .preview import Preview, choose_windows, preview_html, preview_png
    from .preview_deltas import delta_sections
    from .preview_patches import patch_sections
    from .preview_times import cache_facts

    windows = choose_windows(reader, arguments.windows, seed=arguments.seed)
    chosen: dict[str, Any] = {"videos": arguments.videos, "seed": arguments.seed}
    if isinstance(reader, PatchShards):
        sections = patch_sections(reader, windows, **chosen)
    else:
        sections = delta_sections(reader, windows, **chosen)
    kind = "Patch tokens" if is_patches else "Delta tokens"
    preview = Preview(
        title=f"{kind} in {arguments.dir.resolve().name}",
        summary=f"{len(windows)} of {reader.num_windows} windows, of {len(reader.keys)} clips; "
        f"seed {arguments.seed}",
        facts=cache_facts(reader),
        sections=sections,
    )
    data = preview_html(preview).encode() if out.suffix == ".html" else preview_png(preview)
    write_bytes(out, data)
    print(f"preview: {out}")
