"""The drawn plots of a report: training curves and best-of-k, each for light and dark pages.

matplotlib's Figure is used directly: no window system, no global state. A `Plot` holds both
versions of a picture; the page shows the one that fits the reader's colour scheme.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...shards.errors import UsageError
from ...shards.files import read_text
from ...shards.schema import is_number
from .rows import HORIZONS, ROW_LABELS, ReportRow, find_value

_LIGHT = {"ink": "#24292f", "faint": "#d0d7de"}
_DARK = {"ink": "#d6dce3", "faint": "#3d444d"}
# Okabe and Ito's colours, told apart with colour-blind eyes; light enough for both schemes.
COLOURS = ("#0090d0", "#e08000", "#00a070", "#cc70a0", "#d05a20", "#56b4e9", "#a0a000")
STYLES = ("-", "--", "-.", ":")  # of two lines that are equal, both are seen
_DPI = 144  # twice the page's pixels, for sharp text on high-density screens
_STYLE = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.framealpha": 0,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
_BEST_OF_K_LINES = ("copy_last", "discriminative", "reconstruction")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One picture as PNG bytes for light and for dark pages, and its text for who sees neither."""

    alt: str
    light: bytes
    dark: bytes


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A training curve: loss by step, read from a log.jsonl."""

    name: str
    losses: dict[str, tuple[list[int], list[float]]]  # logged key -> steps, values


def read_curve(path: str) -> Curve:
    """The losses (keys that end with "loss") of a run folder or of a log.jsonl.

    Raises:
        UsageError: no such file or none of text, a line that is no JSON, or no loss in it. A last
            line without its newline, as a killed run leaves it, is not read.
    """
    file = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path)
    losses: dict[str, tuple[list[int], list[float]]] = {}
    try:
        text = read_text(file)
        for entry in map(json.loads, text[: text.rfind("\n") + 1].splitlines()):
            if not isinstance(entry, dict) or not is_number(entry.get("step")):
                continue
            for key, value in entry.items():
                if key.endswith("loss") and is_number(value):
                    steps, values = losses.setdefault(key, ([], []))
                    steps.append(entry["step"])
                    values.append(float(value))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--curves {path}: {file} cannot be read ({error})") from None
    if not losses:
        raise UsageError(f'--curves {path}: no line with a "step" and a loss; give a training run')
    name = file.parent.name if file.name == "log.jsonl" else file.stem
    return Curve(name=name or str(file), losses=losses)


def plot_curves(curves: Sequence[Curve]) -> list[Plot]:
    """One plot for each curve: loss by step, logarithmic where all losses are positive."""
    return [_plot_curve(curve) for curve in curves]


def _plot_curve(curve: Curve) -> Plot:
    losses = sorted(curve.losses.items())
    ends = [
        f"{key} from {values[0]:.4g} at step {steps[0]} to {values[-1]:.4g} at step {steps[-1]}"
        for key, (steps, values) in losses
    ]

    def draw(figure: Figure, ink: dict[str, str]) -> None:
        axes = figure.add_subplot()
        for colour, style, (key, found) in zip(cycle(COLOURS), cycle(STYLES), losses, strict=False):
            marker = "o" if len(found[0]) == 1 else None
            axes.plot(
                *found, color=colour, linestyle=style, linewidth=1.4, marker=marker, label=key
            )
        if all(value > 0 for _, (_, values) in losses for value in values):
            axes.set_yscale("log")
        axes.set(xlabel="step", ylabel="loss", title=curve.name)
        legend_below(figure, columns=3)

    return draw_plot(draw, alt=f"Training curve of {curve.name}: {'; '.join(ends)}.")


def plot_best_of_k(curve: Sequence[Mapping[str, Any]], rows: Sequence[ReportRow]) -> Plot:
    """Feature loss of the best of k samples and of the mean of k beside each other against k, with
    intervals, and other rows as level lines."""
    points = {
        horizon: [point for point in curve if point["horizon"] == horizon] for horizon in HORIZONS
    }
    ends = [
        f"{horizon}: one sample {found[0]['feature_loss']:.4g}, best of {found[-1]['k']} "
        f"{found[-1]['feature_loss']:.4g}, mean of {found[-1]['k']} "
        f"{found[-1]['mean_feature_loss']:.4g}"
        for horizon, found in points.items()
    ]

    def draw(figure: Figure, ink: dict[str, str]) -> None:
        for axes, (horizon, found) in zip(figure.subplots(1, 2), points.items(), strict=True):
            lines = (("best of k", "", COLOURS[0]), ("mean of k", "mean_", COLOURS[1]))
            for name, prefix, colour in lines:
                draw_band(
                    axes,
                    [point["k"] for point in found],
                    [point[f"{prefix}feature_loss"] for point in found],
                    [point[f"{prefix}interval_low"] for point in found],
                    [point[f"{prefix}interval_high"] for point in found],
                    colour=colour,
                    label=name,
                )
            for colour, name in zip(COLOURS[2:], _BEST_OF_K_LINES, strict=False):
                level = find_value(rows, horizon=horizon, row=name, metric="feature_loss")
                if level is not None:
                    label = ROW_LABELS[name].split(" (")[0]
                    axes.axhline(level, color=colour, linewidth=1.2, linestyle="--", label=label)
            axes.set(xlabel="samples k", title=horizon)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.axes[0].set_ylabel("feature loss")
        legend_below(figure, columns=5)

    alt = "Feature loss of the best and of the mean of k samples. " + "; ".join(ends) + "."
    return draw_plot(draw, alt=alt)


def draw_plot(draw: Callable[[Figure, dict[str, str]], None], *, alt: str) -> Plot:
    """`draw(figure, ink)` twice: with the inks ("ink", "faint") of light and of dark pages."""
    return Plot(alt=alt, light=_render(draw, _LIGHT), dark=_render(draw, _DARK))


def _render(draw: Callable[[Figure, dict[str, str]], None], ink: dict[str, str]) -> bytes:
    """Axes in the page's colours, without a box, over a faint grid."""
    colours = dict.fromkeys(
        (
            "text.color",
            "axes.labelcolor",
            "axes.titlecolor",
            "xtick.labelcolor",
            "ytick.labelcolor",
        ),
        ink["ink"],
    ) | dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), ink["faint"])
    with rc_context(colours | _STYLE):
        figure = Figure(figsize=(6.4, 3.2), dpi=_DPI, layout="constrained")
        draw(figure, ink)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return buffer.getvalue()


def draw_band(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[float],
    low: Sequence[float | None],
    high: Sequence[float | None],
    *,
    colour: str,
    label: str,
    style: str = "-",
) -> None:
    """A line with its points, and the band of their intervals where all have one."""
    axes.plot(x, values, style, color=colour, lw=1.6, marker="o", markersize=3, label=label)
    lows, highs = ([bound for bound in bounds if bound is not None] for bounds in (low, high))
    if len(lows) == len(highs) == len(values):
        axes.fill_between(x, lows, highs, color=colour, alpha=0.18, linewidth=0)


def legend_below(figure: Figure, *, columns: int) -> None:
    """Put the legend of the first axes below all of them, where it covers no line."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
