"""deltatok-evaluate: forecasts scored from caches, with tables and pictures; FLOPs counted."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .command import parse_config, run_command, run_subcommand

USAGE = """usage: deltatok-evaluate {forecast,flops} [--help] ...

  forecast   roll the world model out over an evaluation cache: report.json and report.html
  flops      GFLOPs of every part, counted from the real modules

examples:
  deltatok-evaluate flops --frame-size 512
  deltatok-evaluate forecast --patches cache/val --labels labels/val --tokenizer runs/tokenizer \\
      --world runs/world --head runs/head --dataset little-world --out runs/report"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-evaluate`."""
    words = list(sys.argv[1:] if argv is None else argv)
    kinds = {"forecast": _forecast, "flops": _flops}
    return run_command(lambda: run_subcommand("deltatok-evaluate", kinds, USAGE, words))


def _forecast(words: list[str]) -> None:
    from ..evaluate.config import ForecastConfig

    config = parse_config(
        ForecastConfig,
        words,
        prog="deltatok-evaluate forecast",
        summary="Score forecasts from an evaluation cache: best-of-many, mean, bounds, pictures.",
        example="deltatok-evaluate forecast --patches cache/val --tokenizer runs/tokenizer "
        "--world runs/world --dataset little-world --out runs/report",
    )
    from ..evaluate.forecast import run_forecast

    run_forecast(config)
    print(f"report: {Path(config.out) / 'report.html'}")


def _flops(words: list[str]) -> None:
    from ..evaluate.flops import CONVENTION, FlopsConfig, flops_rows, markdown_table, paper_table_b

    config = parse_config(
        FlopsConfig,
        words,
        prog="deltatok-evaluate flops",
        summary="Count GFLOPs of backbone, encoder, decoder, predictor and of a training window.",
        example="deltatok-evaluate flops --frame-size 512 --set world.num_samples_train=64",
    )
    print(CONVENTION)
    print(markdown_table([(f"{config.frame_size} px", flops_rows(config))]))
    print("\nAs the paper's Table B counts (plain blocks, norms and activations counted too):")
    print(markdown_table([(f"{config.frame_size} px", paper_table_b(config))]))
