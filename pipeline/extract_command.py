"""deltatok-extract: videos -> patch-token shards, and patch-token shards -> delta-token shards."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from .command import Parser, add_config_flags, config_from_arguments, run_command
from .config import read_yaml

EXAMPLE = """examples:
  deltatok-extract --videos clips/ --backbone facebook/dinov3-vitb16-pretrain-lvd1689m \\
      --frame-size 256 --windows 4 --out cache/patches
  deltatok-extract --videos more_clips/ --append --frame-size 256 --windows 4 --out cache/patches
  accelerate launch --num_processes 8 -m deltatok.pipeline.extract_command --videos clips/ ...
  deltatok-extract --patches cache/patches --tokenizer runs/tokenizer --out cache/deltas

exit codes: 0 done; 2 bad usage; 3 finished, but too many clips are quarantined; 4 the cache does
not match; 75 stopped by SIGTERM or --time-limit, run again to go on; 1 anything else"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-extract`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(words))


def _run(words: list[str]) -> None:
    if _wants_deltas(words):
        _run_tokenize(words)
    else:
        _run_videos(words)


def _wants_deltas(words: list[str]) -> bool:
    """Whether flags or the --config file name a patch cache to encode instead of videos."""
    if any(word == "--patches" or word.startswith("--patches=") for word in words):
        return True
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--config")
    config = finder.parse_known_args(words)[0].config
    return bool(config) and "patches" in read_yaml(Path(config))


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
    from ..extract.config import ExtractConfig

    summary = "Run a frozen DINOv3 over videos once and write patch-token shards."
    parser = _parser(summary, ExtractConfig)
    config = config_from_arguments(ExtractConfig, parser.parse_args(words))
    from ..extract.run import run_extraction

    result = run_extraction(config)
    logging.info("%s", result)
    print(f"patch-token shards: {config.out}")


def _run_tokenize(words: list[str]) -> None:
    from ..train.config import TokenizeConfig

    summary = "Encode patch-token shards with a tokenizer and write delta-token shards."
    parser = _parser(summary, TokenizeConfig)
    config = config_from_arguments(TokenizeConfig, parser.parse_args(words))
    from ..train.tokenize import write_deltas

    write_deltas(config)
    print(f"delta-token shards: {config.out}")


if __name__ == "__main__":  # for launchers: accelerate launch -m deltatok.pipeline.extract_command
    sys.exit(main())
