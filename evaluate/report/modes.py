"""The section of a report on modes: recall, precision, and calibration of their frequencies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from ..tables import Table
from .plots import COLOURS, Plot, draw_plot
from .rows import HORIZONS, MODE_METRICS, MODE_ROWS, ROW_LABELS, ReportRow, find_row, show, show_row

_HEADS = {
    "mode_recall": "recall %",
    "mode_recall_weighted": "recall %, by probability",
    "mode_precision": "precision %",
}
_LABELS = ROW_LABELS | {"samples": "All samples"}


@dataclass(frozen=True, kw_only=True)
class ModeSection:
    """What the page shows of modes."""

    table: Table
    """A line for each row that has mode metrics, then true draws."""
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
    columns = [(metric, horizon) for metric in MODE_METRICS for horizon in HORIZONS]
    body = []
    for name in MODE_ROWS:
        cells = [find_row(rows, horizon=h, row=name, metric=metric) for metric, h in columns]
        if any(cell is not None for cell in cells):
            body.append([_LABELS[name], *map(show_row, cells)])
    if not body:
        return None
    drawn = {
        f"{num_samples} true draws (expected)": "true_draws",
        "1 true draw (expected)": "one_true_draw",
    }
    for label, key in drawn.items():
        if all(horizon in found for horizon in HORIZONS):
            body.append([label, *(show(found[h][key][metric], metric) for metric, h in columns)])
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
        table=Table(["row", *(f"{_HEADS[metric]} {horizon}" for metric, horizon in columns)], body),
        horizons=horizons,
        plot=_plot({h: found[h]["reliability"] for h in horizons}) if horizons else None,
        bins=Table(["horizon", "modes", "share of samples %", "probability %"], bins),
    )


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
