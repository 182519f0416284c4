"""deltatok-evaluate: forecasts scored from caches, FLOPs counted, storage types compared."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import parse_config, run_command, run_subcommand

USAGE = """usage: deltatok-evaluate {forecast,compare,flops,cache-fidelity} [--help] ...

  forecast         roll the world model out over an evaluation cache: report.json and report.html
  compare          several reports side by side, paired by sequence, with intervals
  flops            GFLOPs of every part, counted from the real modules
  cache-fidelity   what a storage type costs: one cache held against another of the same windows

examples:
  deltatok-evaluate flops --frame-size 512
  deltatok-evaluate forecast --patches cache/val --labels labels/val --tokenizer runs/tokenizer \\
      --world runs/world --head runs/head --dataset little-world --out runs/report
  deltatok-evaluate compare runs/report-a runs/report-b --out runs/compare
  deltatok-evaluate cache-fidelity --patches cache/int8 --reference cache/float16"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-evaluate`."""
    words = list(sys.argv[1:] if argv is None else argv)
    kinds = {
        "forecast": _forecast,
        "compare": _compare,
        "flops": _flops,
        "cache-fidelity": _cache_fidelity,
    }
    return run_command(lambda: run_subcommand("deltatok-evaluate", kinds, USAGE, words))


def _forecast(words: list[str]) -> None:
    from ...evaluate.forecast.config import ForecastConfig

    config = parse_config(
        ForecastConfig,
        words,
        prog="deltatok-evaluate forecast",
        summary="Score forecasts from an evaluation cache: best-of-many, mean, bounds, pictures.",
        example="deltatok-evaluate forecast --patches cache/val --tokenizer runs/tokenizer "
        "--world runs/world --dataset little-world --out runs/report",
    )
    from ...evaluate.forecast.run import run_forecast

    run_forecast(config)
    print(f"report: {Path(config.out) / 'report.html'}")


def _compare(words: list[str]) -> None:
    from ...evaluate.compare import CompareConfig, run_compare

    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    folders = ["--reports", *words[:count]] if count else []
    config = parse_config(
        CompareConfig,
        [*folders, *words[count:]],
        prog="deltatok-evaluate compare",
        summary="Set reports side by side, paired by sequence: values, and differences to the "
        "first, with intervals.",
        example="deltatok-evaluate compare runs/report-a runs/report-b --out runs/compare",
    )
    run_compare(config)
    print((Path(config.out) / "compare.md").read_text(encoding="utf-8"))
    print(f"comparison: {Path(config.out) / 'compare.html'}")


def _flops(words: list[str]) -> None:
    from ...evaluate.flops import CONVENTION, FlopsConfig, flops_rows, flops_table, paper_table_b

    config = parse_config(
        FlopsConfig,
        words,
        prog="deltatok-evaluate flops",
        summary="Count GFLOPs of backbone, encoder, decoder, predictor and of a training window.",
        example="deltatok-evaluate flops --frame-size 512 --set world.num_samples_train=64",
    )
    print(CONVENTION)
    print(flops_table([(f"{config.frame_size} px", flops_rows(config))]))
    print("\nAs the paper's Table B counts (plain blocks, norms and activations counted too):")
    print(flops_table([(f"{config.frame_size} px", paper_table_b(config))]))


def _cache_fidelity(words: list[str]) -> None:
    from ...evaluate.cache_fidelity import CacheFidelityConfig, fidelity_table, run_cache_fidelity

    config = parse_config(
        CacheFidelityConfig,
        words,
        prog="deltatok-evaluate cache-fidelity",
        summary="Hold a patch-token cache against another one of the same windows: what its storage"
        " type costs in error, reconstruction and mIoU, and saves in bytes.",
        example="deltatok-evaluate cache-fidelity --patches cache/int8 --reference cache/float16 "
        "--tokenizer runs/tokenizer --out runs/fidelity.json",
    )
    print(fidelity_table(run_cache_fidelity(config)))
    if config.out is not None:
        print(f"cache fidelity: {config.out}")
