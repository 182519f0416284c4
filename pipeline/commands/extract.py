"""deltatok-extract: videos, a data set or patch-token shards -> patch- or delta-token shards."""

import argparse
import dataclasses
import importlib.util
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...extract.config import ExtractConfig
from ...shards.errors import UsageError
from ...shards.files import local_path
from ..alive import SignOfLife
from ..cli import Command, Parser, config_from_arguments, load_name, read_yaml, run_command

if TYPE_CHECKING:
    from ...extract.datasets.base import DatasetConfig
    from ...train.config import TokenizeConfig
    from ..cost_plan import CostPlan
    from ..fleet.options import FleetOptions

PROG = "deltatok-extract"
EXTRACT_ON_RAY = "pipeline.fleet.run:extract_on_ray"
ENGINE_FLAGS = ("ray_address", "actors", "gpus_per_actor", "cpus_per_actor")
"""What `--engine ray` reads."""

EXAMPLES = (
    "deltatok-extract --videos clips/ --backbone facebook/dinov3-vitb16-pretrain-lvd1689m \\\n"
    "      --frame-size 256 --windows 4 --out cache/patches",
    "deltatok-extract --videos more_clips/ --append --frame-size 256 --windows 4 "
    "--out cache/patches",
    "accelerate launch --num_processes 8 -m deltatok.pipeline.commands.extract --videos clips/ \\\n"
    "      --out cache/patches",
    "deltatok-extract --videos clips/ --out cache/patches --engine ray --ray-address auto",
    "deltatok-extract --patches cache/patches --tokenizer runs/tokenizer --out cache/deltas",
    "deltatok-extract --videos clips/ --tokenizer runs/tokenizer --out cache/deltas",
    "deltatok-extract --videos clips/ --frame-size 256 --out cache/patches --plan",
    "deltatok-extract --dataset vspw --root VSPW --out cache/vspw",
)
NOTES = """\
--videos reads videos: patch-token shards come out, or, with --tokenizer, delta-token shards at
once. --patches (see --patches x --help) reads patch-token shards: delta-token shards come out.
--dataset (see --dataset x --help) reads a labelled data set: an evaluation cache comes out.

exit codes: 0 done; 2 bad usage; 3 finished, but too many clips are quarantined; 4 the cache does
not match; 75 stopped by SIGTERM or --time-limit, run again to go on; 1 anything else"""

DATASET_EXAMPLES = (
    "deltatok-extract --dataset vspw --root VSPW --out cache/vspw",
    "deltatok-extract --dataset cityscapes --root cityscapes --out cache/cityscapes",
    "deltatok-extract --dataset kitti --root kitti --split-file eigen_test.txt --out cache/kitti",
    "deltatok-extract --dataset sequences --name davis --root DAVIS \\\n"
    '      --images "JPEGImages/480p/*/*.jpg" --labels "Annotations/480p/*/*.png" --binary \\\n'
    "      --fps 24 --out cache/davis",
    'deltatok-extract --dataset sequences --name scene --root scene --images "*.color.png" \\\n'
    '      --labels "*.depth.png" --kind depth --steps-per-m 1000 --ignore 65535 --fps 30 \\\n'
    "      --out cache/d",
    "deltatok-extract --dataset vspw --root VSPW --split train --out cache/vspw_train",
)
DATASET_NOTES = """\
The cache refers to the labels, which stay where they are: deltatok-evaluate and deltatok-train head
read them from --labels ROOT.

exit codes: 0 done; 2 bad usage, or another layout; 3 finished, but too many targets are incomplete;
4 the cache does not match; 75 stopped by SIGTERM or --time-limit, run again to go on; 1 other"""


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


@dataclass(frozen=True, kw_only=True)
class Source(Command):
    """What a cache can be made from; its flag, which must be there, says that it is meant."""

    plan: str
    """What makes a CostPlan of the config and the number of clips to try."""

    def __call__(self, prog: str, words: Sequence[str]) -> None:
        with SignOfLife("starting"):
            config_type = load_name(self.config)
            parser = self.parser(prog, config_type, words)
            _add_plan_flags(parser)
            _add_engine_flags(parser)
            arguments = parser.parse_args(words)
            if arguments.json is not None:
                local_path(arguments.json)
            config = config_from_arguments(config_type, arguments)
            engine = _engine_from(arguments)
        if arguments.plan:
            with SignOfLife("trying clips for the plan"):
                plan = load_name(self.plan)(config, num_clips=arguments.probe_clips)
            _print_plan(plan, arguments.json)
            return
        for flag, value in (("--json", arguments.json), ("--probe-clips", arguments.probe_clips)):
            if value is not None:
                raise UsageError(f"{flag}: only --plan reads it: add --plan, or leave {flag} out")
        print(f"{load_name(self.run)(config, engine)}: {config.out}")


