"""deltatok-extract: videos, a data set or patch-token shards -> patch- or delta-token shards.

What `deltatok-extract --videos` is told: an extraction, and a tokenizer to encode with at once.

Nothing heavy is imported here: `--help` reads it.

deltatok-extract --dataset: a labelled data set -> an evaluation cache.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...extract.config import ExtractConfig
from ...shards.errors import UsageError
from ..cli import Parser, add_config_flags, config_from_arguments, read_yaml, run_command


@dataclass(frozen=True, kw_only=True)
class VideosConfig(ExtractConfig):
    """Videos in; a patch-token cache out, or, with a tokenizer, a delta-token cache."""

    tokenizer: str | None = None
    """Model folder of a tokenizer: delta-token shards are written straight from the videos, the
    patch tokens are never stored."""
    tokenizer_autocast: Literal["auto", "float32", "bfloat16"] | None = None
    """Arithmetic of the tokenizer, only with one; auto, also where none is given: bfloat16 on
    cuda, float32 on the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is None:
            if self.tokenizer_autocast is not None:
                raise UsageError(
                    f"tokenizer_autocast: got {self.tokenizer_autocast!r} without a tokenizer, "
                    "which is all that it concerns: give --tokenizer DIR, or leave it out"
                )
            return
        if self.sampling != "windows":
            raise UsageError(
                f"sampling: got {self.sampling!r} with --tokenizer, wanted 'windows': delta tokens "
                "are for training; extract the uniform frames without --tokenizer, then draw "
                "windows among them with --patches and --tokenizer"
            )
        if self.dtype != "float16":
            raise UsageError(
                f"dtype: got {self.dtype!r} with --tokenizer, wanted 'float16': patch tokens are "
                "rounded to float16 before they are encoded; for another dtype extract first, "
                "then encode with --patches and --tokenizer"
            )


DATASET_EXAMPLE = """examples:
  deltatok-extract --dataset vspw --root VSPW --out cache/vspw
  deltatok-extract --dataset cityscapes --root cityscapes --out cache/cityscapes
  deltatok-extract --dataset kitti --root kitti --split-file eigen_test.txt --out cache/kitti
  deltatok-extract --dataset sequences --name davis --root DAVIS \\
      --images "JPEGImages/480p/*/*.jpg" --labels "Annotations/480p/*/*.png" --binary --fps 24 \\
      --out cache/davis
  deltatok-extract --dataset sequences --name scene --root scene --images "*.color.png" \\
      --labels "*.depth.png" --kind depth --steps-per-m 1000 --ignore 65535 --fps 30 --out cache/d
  deltatok-extract --dataset vspw --root VSPW --split train --out cache/vspw_train

The cache refers to the labels, which stay where they are: deltatok-evaluate and deltatok-train head
read them from --labels ROOT.

exit codes: 0 done; 2 bad usage, or another layout; 3 finished, but too many targets are incomplete;
4 the cache does not match; 75 stopped by SIGTERM or --time-limit, run again to go on; 1 other"""


def run_dataset_command(words: list[str]) -> None:
    """`deltatok-extract` with words that name a data set."""
    from ...extract.datasets.base import DatasetConfig

    parser = Parser(
        prog="deltatok-extract",
        description="Run a frozen DINOv3 over the labelled targets of a data set: their context "
        "and the target itself, in the crops of the forecasting benchmark.",
        epilog=DATASET_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_flags(parser, DatasetConfig)
    parser.add_argument(
        "--plan",
        action="store_true",
        help="say which targets there are and what they would take, and exit; writes nothing",
    )
    arguments = parser.parse_args(words)
    config = config_from_arguments(DatasetConfig, arguments)
    if arguments.plan:
        from ..dataset_plan import dataset_plan

        print(dataset_plan(config))
        return
    from ...extract.datasets.registry import run_dataset

    logging.info("%s", run_dataset(config).summary_line())
    print(f"evaluation cache: {config.out}")


SOURCES = ("videos", "dataset", "patches")
"""What a cache can be made from; one of them says which command it is."""

EXAMPLE = """examples:
  deltatok-extract --videos clips/ --backbone facebook/dinov3-vitb16-pretrain-lvd1689m \\
      --frame-size 256 --windows 4 --out cache/patches
  deltatok-extract --videos more_clips/ --append --frame-size 256 --windows 4 --out cache/patches
  accelerate launch --num_processes 8 -m deltatok.pipeline.commands.extract --videos clips/ \\
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
        from ...extract.run import run_extraction

        kind, result = "patch-token", run_extraction(config)
    else:
        from ..fused import run_fused

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
    from ...shards.files import write_json
    from ..plan import DEFAULT_PROBE_CLIPS, make_extraction_plan
    from ..plan_result import as_json
    from ..plan_text import plan_text

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
    from ...train.config import TokenizeConfig

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
    from ...train.encode import write_deltas
    from ..uniform_draws import UniformDraws

    write_deltas(config, draws=UniformDraws.from_config(config))
    print(f"delta-token shards: {config.out}")


if __name__ == "__main__":  # for launchers: accelerate launch -m deltatok.pipeline.commands.extract
    sys.exit(main())
