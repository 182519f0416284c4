"""deltatok-extract: videos, or patch-token shards, -> patch-token or delta-token shards."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ..shards.errors import UsageError
from .command import Parser, add_config_flags, config_from_arguments, run_command
from .config import read_yaml

EXAMPLE = """examples:
  deltatok-extract --videos clips/ --backbone facebook/dinov3-vitb16-pretrain-lvd1689m \\
      --frame-size 256 --windows 4 --out cache/patches
  deltatok-extract --patches cache/patches --tokenizer runs/tokenizer --out cache/deltas
  deltatok-extract --videos clips/ --tokenizer runs/tokenizer --out cache/deltas

--videos reads videos: patch-token shards come out, or, with --tokenizer, delta-token shards at
once. --patches (see --patches x --help) reads patch-token shards: delta-token shards come out.

exit codes: 0 done; 2 bad usage; 3 finished, but too many clips are quarantined; 4 the cache does
not match; 75 stopped by SIGTERM, run again to go on; 1 anything else"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-extract`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(words))


def _run(words: list[str]) -> None:
    given = _given(words)
    if {"videos", "patches"} <= given:
        raise UsageError(
            "--videos and --patches: wanted one of them, a cache is made either from videos or "
            "from patch-token shards: leave one out"
        )
    if "patches" in given:
        _run_tokenize(words)
    else:
        _run_videos(words)


def _given(words: list[str]) -> set[str]:
    """Which of `videos` and `patches` flags, the --config file or --set name."""
    finder = Parser(prog="deltatok-extract", add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    finder.add_argument("--set", action="append", default=[])
    finder.add_argument("--videos")
    finder.add_argument("--patches")
    found = finder.parse_known_args(words)[0]
    values = read_yaml(Path(found.config)) if found.config else {}
    set_keys = {setting.partition("=")[0] for setting in found.set}
    return {
        name
        for name in ("videos", "patches")
        if getattr(found, name) is not None or name in values or name in set_keys
    }


def _parser(summary: str, config_type: type) -> Parser:
    parser = Parser(
        prog="deltatok-extract",
        description=summary,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_flags(parser, config_type)
    return parser


def _run_videos(words: list[str]) -> None:
    from .videos_config import VideosConfig

    summary = "Run a frozen DINOv3 over videos once and write what others train on."
    parser = _parser(summary, VideosConfig)
    config = config_from_arguments(VideosConfig, parser.parse_args(words))
    if config.tokenizer is None:
        from ..extract.run import run_extraction

        kind, result = "patch-token", run_extraction(config)
    else:
        from .fused import run_fused

        kind, result = "delta-token", run_fused(config)
    logging.info("%s", result)
    print(f"{kind} shards: {config.out}")


def _run_tokenize(words: list[str]) -> None:
    from ..train.config import TokenizeConfig

    summary = "Encode patch-token shards with a tokenizer and write delta-token shards."
    parser = _parser(summary, TokenizeConfig)
    config = config_from_arguments(TokenizeConfig, parser.parse_args(words))
    from ..train.tokenize import write_deltas
    from .uniform_draws import UniformDraws

    write_deltas(config, draws=UniformDraws.from_config(config))
    print(f"delta-token shards: {config.out}")
