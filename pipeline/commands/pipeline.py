"""deltatok-pipeline: run or plan all stages of a pipeline file; quickstart is the built-in one;
import and export of the released checkpoints.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from ...shards.errors import DeltatokError
from ...shards.files import local_path, write_json
from ..alive import SignOfLife
from ..cli import PACKAGE, Parser, apply_settings, example_help, run_command
from ..stages import (
    REPORT,
    Pipeline,
    check_folders,
    clock,
    differences_of,
    expected_s,
    forget,
    read_pipeline,
    run_pipeline,
    stages_to_run,
)
from .evaluate import last_lines

RUN_EXAMPLE = "deltatok-pipeline run configs/quickstart.yaml --set tokenizer.steps=2000"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-pipeline`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(words))


def quickstart_file() -> Path:
    """The built-in pipeline file, from the checkout or the installed package."""
    return PACKAGE / "configs" / "quickstart.yaml"


def _parser() -> Parser:
    parser = Parser(
        prog="deltatok-pipeline",
        description="Run all stages of a pipeline file, each through its own command, each once.",
        **example_help("deltatok-pipeline quickstart", RUN_EXAMPLE),
    )
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=Parser)
    run = kinds.add_parser("run", help="run what is not done", **example_help(RUN_EXAMPLE))
    plan = kinds.add_parser(
        "plan",
        help="say what is done and what would run",
        **example_help("deltatok-pipeline plan configs/quickstart.yaml"),
    )
    quick = kinds.add_parser(
        "quickstart",
        help="the whole pipeline on a built-in little world",
        **example_help("deltatok-pipeline quickstart --out runs/quickstart"),
    )
    _add_own(kinds)
    _add_official(kinds)
    for kind in (run, plan):
        kind.add_argument("config", metavar="CONFIG", type=Path, help="a pipeline file (YAML)")
    for kind in (run, plan, quick):
        kind.add_argument("--out", help="folder of all results [the file's `out`]")
        kind.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="STAGE.KEY=VALUE",
            help="any setting of a stage, as the stage's own command names it",
        )
    for kind in (run, quick):
        kind.add_argument(
            "--again",
            action="append",
            default=[],
            metavar="STAGE",
            help="remove what this stage made, and all that was made of it, and make it anew",
        )
    return parser


def _add_own(kinds: "argparse._SubParsersAction[Parser]") -> None:
    init = kinds.add_parser(
        "init",
        help="a pipeline file for your own videos, sized to this machine",
        **example_help("deltatok-pipeline init --videos my_videos/ --size small"),
    )
    init.add_argument("--videos", nargs="+", required=True, help="as for deltatok-extract")
    init.add_argument("--backbone", help="DINOv3: hub id or folder [ViT-B/16 of the hub]")
    init.add_argument("--size", choices=("small", "base", "released"), help="[what fits]")
    init.add_argument("--file", help="the pipeline file to write [mine.yaml]")
    init.add_argument("--out", help="folder of all results [runs/ and the file's name]")
    init.add_argument("--device", help="auto, cpu, cuda or cuda:N [auto]")
    doctor = kinds.add_parser(
        "doctor",
        help="what this machine has: devices, decoders, disk, weights, extras",
        **example_help("deltatok-pipeline doctor --out cache"),
    )
    doctor.add_argument("--out", type=Path, default=Path(), help="where caches will lie [.]")
    doctor.add_argument("--offline", action="store_true", help="ask nothing over the network")


def _init(arguments: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    del given["kind"]
    with SignOfLife("looking at the videos"):
        from ..init import InitConfig, init_pipeline

        file = init_pipeline(InitConfig(**given | {"videos": tuple(given["videos"])}))
    print(f"wrote {file}; start it with: deltatok-pipeline run {file}")


def _doctor(arguments: argparse.Namespace) -> None:
    from ..doctor import examine

    broken = []
    with SignOfLife("trying the next part"):
        for finding in examine(arguments.out, offline=arguments.offline):
            print(f"{finding.state:<8} {finding.part:<18} {finding.text}", flush=True)
            if finding.needed and finding.state != "ok":
                broken.append(finding.part)
    if broken:
        raise DeltatokError(f"nothing works without {', '.join(broken)}: see above")


def _add_official(kinds: "argparse._SubParsersAction[Parser]") -> None:
    read = kinds.add_parser(
        "import-official",
        help="released checkpoint -> model folder",
        **example_help("deltatok-pipeline import-official pytorch_model.bin --out models/deltatok"),
    )
    read.add_argument("file", metavar="FILE", type=Path, help="pytorch_model.bin, last.ckpt, ...")
    read.add_argument("--out", type=Path, required=True, help="the model folder to write")
    read.add_argument("--class", dest="class_name", help="model class [guessed from the names]")
    read.add_argument("--backbone", type=Path, help="DINOv3 folder; an RGB head needs its norm")
    read.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a config field that shapes do not tell, such as use_delta=false",
    )
    write = kinds.add_parser(
        "export-official",
        help="model folder -> released checkpoint",
        **example_help("deltatok-pipeline export-official models/deltatok --out pytorch_model.bin"),
    )
    write.add_argument("dir", metavar="DIR", type=Path, help="a model folder")
    write.add_argument("--out", type=Path, required=True, help="the checkpoint file to write")


def _import(arguments: argparse.Namespace) -> None:
    from ...train.official import import_official, rgb_constants

    overrides: dict[str, object] = {}
    if arguments.backbone is not None:
        overrides |= rgb_constants(arguments.backbone)
    apply_settings(overrides, arguments.set)
    model = import_official(
        arguments.file, arguments.out, class_name=arguments.class_name, overrides=overrides
    )
    print(f"{model.saved_as} {model.config}")
    print(f"model: {arguments.out}")


def _export(arguments: argparse.Namespace) -> None:
    from ...train.official import export_official

    export_official(arguments.dir, arguments.out)
    print(f"checkpoint: {arguments.out}")


def _run(words: list[str]) -> None:
    arguments = _parser().parse_args(words)
    for value in vars(arguments).values():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str | Path):
                local_path(text)
    others = {
        "import-official": _import,
        "export-official": _export,
        "init": _init,
        "doctor": _doctor,
    }
    if arguments.kind in others:
        others[arguments.kind](arguments)
        return
    is_quickstart = arguments.kind == "quickstart"
    file = quickstart_file() if is_quickstart else arguments.config
    pipeline = read_pipeline(file, out=arguments.out, settings=arguments.set)
    if arguments.kind == "plan":
        print(_plan_text(pipeline))
        return
    same = ["quickstart"] if is_quickstart else ["run", str(file)]
    same += ["--out", arguments.out] if arguments.out else []
    same += [word for setting in arguments.set for word in ("--set", setting)]
    for folder in forget(pipeline, arguments.again):
        print(f"removed {folder}", file=sys.stderr)
    check_folders(pipeline, f"deltatok-pipeline {shlex.join(same)}")
    print(_plan_text(pipeline), file=sys.stderr)
    todo = stages_to_run(pipeline)
    ends_with_report = bool(todo) and todo[-1].command == REPORT == pipeline.stages[-1].command
    # A file of one's own may run for days into a log, where its stages' own lines are enough.
    with SignOfLife("at work") if is_quickstart or sys.stderr.isatty() else nullcontext() as life:
        seconds = run_pipeline(pipeline, life=life)
    report = _report_folder(pipeline)
    if report is None:
        print(f"results: {pipeline.out}")
        return
    values = json.loads((report / "report.json").read_text(encoding="utf-8"))
    values["seconds"] = values.get("seconds", {}) | {"stages": seconds}
    write_json(report / "report.json", values)
    if ends_with_report:
        return  # which said it
    for fault in values.get("diagnosis", []):
        print(f"{fault['cause']} {fault['next_step']}")
    print(*last_lines(values, report), sep="\n")


def _plan_text(pipeline: Pipeline) -> str:
    """What is done and what would run, how long and how large."""
    todo, lines = stages_to_run(pipeline), []
    for stage in pipeline.stages:
        state = "to run" if stage in todo else "done"
        if stage in todo and stage.seconds:
            state += f", about {clock(stage.seconds)}"
        if found := differences_of(pipeline, stage):
            state = f"was run otherwise: {'; '.join(found[:3])}"
        lines.append(f"  {stage.name:<16} {stage.command:<28} {state}")
    head = f"{len(todo)} of {len(lines)} stages to run into {pipeline.out}"
    if seconds := expected_s(todo):
        head += f": about {seconds / 60:.0f} minutes on two CPU cores"
    if todo and pipeline.gigabytes:
        head += f", {pipeline.gigabytes:g} GB of disk"
    if todo:
        head += "; stopped, it goes on when started again"
    return "\n".join([head, *lines])


def _report_folder(pipeline: Pipeline) -> Path | None:
    """Where the last evaluation of the pipeline wrote its report."""
    for stage in reversed(pipeline.stages):
        if stage.command == REPORT:
            return Path(stage.settings["out"])
    return None
