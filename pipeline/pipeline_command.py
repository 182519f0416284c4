"""deltatok-pipeline: run or plan all stages of a pipeline file; quickstart is the built-in one."""

import argparse
import importlib.resources
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..shards.files import write_json
from .command import Parser, run_command
from .stages import Pipeline, read_pipeline, run_pipeline, stages_to_run


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-pipeline`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(words))


def quickstart_file() -> Path:
    """The built-in pipeline file, from the checkout or the installed package."""
    with importlib.resources.as_file(importlib.resources.files("deltatok")) as root:
        return root / "configs" / "quickstart.yaml"


def _parser() -> Parser:
    parser = Parser(
        prog="deltatok-pipeline",
        description="Run all stages of a pipeline file, each through its own command, each once.",
        epilog="example:\n  deltatok-pipeline quickstart\n"
        "  deltatok-pipeline run configs/quickstart.yaml --set tokenizer.steps=2000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=Parser)
    run = kinds.add_parser("run", help="run what is not done")
    plan = kinds.add_parser("plan", help="say what is done and what would run")
    quick = kinds.add_parser("quickstart", help="the whole pipeline on a built-in little world")
    for kind in (run, plan):
        kind.add_argument("config", metavar="CONFIG", type=Path, help="a pipeline file (YAML)")
    for kind in (run, plan, quick):
        kind.add_argument("--out", help="folder of all results [the file's `out`]")
        kind.add_argument(
            "--set", action="append", default=[], metavar="STAGE.KEY=VALUE", help="any setting"
        )
    return parser


def _run(words: list[str]) -> None:
    arguments = _parser().parse_args(words)
    file = quickstart_file() if arguments.kind == "quickstart" else arguments.config
    pipeline = read_pipeline(file, out=arguments.out, settings=arguments.set)
    if arguments.kind == "plan":
        _print_plan(pipeline)
        return
    seconds = run_pipeline(pipeline)
    report = _report_folder(pipeline)
    if report is None:
        print(f"results: {pipeline.out}")
        return
    _add_seconds(report / "report.json", seconds)
    print(f"report: {report / 'report.html'}")


def _print_plan(pipeline: Pipeline) -> None:
    todo = stages_to_run(pipeline)
    for stage in pipeline.stages:
        state = f"to run, about {stage.seconds:.0f} s" if stage in todo else "done"
        print(f"{stage.name:<16} {stage.command:<28} {state}")
    print(f"results: {pipeline.out}")


def _report_folder(pipeline: Pipeline) -> Path | None:
    """Where the last evaluation of the pipeline wrote its report."""
    for stage in reversed(pipeline.stages):
        if stage.command == "deltatok-evaluate forecast":
            return Path(stage.settings["out"])
    return None


def _add_seconds(file: Path, seconds: dict[str, float]) -> None:
    """Put the wall time of every stage into report.json."""
    report = json.loads(file.read_text(encoding="utf-8"))
    report["seconds"] = report.get("seconds", {}) | {"stages": seconds}
    write_json(file, report)
