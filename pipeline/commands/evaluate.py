"""deltatok-evaluate: forecasts scored from caches, FLOPs counted, storage types compared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import Command, run_table

if TYPE_CHECKING:
    from ...evaluate.cache_fidelity import CacheFidelityConfig
    from ...evaluate.compare import CompareConfig
    from ...evaluate.flops import FlopsConfig
    from ...evaluate.forecast.config import ForecastConfig

COMMANDS = {
    "forecast": Command(
        help="roll the world model out over an evaluation cache: report.json and report.html",
        summary="Score forecasts from an evaluation cache: best-of-many, mean, bounds, pictures.",
        examples=(
            "deltatok-evaluate forecast --patches cache/val --labels labels/val \\\n"
            "      --tokenizer runs/tokenizer --world runs/world --head runs/head \\\n"
            "      --dataset little-world --out runs/report",
        ),
        config="evaluate.forecast.config:ForecastConfig",
        run="pipeline.commands.evaluate:forecast",
    ),
    "compare": Command(
        help="several reports side by side, paired by sequence, with intervals",
        summary="Set reports side by side, paired by sequence: values, and differences to the "
        "first, with intervals.",
        examples=("deltatok-evaluate compare runs/report-a runs/report-b --out runs/compare",),
        config="evaluate.compare:CompareConfig",
        run="pipeline.commands.evaluate:compare",
        done="comparison: {out}/compare.html",
        positional="reports",
    ),
    "flops": Command(
        help="GFLOPs of every part, counted from the real modules",
        summary="Count GFLOPs of backbone, encoder, decoder, predictor and of a training window.",
        examples=("deltatok-evaluate flops --frame-size 512 --set world.num_samples_train=64",),
        config="evaluate.flops:FlopsConfig",
        run="pipeline.commands.evaluate:flops",
    ),
    "cache-fidelity": Command(
        help="what a storage type costs: one cache held against another of the same windows",
        summary="Hold a patch-token cache against another one of the same windows: what its storage"
        " type costs in error, reconstruction and mIoU, and saves in bytes.",
        examples=(
            "deltatok-evaluate cache-fidelity --patches cache/int8 --reference cache/float16 \\\n"
            "      --tokenizer runs/tokenizer --out runs/fidelity.json",
        ),
        config="evaluate.cache_fidelity:CacheFidelityConfig",
        run="pipeline.commands.evaluate:cache_fidelity",
    ),
}


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-evaluate`."""
    return run_table("deltatok-evaluate", COMMANDS, words)


def forecast(config: "ForecastConfig") -> str:
    """Evaluates; what is wrong, the scores, and the lines that end a report."""
    from ...evaluate.forecast.diagnosis import diagnosis_text
    from ...evaluate.forecast.run import run_forecast
    from ...evaluate.report.rows import table
    from ...evaluate.report.write import report_json

    report = run_forecast(config)
    faults = [diagnosis_text(fault) for fault in report.diagnosis]
    return "\n".join(
        [*faults, table(report.rows).markdown(), *last_lines(report_json(report), config.out)]
    )


def last_lines(report: Mapping[str, Any], folder: str | Path) -> list[str]:
    """What a report.json says in short, and the address of its page."""
    lines = [report["mode_pairs"]["text"], report["expected_order"]["text"]]
    page = (Path(folder) / "report.html").resolve().as_uri()
    return [*filter(None, lines), f"report: {page}"]


def compare(config: "CompareConfig") -> str:
    """Compares the reports; the comparison as Markdown."""
    from ...evaluate.compare import run_compare

    run_compare(config)
    return (Path(config.out) / "compare.md").read_text(encoding="utf-8")


def flops(config: "FlopsConfig") -> str:
    """The tables of FLOPs, and how they are counted."""
    from ...evaluate.flops import CONVENTION, flops_rows, flops_table, paper_table_b
    from ...shards.evaluation.geometry import shown_size

    size = f"{shown_size(config.frame_size)} px"
    return (
        f"{CONVENTION}\n{flops_table([(size, flops_rows(config))])}\n"
        "\nAs the paper's Table B counts (plain blocks, norms and activations counted too):\n"
        f"{flops_table([(size, paper_table_b(config))])}"
    )


def cache_fidelity(config: "CacheFidelityConfig") -> str:
    """The table of what the storage type costs."""
    from ...evaluate.cache_fidelity import fidelity_table, run_cache_fidelity

    table = fidelity_table(run_cache_fidelity(config))
    return table if config.out is None else f"{table}\ncache fidelity: {config.out}"
