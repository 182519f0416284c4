"""The section of a report on modes: recall beside precision, and how often each mode is hit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from ..tables import Table
from .plots import COLOURS, Plot, draw_plot
from .rows import (
    HORIZONS,
    MODE_ROW_LABELS,
    MODE_ROWS,
    ReportRow,
    find_row,
    mode_pairs,
    show,
    show_row,
)

_PAIR = {"mode_recall": "mode recall %", "mode_precision": "mode precision %"}
_FREQUENCIES = {
    "frequency_distance": "distance %",
    "impossible_mass": "no possible future %",
    "excess_mass": "too often %",
    "likeliest_share": "likeliest among hits %",
    "likeliest_probability": "by its probability %",
    "mode_recall_weighted": "recall by probability %",
}


@dataclass(frozen=True, kw_only=True)
class ModeSection:
    """What the page shows of modes."""

    table: Table
    """Recall beside precision: a line for each row that has both, then true draws."""
    frequencies: Table
    """How far the frequencies of forecasts are from the probabilities, and in what."""
    horizons: tuple[str, ...]
    """Those with a calibration; none without samples."""
    plot: Plot | None
    """How often samples hit the futures that are possible, against how probable these are."""
    bins: Table
    """The same as numbers."""


def mode_section(
    rows: Sequence[ReportRow], found: Mapping[str, Any], *, num_samples: int
) -> ModeSection | None:
    """None where futures are not known. `found`: probes["modes"] of the report."""
    pairs = {(pair.row, pair.horizon): pair for pair in mode_pairs(rows)}
    if not pairs:
        return None
    body = []
    for name in MODE_ROWS:
        cells = [pairs.get((name, horizon)) for horizon in HORIZONS]
        if any(cells):
            shown = [(show_row(c.recall), show_row(c.precision)) if c else "--" for c in cells]
            body.append([MODE_ROW_LABELS[name], *(cell for pair in shown for cell in pair)])
    drawn = {
        f"{num_samples} true draws (expected)": "true_draws",
        "1 true draw (expected)": "one_true_draw",
    }
    for label, key in drawn.items():
        if all(horizon in found for horizon in HORIZONS):
            expected = [show(found[h][key][metric], metric) for h in HORIZONS for metric in _PAIR]
            body.append([label, *expected])
    horizons = tuple(horizon for horizon in HORIZONS if horizon in found)
    bins = [
        [
            horizon,
            str(part["modes"]),
            f"{100 * part['frequency']:.1f}",
            f"{100 * part['probability']:.1f}",
        ]
        for horizon in horizons
        for part in found[horizon]["reliability"]
    ]
    return ModeSection(
        table=Table(["row", *(f"{head} {h}" for h in HORIZONS for head in _PAIR.values())], body),
        frequencies=_frequencies(rows, found, num_samples=num_samples),
        horizons=horizons,
        plot=_plot({h: found[h]["reliability"] for h in horizons}) if horizons else None,
        bins=Table(["horizon", "modes", "share of samples %", "probability %"], bins),
    )


def _frequencies(rows: Sequence[ReportRow], found: Mapping[str, Any], *, num_samples: int) -> Table:
    """A line a horizon and row; of true draws what chance leaves: they are possible, each of them,
    and the likeliest as often as it is probable."""
    body = []
    for horizon in HORIZONS:
        for name in MODE_ROWS:
            cells = [find_row(rows, horizon=horizon, row=name, metric=m) for m in _FREQUENCIES]
            if any(cell is not None for cell in cells):
                body.append([f"{MODE_ROW_LABELS[name]}, {horizon}", *map(show_row, cells)])
        if horizon in found:
            part = found[horizon]
            chance = show(part["frequency_distance_of_true_draws"], "excess_mass")
            weighted = show(part["true_draws"]["mode_recall_weighted"], "mode_recall_weighted")
            label = f"{num_samples} true draws (expected), {horizon}"
            body.append([label, chance, show(0.0, "impossible_mass"), chance, "-", "-", weighted])
    return Table(["row", *_FREQUENCIES.values()], body)


def _plot(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> Plot:
    """bins: horizon -> [{"frequency", "probability"}]."""
    lines = [
        f"{horizon}: "
        + ", ".join(
            f"{100 * part['frequency']:.0f} % of samples for {100 * part['probability']:.0f} %"
            for part in parts
        )
        for horizon, parts in bins.items()
    ]

    def draw(figure: Figure, ink: dict[str, str]) -> None:
        panels = figure.subplots(1, len(bins), squeeze=False)[0]
        for axes, (horizon, parts) in zip(panels, bins.items(), strict=True):
            x, y = ([part[key] for part in parts] for key in ("frequency", "probability"))
            axes.plot([0, 1], [0, 1], color=ink["faint"], linewidth=1.2)
            axes.plot(x, y, color=COLOURS[0], linewidth=1.4, marker="o", markersize=4)
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), title=horizon)
            axes.set_xlabel("share of samples that hit a mode")
        panels[0].set_ylabel("its probability")

    alt = "Share of the samples that hit a mode against its probability. " + "; ".join(lines) + "."
    return draw_plot(draw, alt=alt)
