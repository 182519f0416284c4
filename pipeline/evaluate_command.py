"""deltatok-evaluate: forecasts scored from caches, with tables and pictures."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..shards.errors import UsageError
from .command import parse_config, run_command

USAGE = """usage: deltatok-evaluate {forecast} [--help] ...

  forecast   roll the world model out over an evaluation cache: report.json and report.html

example:
  deltatok-evaluate forecast --patches cache/val --labels labels/val --tokenizer runs/tokenizer \\
      --world runs/world --head runs/head --dataset little-world --out runs/report"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-evaluate`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(words))


def _run(words: list[str]) -> None:
    kinds: dict[str, Callable[[list[str]], None]] = {"forecast": _forecast}
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return
    if words[0] not in kinds:
        raise UsageError(f"deltatok-evaluate {words[0]}: wanted one of {', '.join(kinds)}\n{USAGE}")
    kinds[words[0]](words[1:])


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
