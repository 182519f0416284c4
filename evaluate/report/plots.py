"""The drawn plots of a report: training curves and best-of-k, each for light and dark pages.

matplotlib's Figure is used directly: no window system, no global state. A `Plot` holds both
versions of a picture; the page shows the one that fits the reader's colour scheme.
"""

import functools
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...shards.errors import UsageError
from ...shards.files import read_text
from .rows import HORIZONS, ROW_LABELS, ReportRow, find_value

_LIGHT = {"ink": "#24292f", "faint": "#d0d7de"}
_DARK = {"ink": "#d6dce3", "faint": "#3d444d"}
# Okabe and Ito's colours, told apart with colour-blind eyes; light enough for both schemes.
COLOURS = ("#0090d0", "#e08000", "#00a070", "#cc70a0", "#d05a20", "#56b4e9", "#a0a000")
STYLES = ("-", "--", "-.", ":")  # of two lines that are equal, both are seen
_DPI = 144  # twice the page's pixels, for sharp text on high-density screens
_BEST_OF_K_LINES = ("copy_last", "discriminative", "mean", "reconstruction")


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
        UsageError: no such file, a line that is no JSON, or no loss in it. A last line without
            its newline, as a killed run leaves it, is not read.
    """
    file = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path)
    try:
        text = read_text(file)
    except OSError as error:
        raise UsageError(f"--curves {path}: {file} cannot be read ({error.strerror})") from None
    losses: dict[str, tuple[list[int], list[float]]] = {}
    whole_lines = text[: text.rfind("\n") + 1].splitlines()
    for number, line in enumerate(whole_lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"--curves {path}: line {number} is no JSON ({error})") from None
        _add_losses(losses, entry)
    if not losses:
        raise UsageError(f'--curves {path}: no line with a "step" and a loss; give a training run')
    name = file.parent.name if file.name == "log.jsonl" else file.stem
    return Curve(name=name or str(file), losses=losses)


def _add_losses(losses: dict[str, tuple[list[int], list[float]]], entry: Any) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return
    for key, value in entry.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key.endswith("loss") and is_number and math.isfinite(value):
            steps, values = losses.setdefault(key, ([], []))
            steps.append(entry["step"])
            values.append(float(value))


def plot_curves(curves: Sequence[Curve]) -> list[Plot]:
    """One plot for each curve: loss by step, logarithmic where all losses are positive."""
    return [
        draw_plot(functools.partial(_draw_curve, curve=curve), alt=_curve_alt(curve))
        for curve in curves
    ]


def plot_best_of_k(
    curve: Sequence[dict[str, float | int | str]], rows: Sequence[ReportRow]
) -> Plot:
    """Feature loss of the best of k samples against k, with the other rows as level lines."""
    lines = []
    for horizon in HORIZONS:
        points = [point for point in curve if point["horizon"] == horizon]
        first, last = points[0], points[-1]
        lines.append(
            f"{horizon}: {first['feature_loss']:.4g} with 1 sample, "
            f"{last['feature_loss']:.4g} with {last['k']}"
        )
    alt = "Feature loss of the best of k samples, falling with k. " + "; ".join(lines) + "."
    draw = functools.partial(_draw_best_of_k, curve=curve, rows=rows)
    return draw_plot(draw, alt=alt)


def draw_plot(draw: Callable[[Figure, dict[str, str]], None], *, alt: str) -> Plot:
    """`draw(figure, ink)` twice: with the inks ("ink", "faint") of light and of dark pages."""
    return Plot(alt=alt, light=_render(draw, _LIGHT), dark=_render(draw, _DARK))


def _render(draw: Callable[[Figure, dict[str, str]], None], ink: dict[str, str]) -> bytes:
    figure = Figure(figsize=(6.4, 3.2), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    draw(figure, ink)
    for axes in figure.axes:
        _dress(axes, ink)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return buffer.getvalue()


def _dress(axes: Any, ink: dict[str, str]) -> None:
    """Axes in the page's colours, without a box, over a faint grid."""
    axes.tick_params(colors=ink["ink"], which="both", labelsize=8)
    axes.grid(visible=True, color=ink["faint"], linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink["faint"])
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(ink["ink"])
        text.set_fontsize(9)
    legend = axes.get_legend()
    if legend is not None:
        legend.get_frame().set_alpha(0)
        for text in legend.get_texts():
            text.set_color(ink["ink"])
            text.set_fontsize(8)


def _draw_curve(figure: Figure, ink: dict[str, str], *, curve: Curve) -> None:
    axes = figure.add_subplot()
    kinds = zip(cycle(COLOURS), cycle(STYLES), sorted(curve.losses), strict=False)
    for colour, style, key in kinds:
        steps, values = curve.losses[key]
        marker = "o" if len(steps) == 1 else None
        axes.plot(
            steps, values, color=colour, linestyle=style, linewidth=1.4, marker=marker, label=key
        )
    if all(value > 0 for _, values in curve.losses.values() for value in values):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss", title=curve.name)
    legend_below(figure, ink, columns=3)


def _curve_alt(curve: Curve) -> str:
    parts = [
        f"{key} from {values[0]:.4g} at step {steps[0]} to {values[-1]:.4g} at step {steps[-1]}"
        for key, (steps, values) in sorted(curve.losses.items())
    ]
    return f"Training curve of {curve.name}: {'; '.join(parts)}."


def _draw_best_of_k(
    figure: Figure,
    ink: dict[str, str],
    *,
    curve: Sequence[dict[str, float | int | str]],
    rows: Sequence[ReportRow],
) -> None:
    for i, horizon in enumerate(HORIZONS):
        axes = figure.add_subplot(1, 2, i + 1)
        points = [point for point in curve if point["horizon"] == horizon]
        ks = [int(point["k"]) for point in points]
        losses = [float(point["feature_loss"]) for point in points]
        axes.plot(ks, losses, color=COLOURS[0], linewidth=1.8, marker="o", markersize=3)
        axes.annotate(
            "best of k",
            (ks[-1], losses[-1]),
            color=ink["ink"],
            fontsize=8,
            xytext=(0, -10),
            textcoords="offset points",
            ha="right",
        )
        for colour, name in zip(COLOURS[1:], _BEST_OF_K_LINES, strict=False):
            level = find_value(rows, horizon=horizon, row=name, metric="feature_loss")
            if level is not None:
                label = ROW_LABELS[name].split(" (")[0]
                axes.axhline(level, color=colour, linewidth=1.2, linestyle="--", label=label)
        axes.set(xlabel="samples k", title=horizon)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if i == 0:
            axes.set_ylabel("feature loss")
    legend_below(figure, ink, columns=4)


def legend_below(figure: Figure, ink: dict[str, str], *, columns: int) -> None:
    """Put the legend of the first axes below all of them, where it covers no line."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, fontsize=8
        )
        legend.get_frame().set_alpha(0)
        for text in legend.get_texts():
            text.set_color(ink["ink"])
