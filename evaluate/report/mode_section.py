"""The section of a report on modes: recall, precision, and calibration of their frequencies."""

import functools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from .page import plot_html, table_html
from .plots import COLOURS, Plot, draw_plot
from .rows import HORIZONS, MODE_METRICS, MODE_ROWS, ROW_LABELS, ReportRow, find_row, show, show_row

_HEADS = {
    "mode_recall": "recall %",
    "mode_recall_weighted": "recall %, by probability",
    "mode_precision": "precision %",
}
_LABELS = ROW_LABELS | {"samples": "All samples"}
_FACTS = {
    "modes_per_window": "possible futures a window that can be told apart",
    "calibration_error": "calibration error: |frequency - probability| over the bins below",
    "frequency_distance": "half the summed |frequency - probability|, by window",
    "frequency_distance_of_true_draws": "the same of as many true draws: what chance alone leaves",
}


def mode_table(
    rows: Sequence[ReportRow], found: Mapping[str, Any], *, num_samples: int
) -> tuple[list[str], list[list[str]]]:
    """Header and body cells: a line for each row that has mode metrics, then true draws; empty
    without any. `found`: probes["modes"] of the report."""
    columns = [(metric, horizon) for metric in MODE_METRICS for horizon in HORIZONS]
    header = ["row", *(f"{_HEADS[metric]} {horizon}" for metric, horizon in columns)]
    body = []
    for name in MODE_ROWS:
        cells = [find_row(rows, horizon=h, row=name, metric=metric) for metric, h in columns]
        if any(cell is not None for cell in cells):
            body.append([_LABELS[name], *map(show_row, cells)])
    drawn = {
        f"{num_samples} true draws (expected)": "true_draws",
        "1 true draw (expected)": "one_true_draw",
    }
    for label, key in drawn.items():
        if all(horizon in found for horizon in HORIZONS):
            body.append([label, *(show(found[h][key][metric], metric) for metric, h in columns)])
    return header, body


def modes_html(
    rows: Sequence[ReportRow], found: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
    """The section; nothing where futures are not known."""
    header, body = mode_table(rows, found, num_samples=config["num_samples"])
    if not body:
        return ""
    markdown = "\n".join(
        "| " + " | ".join(cells) + " |"
        for cells in (header, ["---", *["---:"] * (len(header) - 1)], *body)
    )
    text = (
        "Every possible future of these clips is known, with its probability. A forecast hits the "
        "future that it looks most like, where the two class maps overlap (IoU) by "
        f"{found['overlap']:g} or more; futures that overlap so much are one. Recall: share of the "
        "possible futures that some forecast hits. Precision: share of the forecasts that are a "
        "possible future. Present is what the head can tell at best."
    )
    return f"""<h2>Modes</h2>
<p>{escape(text)}</p>
<div class="wide">{table_html(header, body)}</div>
<details><summary>As Markdown</summary><pre>{escape(markdown)}</pre></details>
{_calibration(found)}"""


def _calibration(found: Mapping[str, Any]) -> str:
    horizons = [horizon for horizon in HORIZONS if horizon in found]
    if not horizons:
        return ""
    header = ["calibration of the samples", *horizons]
    facts = [
        [text, *(f"{found[horizon][key]:.3g}" for horizon in horizons)]
        for key, text in _FACTS.items()
    ]
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
    head = ["horizon", "modes", "share of samples %", "probability %"]
    return f"""{plot_html(_plot(found, horizons))}
<div class="wide">{table_html(header, facts)}</div>
<details><summary>Modes by the share of samples that hit them</summary>
<div class="wide">{table_html(head, bins)}</div></details>"""


def _plot(found: Mapping[str, Any], horizons: Sequence[str]) -> Plot:
    lines = [
        f"{horizon}: "
        + ", ".join(
            f"{100 * part['frequency']:.0f} % of samples for {100 * part['probability']:.0f} %"
            for part in found[horizon]["reliability"]
        )
        for horizon in horizons
    ]
    alt = "Share of the samples that hit a mode against its probability. " + "; ".join(lines) + "."
    return draw_plot(functools.partial(_draw, found=found, horizons=horizons), alt=alt)


def _draw(
    figure: Figure, ink: dict[str, str], *, found: Mapping[str, Any], horizons: Sequence[str]
) -> None:
    for i, horizon in enumerate(horizons):
        axes = figure.add_subplot(1, len(horizons), i + 1)
        bins = found[horizon]["reliability"]
        x, y = ([part[key] for part in bins] for key in ("frequency", "probability"))
        axes.plot([0, 1], [0, 1], color=ink["faint"], linewidth=1.2)
        axes.plot(x, y, color=COLOURS[0], linewidth=1.4, marker="o", markersize=4)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), title=horizon)
        axes.set_xlabel("share of samples that hit a mode")
        if i == 0:
            axes.set_ylabel("its probability")
