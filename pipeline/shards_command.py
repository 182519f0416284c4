"""deltatok-shards: info, verify, preview, export and bench of a cache."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..shards.info import describe_cache
from .bench_command import add_bench, run_bench
from .command import Parser, example_help, run_command
from .export_command import add_export, run_export
from .preview_command import add_preview, run_preview
from .verify_command import add_verify_flags, run_verify


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
