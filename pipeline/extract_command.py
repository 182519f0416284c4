"""deltatok-extract: videos, a data set or patch-token shards -> patch- or delta-token shards."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..shards.errors import UsageError
from .command import Parser, add_config_flags, config_from_arguments, run_command
from .config import read_yaml

if TYPE_CHECKING:
    from .videos_config import VideosConfig

SOURCES = ("videos", "dataset", "patches")
"""What a cache can be made from; one of them says which command it is."""

EXAMPLE = """examples:
  deltatok-extract --videos clips/ --backbone facebook/dinov3-vitb16-pretrain-lvd1689m \\
      --frame-size 256 --windows 4 --out cache/patches
  deltatok-extract --videos more_clips/ --append --frame-size 256 --windows 4 --out cache/patches
  accelerate launch --num_processes 8 -m deltatok.pipeline.extract_command --videos clips/ \\
      --out cache/patches
  deltatok-extract --patches cache/patches --tokenizer runs/tokenizer --out cache/deltas
  deltatok-extract --videos clips/ --tokenizer runs/tokenizer --out cache/deltas
  deltatok-extract --videos clips/ --frame-size 256 --out cache/patches --plan
  deltatok-extract --dataset vspw --root VSPW --out cache/vspw

--videos reads videos: patch-token shards come out, or, with --tokenizer, delta-token shards at
once. --patches (see --patches x --help) reads patch-token shards: delta-token shards come out.
--dataset (see --dataset x --help) reads a labelled data set: an evaluation cache comes out.

exit codes: 0 done; 2 bad usage; 3 finished, but too many clips are quarantined; 4 the cache does
not match; 75 stopped by SIGTERM or --time-limit, run again to go on; 1 anything else"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-extract`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(words))


def _run(words: list[str]) -> None:
    given = _given(words)
    if len(given) > 1:
        raise UsageError(
            f"{' and '.join(f'--{name}' for name in sorted(given, reverse=True))}: wanted one of "
            "them, a cache is made either from videos, from a data set or from patch-token shards: "
            "leave the others out"
        )
    if "dataset" in given:
        from .dataset_command import run_dataset_command

        run_dataset_command(words)
    elif "patches" in given:
        _run_tokenize(words)
    else:
        _run_videos(words)


def _given(words: list[str]) -> set[str]:
    """Which of SOURCES flags, the --config file or --set name."""
    finder = Parser(prog="deltatok-extract", add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    finder.add_argument("--set", action="append", default=[])
    for name in SOURCES:
        finder.add_argument(f"--{name}")
    found = finder.parse_known_args(words)[0]
    values = read_yaml(Path(found.config)) if found.config else {}
    set_keys = {setting.partition("=")[0] for setting in found.set}
    return {
        name
        for name in SOURCES
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
    _add_plan_flags(parser)
    arguments = parser.parse_args(words)
    config = config_from_arguments(VideosConfig, arguments)
    if arguments.plan:
        _print_plan(config, arguments)
        return
    for flag in ("json", "probe_clips"):
        if getattr(arguments, flag) is not None:
            name = f"--{flag.replace('_', '-')}"
            raise UsageError(f"{name}: only --plan reads it: add --plan, or leave {name} out")
    if config.tokenizer is None:
        from ..extract.run import run_extraction

        kind, result = "patch-token", run_extraction(config)
    else:
        from .fused import run_fused

        kind, result = "delta-token", run_fused(config)
    logging.info("%s", result.summary_line())
    print(f"{kind} shards: {config.out}")


def _add_plan_flags(parser: Parser, *, hidden: bool = False) -> None:
    """hidden: they are understood, so that they can be refused by name, and not in the help."""
    flags: dict[str, tuple[str, dict[str, Any]]] = {
        "--plan": (
            "say what it would take and exit: bytes, files, hours, memory; writes nothing to OUT",
            {"action": "store_true"},
        ),
        "--json": ("write the plan there, too", {"type": Path, "metavar": "FILE"}),
        "--probe-clips": (
            "clips to decode and time for the plan [8]; up to 1000 are looked at",
            {"type": int, "metavar": "N"},
        ),
    }
    group = parser.add_argument_group(None if hidden else "plan")
    for flag, (summary, options) in flags.items():
        group.add_argument(flag, help=argparse.SUPPRESS if hidden else summary, **options)


def _print_plan(config: "VideosConfig", arguments: argparse.Namespace) -> None:
    from ..shards.files import write_json
    from .plan import DEFAULT_PROBE_CLIPS, make_extraction_plan
    from .plan_result import as_json
    from .plan_text import plan_text

    count = DEFAULT_PROBE_CLIPS if arguments.probe_clips is None else arguments.probe_clips
    plan = make_extraction_plan(config, num_probe_clips=count)
    print(plan_text(plan))
    if arguments.json is not None:
        try:
            write_json(arguments.json, as_json(plan))
        except OSError as error:
            raise UsageError(
                f"--json {arguments.json}: cannot be written ({error.strerror or error})"
            ) from error
        print(f"plan: {arguments.json}")


def _run_tokenize(words: list[str]) -> None:
    from ..train.config import TokenizeConfig

    summary = "Encode patch-token shards with a tokenizer and write delta-token shards."
    parser = _parser(summary, TokenizeConfig)
    _add_plan_flags(parser, hidden=True)
    arguments = parser.parse_args(words)
    if arguments.plan or arguments.json is not None or arguments.probe_clips is not None:
        raise UsageError(
            "--plan, --json and --probe-clips with --patches: wanted --videos, what is planned is "
            "an extraction; `--videos ... --tokenizer DIR --plan` says what delta tokens take, or "
            "leave them out"
        )
    config = config_from_arguments(TokenizeConfig, arguments)
    from ..train.tokenize import write_deltas
    from .uniform_draws import UniformDraws

    write_deltas(config, draws=UniformDraws.from_config(config))
    print(f"delta-token shards: {config.out}")


if __name__ == "__main__":  # for launchers: accelerate launch -m deltatok.pipeline.extract_command
    sys.exit(main())
