"""The picture of docs/findings.md on winners, from winners.json and choices.json beside it.

    python tests/experiments/winners_figure.py --out docs/winners.png

Mode recall against mode precision of 20 samples at the mid horizon, one point an arm: colour by K,
the number of winners beside it; crosses are 95 % intervals over clips (and trainings, where there
are several). Right: a choice at sampling time. Green: the aim; grey: the discriminative forecast.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY = "#0090d0", "#e08000", "#00a070", "#6e7781"
COLOURS = {4: GREEN, 16: BLUE, 64: ORANGE}
AIM_RECALL, AIM_PRECISION = 65, 75
LIMITS = {"xlim": (5, 90), "ylim": (25, 90)}
RECALL, PRECISION = "mid samples mode_recall", "mid samples mode_precision"
SHAPES = {"first": "o", "likely": "v", "far": "s", "both": "D", "medoids": "^"}


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the PNG")
    arguments = parser.parse_args()
    figure = Figure(figsize=(10.5, 4.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    arms = {row["arm"]: row for row in _rows("winners.json")}
    _arms(left, arms)
    _choices(right, _rows("choices.json"))
    for axes in (left, right):
        _reference(axes, arms["discriminative"]["values"])
        axes.grid(color="#d0d7de", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set(xlabel="mode recall: possible futures that are hit, %", **LIMITS)
        axes.legend(fontsize=7.5, frameon=False, loc="lower left")
    left.set_ylabel("mode precision: samples that are possible, %")
    left.set_title("Candidates K; beside each point the winners", fontsize=10)
    right.set_title("20 samples chosen among 100", fontsize=10)
    figure.savefig(arguments.out, facecolor="white", metadata={"Software": None})


def _rows(name: str) -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = json.loads((HERE / name).read_text())["rows"]
    return read


def _point(
    axes: Axes, names: Iterable[str], values: Mapping[str, Any], *, bars: bool = True, **style: Any
) -> tuple[float, float]:
    """Draws recall (first name) against precision (second); gives where, per cent."""
    (x, x_low, x_high), (y, y_low, y_high) = ([100 * v for v in values[name]] for name in names)
    if bars:
        axes.plot([x_low, x_high], [y, y], color=style["color"], linewidth=0.8, alpha=0.6)
        axes.plot([x, x], [y_low, y_high], color=style["color"], linewidth=0.8, alpha=0.6)
    axes.plot([x], [y], linestyle="none", **style)
    return x, y


def _arms(axes: Axes, arms: Mapping[str, Mapping[str, Any]]) -> None:
    """The arms of fixed K and winners; those of one K joined, in the order of their winners."""
    for samples, colour in COLOURS.items():
        found = sorted(
            (row["settings"]["num_winners"], row["values"])
            for name, row in arms.items()
            if name.startswith(f"{samples}-") and name.count(" ") == 0
        )
        style = {"color": colour, "marker": "o", "markersize": 5}
        places = [_point(axes, (RECALL, PRECISION), values, **style) for _, values in found]
        axes.plot(*zip(*places, strict=True), color=colour, linewidth=1, label=f"K = {samples}")
        for (winners, _), place in zip(found, places, strict=True):
            offset = (5, -12) if samples == 64 else (5, 5)
            _note(axes, str(winners), place, color=colour, offset=offset)


def _choices(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        samples, winners = row["arm"].split("-")
        style = {"color": COLOURS[int(samples)], "marker": SHAPES[row["rule"]], "markersize": 6}
        hollow = {} if winners == "1" else {"markerfacecolor": "white"}
        place = _point(axes, (RECALL, PRECISION), row["values"], **style, **hollow)
        if row["rule"] == "first":
            note = f"{winners} of {samples}"
            _note(axes, note, place, color=style["color"], offset=(5, -12))
    for rule in dict.fromkeys(row["rule"] for row in rows):
        axes.plot([], [], linestyle="none", color=GREY, marker=SHAPES[rule], label=rule)


def _note(
    axes: Axes, text: str, place: tuple[float, float], *, color: str, offset: tuple[int, int]
) -> None:
    axes.annotate(text, place, fontsize=9, color=color, xytext=offset, textcoords="offset points")


def _reference(axes: Axes, values: Mapping[str, Any]) -> None:
    """The aim, and the discriminative forecast."""
    (_, right), (_, top) = LIMITS["xlim"], LIMITS["ylim"]
    axes.fill_between([AIM_RECALL, right], AIM_PRECISION, top, color="#d8f0e4", zorder=0)
    axes.text(AIM_RECALL + 1, AIM_PRECISION + 1, "aim", fontsize=8, color=GREEN)
    names = ("mid discriminative mode_recall", "mid discriminative mode_precision")
    x, y = _point(axes, names, values, color=GREY, marker="x", markersize=6)
    axes.text(x + 2, y - 4, "discriminative", fontsize=8, color=GREY)


if __name__ == "__main__":
    main()
