"""A comparison for people: Markdown tables, and a page with plots."""

import functools
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .compare import ComparedRow, Comparison, Difference
from .forecast.intervals import Estimate
from .report.page import facts_html, plot_html, table_html, value_text
from .report.plots import COLOURS, Plot, draw_plot
from .report.rows import HORIZONS, METRIC_TITLES, PERCENT, ROW_LABELS, show, show_interval
from .report.template import PAGE, STYLE

LABELS = ROW_LABELS | {"samples": "All samples"}
FIRST_ROWS = (
    "best",
    "predictions_best",
    "dinoworld_best",
    "discriminative",
    "dinoworld",
    "mean",
    "reconstruction",
)
"""The rows that a comparison is about, most of all the first that differs."""
Table = tuple[str, list[str], list[list[str]]]
"""Title, header, body."""

TEXT = (
    "All numbers are of the sequences that every report has. In brackets: 95 % intervals, "
    "sequences (and seeds) drawn again with replacement, the same ones for all reports. A "
    "difference is called better or worse where its interval does not hold 0."
)


def compare_markdown(found: Comparison) -> str:
    """Title, tables, and what differs."""
    parts = [f"# {_title(found)}", _summary(found)]
    parts += ["\n".join(f"- {line}" for line in result_lines(found)), TEXT]
    for title, header, body in tables(found):
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
        parts.append(
            "\n".join([f"## {title}\n", *("| " + " | ".join(cells) + " |" for cells in lines)])
        )
    parts += [f"Missing in {name}: {', '.join(keys)}" for name, keys in _missing(found).items()]
    return "\n\n".join(parts) + "\n"


def compare_page(found: Comparison) -> str:
    """The whole page, nothing fetched."""
    items = "".join(f"<li>{escape(line)}</li>" for line in result_lines(found))
    sections = [f'<ul class="order">{items}</ul>', f'<p class="soft">{escape(TEXT)}</p>']
    for name, keys in _missing(found).items():
        sections.append(
            f'<p class="order fails">Missing in {escape(name)}: {len(keys)} sequences that others '
            f"have</p><details><summary>Which</summary><pre>{escape(chr(10).join(keys))}</pre>"
            "</details>"
        )
    sections += [plot_html(plot) for plot in _difference_plots(found)]
    for title, header, body in tables(found):
        sections.append(
            f'<h2>{escape(title)}</h2>\n<div class="wide">{table_html(header, body)}</div>'
        )
    if sum(bool(curve) for curve in found.best_of_k.values()) > 1:
        text = "Expected feature loss of the best of k samples, first seed, all sequences."
        sections.append(f"<h2>Best of k samples</h2>\n<p>{text}</p>")
        sections.append(plot_html(_curve_plot(found)))
    sections.append(_differing_html(found))
    return PAGE.substitute(
        title=escape(_title(found)),
        summary=escape(_summary(found)),
        style=STYLE,
        body="\n".join(sections),
    )


def result_lines(found: Comparison) -> list[str]:
    """What the comparison says first: a line for each report after the first, on the first row
    (best sample before others), first metric and mid horizon in which any of them differs."""
    metric = found.rows[0].metric
    rows = {row.row: row for row in found.rows if (row.metric, row.horizon) == (metric, "mid")}
    for row in (rows[name] for name in FIRST_ROWS if name in rows):
        if all(one is None or one.value == one.low == one.high == 0 for one in row.differences):
            continue
        names, first = [run["name"] for run in found.runs], row.values[0]
        where = f"{LABELS[row.row]}, {METRIC_TITLES[metric]}, mid"
        lines = []
        for name, value, difference in zip(
            names[1:], row.values[1:], row.differences[1:], strict=True
        ):
            if first is None or value is None or difference is None:
                lines.append(f"{where}: {name} or {names[0]} does not have it")
                continue
            unclear = difference.verdict == "unclear"
            word = "not clearly other than" if unclear else f"{difference.verdict} than"
            numbers = f"{show(value.value, metric)} against {show(first.value, metric)}"
            change = _signed(difference.value, metric)
            change += show_interval(difference.low, difference.high, metric)
            lines.append(f"{where}: {name} {word} {names[0]}, {numbers}: {change}")
        return lines
    return ["No row differs at the mid horizon."]


def tables(found: Comparison) -> Iterator[Table]:
    """One table for each metric and horizon: a line a row, a column a report, then differences."""
    names = [run["name"] for run in found.runs]
    header = ["row", *names, *(f"{name} - {names[0]}" for name in names[1:])]
    for metric in dict.fromkeys(row.metric for row in found.rows):
        for horizon in HORIZONS:
            rows = [row for row in found.rows if (row.metric, row.horizon) == (metric, horizon)]
            body = [
                [
                    LABELS[row.row],
                    *(_estimate(value, metric) for value in row.values),
                    *(_difference(value, metric) for value in row.differences[1:]),
                ]
                for row in rows
            ]
            if body:
                yield f"{METRIC_TITLES[metric]}, {horizon}", header, body


def _estimate(value: Estimate | None, metric: str) -> str:
    if value is None:
        return "-"
    return show(value.value, metric) + show_interval(value.low, value.high, metric)