SOURCES = {
    "videos": Source(
        help="",
        summary="Run a frozen backbone over videos once and write what others train on.",
        examples=EXAMPLES,
        notes=NOTES,
        config="pipeline.commands.extract:VideosConfig",
        run="pipeline.commands.extract:from_videos",
        plan="pipeline.cost_plan:plan_extraction",
    ),
    "patches": Source(
        help="",
        summary="Encode patch-token shards with a tokenizer and write delta-token shards.",
        examples=EXAMPLES,
        notes=NOTES,
        config="train.config:TokenizeConfig",
        run="pipeline.commands.extract:from_patches",
        plan="pipeline.cost_plan:plan_encoding",
    ),
    "dataset": Source(
        help="",
        summary="Run a frozen backbone over the labelled targets of a data set: their context and "
        "the target itself, in the crops of the forecasting benchmark.",
        examples=DATASET_EXAMPLES,
        notes=DATASET_NOTES,
        config="extract.datasets.base:DatasetConfig",
        run="pipeline.commands.extract:from_dataset",
        plan="pipeline.cost_plan:plan_extraction",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-extract`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: SOURCES[_source(words)](PROG, words))


def from_videos(config: VideosConfig, engine: "FleetOptions | None") -> str:
    """Makes the cache; gives what it is."""
    run = "extract.run:run_extraction" if config.tokenizer is None else "pipeline.fused:run_fused"
    with SignOfLife("starting"):
        extract = load_name(run if engine is None else EXTRACT_ON_RAY)
    result = extract(config) if engine is None else extract(config, engine)
    logging.info("%s", result.summary_line())
    return "patch-token shards" if config.tokenizer is None else "delta-token shards"


def from_dataset(config: "DatasetConfig", engine: "FleetOptions | None") -> str:
    """Makes the cache; gives what it is."""
    from ...extract.datasets.registry import find_targets, run_dataset

    if engine is None:
        result = run_dataset(config)
    else:
        targets = find_targets(config)
        result = load_name(EXTRACT_ON_RAY)(config.to_extraction(), engine, targets=targets)
    logging.info("%s", result.summary_line())
    return "evaluation cache"


def from_patches(config: "TokenizeConfig", engine: "FleetOptions | None") -> str:
    """Makes the cache; gives what it is."""
    with SignOfLife("starting"):
        from ...train.encode import draws_of, write_deltas

    if engine is None:
        write_deltas(config, draws=draws_of(config))
    else:
        load_name("pipeline.fleet.run:encode_on_ray")(config, engine)
    return "delta-token shards"


def _source(words: list[str]) -> str:
    """The one of SOURCES that flags, the --config file or --set name; "videos" if none does."""
    finder = Parser(prog=PROG, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    finder.add_argument("--set", action="append", default=[])
    for name in SOURCES:
        finder.add_argument(f"--{name}")
    found = finder.parse_known_args(words)[0]
    named = set(read_yaml(Path(found.config)) if found.config else {})
    named |= {setting.partition("=")[0] for setting in found.set}
    given = [name for name in SOURCES if getattr(found, name) is not None or name in named]
    if len(given) > 1:
        raise UsageError(
            f"{' and '.join(f'--{name}' for name in given)}: wanted one of them, a cache is made "
            "either from videos, from a data set or from patch-token shards: leave the others out"
        )
    return given[0] if given else "videos"


def _add_plan_flags(parser: Parser) -> None:
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--plan",
        action="store_true",
        help="say what it would take and exit: bytes, files, hours, memory; nothing stays in OUT",
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write the plan there, too")
    group.add_argument(
        "--probe-clips",
        type=int,
        metavar="N",
        help="clips that are tried for the plan [16 or more, as far as a minute allows]",
    )


def _add_engine_flags(parser: Parser) -> None:
    group = parser.add_argument_group("many devices and machines")
    group.add_argument(
        "--engine",
        choices=("ray",),
        help="ray: one driver, an actor a device; lost ones are replaced (an extra: pip install "
        '"deltatok[ray]"); none given: this process alone',
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="cluster to use: auto, HOST:PORT; none given: the one this machine is in, else Ray on "
        "this machine alone",
    )
    group.add_argument("--actors", type=int, metavar="N", help="actors at a time [all that fit]")
    group.add_argument(
        "--gpus-per-actor",
        type=float,
        metavar="N",
        help="[1, or 0 with --device cpu and where there are none]",
    )
    group.add_argument(
        "--cpus-per-actor",
        type=int,
        metavar="N",
        help="cores of an actor, which also are its decoding processes [a machine's, divided by "
        "the actors that its GPUs are for]",
    )


def _engine_from(arguments: argparse.Namespace) -> "FleetOptions | None":
    """What the flags say; UsageError where they mean nothing, or Ray is not installed."""
    given = {
        name: value for name in ENGINE_FLAGS if (value := getattr(arguments, name)) is not None
    }
    if arguments.engine is None:
        if given:
            flag = f"--{next(iter(given)).replace('_', '-')}"
            raise UsageError(f"{flag}: only --engine ray reads it: add that, or leave {flag} out")
        return None
    if arguments.plan:
        raise UsageError("--engine: --plan tries clips in this process alone: leave --engine out")
    if importlib.util.find_spec("ray") is None:
        raise UsageError(
            '--engine ray: Ray is not installed: pip install "deltatok[ray]", on all machines'
        )
    from ..fleet.options import FleetOptions

    return FleetOptions(**given)


def _print_plan(plan: "CostPlan", json: Path | None) -> None:
    from ...shards.files import write_json
    from ..cost_plan import plan_text

    print(plan_text(plan))
    if json is not None:
        try:
            write_json(json, dataclasses.asdict(plan))
        except OSError as error:
            raise UsageError(
                f"--json {json}: cannot be written ({error.strerror or error})"
            ) from error
        print(f"plan: {json}")


if __name__ == "__main__":  # for launchers: accelerate launch -m deltatok.pipeline.commands.extract
    sys.exit(main())