def _difference(value: Difference | None, metric: str) -> str:
    if value is None:
        return "-"
    if value.value == value.low == value.high == 0:
        return "equal"
    verdict = "" if value.verdict == "unclear" else f" {value.verdict}"
    return _signed(value.value, metric) + verdict + show_interval(value.low, value.high, metric)


def _signed(value: float, metric: str) -> str:
    shown = show(value, metric)
    return shown if shown.startswith("-") else f"+{shown}"


def _title(found: Comparison) -> str:
    return "Comparison of " + ", ".join(run["name"] for run in found.runs)


def _summary(found: Comparison) -> str:
    counts = ", ".join(f"{run['name']} has {run['num_sequences']}" for run in found.runs)
    return f"{found.num_paired} sequences in all reports ({counts})"


def _missing(found: Comparison) -> dict[str, list[str]]:
    return {run["name"]: run["missing"] for run in found.runs if run["missing"]}


def _differing_html(found: Comparison) -> str:
    names = [run["name"] for run in found.runs]
    body = [[name, *map(value_text, values)] for name, values in found.differing.items()]
    folders = facts_html({run["name"]: run["folder"] for run in found.runs})
    table = table_html(["", *names], body).replace("<table>", '<table class="facts">')
    return f"""<h2>Where they differ</h2>
<details><summary>Settings and origin</summary><div class="wide">{table}</div></details>
<details><summary>Folders</summary>{folders}</details>"""


def _difference_plots(found: Comparison) -> list[Plot]:
    """Differences of the first metric, a panel a horizon."""
    metric = found.rows[0].metric
    rows = [
        row
        for row in found.rows
        if row.metric == metric and any(d is not None and d.value for d in row.differences)
    ]
    if not rows:
        return []
    names = [run["name"] for run in found.runs]
    parts = [
        f"{LABELS[row.row]}, {row.horizon}: {name} {_difference(difference, metric)}"
        for row in rows
        for name, difference in zip(names, row.differences, strict=True)
        if difference is not None
    ]
    alt = f"Differences to {names[0]} in {METRIC_TITLES[metric]}. " + "; ".join(parts) + "."
    draw = functools.partial(_draw_differences, rows=rows, names=names, metric=metric)
    return [draw_plot(draw, alt=alt)]


def _draw_differences(
    figure: Figure,
    ink: dict[str, str],
    *,
    rows: Sequence[ComparedRow],
    names: Sequence[str],
    metric: str,
) -> None:
    labels = list(dict.fromkeys(LABELS[row.row] for row in rows))
    scale = 100 if metric in PERCENT else 1
    for panel, horizon in enumerate(HORIZONS):
        axes = figure.add_subplot(1, len(HORIZONS), panel + 1)
        axes.axvline(0, color=ink["ink"], linewidth=1)
        for row in rows:
            for i, difference in enumerate(row.differences):
                if difference is None or row.horizon != horizon:
                    continue
                place = len(labels) - labels.index(LABELS[row.row]) - 0.5 * (i - 1) / len(names)
                colour = COLOURS[(i - 1) % len(COLOURS)]
                axes.plot(scale * difference.value, place, "o", color=colour, markersize=4)
                if difference.low is not None and difference.high is not None:
                    ends = [scale * difference.low, scale * difference.high]
                    axes.plot(ends, [place, place], color=colour, linewidth=1.6)
        axes.set_ylim(0.2, len(labels) + 0.6)
        axes.set_yticks(range(len(labels), 0, -1), labels if panel == 0 else [""] * len(labels))
        axes.set(xlabel=f"{METRIC_TITLES[metric]} - that of {names[0]}", title=horizon)
    for i, name in enumerate(names[1:]):
        figure.axes[0].plot([], [], color=COLOURS[i % len(COLOURS)], linewidth=1.6, label=name)
    _legend(figure, ink)


def _curve_plot(found: Comparison) -> Plot:
    lines = [
        f"{name}, {horizon}: {points[-1]['feature_loss']:.4g} with {points[-1]['k']}"
        for name, curve in found.best_of_k.items()
        for horizon in HORIZONS
        if (points := [point for point in curve if point["horizon"] == horizon])
    ]
    alt = "Feature loss of the best of k samples. " + "; ".join(lines) + "."
    return draw_plot(functools.partial(_draw_curves, curves=found.best_of_k), alt=alt)


def _draw_curves(
    figure: Figure, ink: dict[str, str], *, curves: dict[str, list[dict[str, Any]]]
) -> None:
    for panel, horizon in enumerate(HORIZONS):
        axes = figure.add_subplot(1, len(HORIZONS), panel + 1)
        for i, (name, curve) in enumerate(curves.items()):
            points = [point for point in curve if point["horizon"] == horizon]
            x, y = ([point[key] for point in points] for key in ("k", "feature_loss"))
            if points:
                axes.plot(x, y, color=COLOURS[i % len(COLOURS)], linewidth=1.6, label=name)
        axes.set(xlabel="samples k", title=horizon)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].set_ylabel("feature loss")
    _legend(figure, ink)


def _legend(figure: Figure, ink: dict[str, str]) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    legend.get_frame().set_alpha(0)
    for text in legend.get_texts():
        text.set_color(ink["ink"])
