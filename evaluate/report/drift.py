"""The section of a report on drift: the scores of long rollouts, step by step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..tables import Table
from .plots import COLOURS, Plot, draw_band, draw_plot, legend_below
from .rows import DRIFT_ROWS, MODE_ROW_LABELS, PERCENT, show, show_interval

_LABELS = MODE_ROW_LABELS | {"sample": "One sample", "best": "Best sample of each step"}
_HEADS = {"feature_loss": "feature loss", "miou": "mIoU %"}
_DASHED = ("reconstruction_open_loop",)
"""Nearly that of the closed loop, which is to be seen below it."""
_NOT_DRAWN = ("dinoworld_mean", "present")


@dataclass(frozen=True, kw_only=True)
class DriftSection:
    """What the page shows of it."""

    losses: Table
    """Feature loss: a line a row, a column a step, then what a step adds."""
    mious: Table | None
    """mIoU in percent; None without labels."""
    plot: Plot


def drift_section(found: Mapping[str, Any] | None) -> DriftSection | None:
    """None without long rollouts. found: `drift` of the report."""
    if not found:
        return None
    lines = {metric: _lines(found, metric) for metric in _HEADS}
    steps = [f"{step}" for step in range(1, found["steps"] + 1)]
    growth = {entry["row"]: entry for entry in found["growth"]}
    losses = [
        [_LABELS[name], *(show(p["value"], "feature_loss") for p in points), _growth(growth, name)]
        for name, points in lines["feature_loss"].items()
        if name != "present"  # 0, by definition
    ]
    mious = [
        [
            _LABELS[name],
            *(show(point["value"], "miou") for point in points),
            show_interval(points[-1]["interval_low"], points[-1]["interval_high"], "miou").strip(),
        ]
        for name, points in lines["miou"].items()
    ]
    return DriftSection(
        losses=Table(["feature loss ↓, step", *steps, "a step adds"], losses),
        mious=Table(["mIoU % ↑, step", *steps, "interval of the last"], mious) if mious else None,
        plot=_plot({metric: rows for metric, rows in lines.items() if rows}),
    )


def _lines(found: Mapping[str, Any], metric: str) -> dict[str, list[Mapping[str, Any]]]:
    """Row -> its entries, by step."""
    return {
        name: points
        for name in DRIFT_ROWS
        if (points := [r for r in found["rows"] if (r["row"], r["metric"]) == (name, metric)])
    }


def _growth(growth: Mapping[str, Mapping[str, Any]], name: str) -> str:
    if name not in growth:
        return "-"
    entry = growth[name]
    bounds = show_interval(entry["interval_low"], entry["interval_high"], "feature_loss")
    return f"{entry['value']:.3g}{bounds}"


def read_drift(found: Mapping[str, Any] | None) -> str:
    """What a step adds to the loss of the tokenizer alone, and to that of the forecasts."""
    if not found or not found["growth"]:
        return ""
    growth = {entry["row"]: entry for entry in found["growth"]}
    texts = {
        "reconstruction": "the tokenizer alone, closed loop",
        "reconstruction_open_loop": "the same open loop",
        "sample": "one sample",
        "discriminative": "the discriminative forecast",
        "copy_last": "copying the last frame",
    }
    parts = [f"{text} {_growth(growth, name)}" for name, text in texts.items() if name in growth]
    text = f"A step adds to the feature loss, up to step {found['steps']}: {'; '.join(parts)}."
    copied = {p["step"]: p["value"] for p in _lines(found, "feature_loss").get("copy_last", [])}
    for name in ("sample", "discriminative"):
        points = _lines(found, "feature_loss").get(name, [])
        if points and copied:
            worse = next((p["step"] for p in points if p["value"] >= copied[p["step"]]), None)
            when = f"at step {worse} for the first time" if worse else "at no step"
            text += f" {_LABELS[name]} is no better than copying {when}."
    return text


def read_drift_mious(found: Mapping[str, Any] | None) -> str:
    """From the first step to the last, in mIoU."""
    if not found:
        return ""
    parts = [
        f"{_LABELS[name]} {show(points[0]['value'], 'miou')} to {show(points[-1]['value'], 'miou')}"
        for name, points in _lines(found, "miou").items()
        if name in ("reconstruction", "sample", "discriminative", "copy_last")
    ]
    return f"mIoU %, from step 1 to step {found['steps']}: {', '.join(parts)}." if parts else ""


def _plot(lines: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Plot:
    """lines: metric -> row -> entries by step."""
    ends = [
        f"{_HEADS[metric]}, {_LABELS[name]}: {show(points[0]['value'], metric)} to "
        f"{show(points[-1]['value'], metric)}"
        for metric, rows in lines.items()
        for name, points in rows.items()
        if name not in _NOT_DRAWN
    ]

    def draw(figure: Figure, ink: dict[str, str]) -> None:
        panels = figure.subplots(1, len(lines), squeeze=False)[0]
        for axes, (metric, rows) in zip(panels, lines.items(), strict=True):
            scale = 100 if metric in PERCENT else 1
            drawn = {name: points for name, points in rows.items() if name not in _NOT_DRAWN}
            for number, (name, points) in enumerate(drawn.items()):
                low, high = (
                    [None if p[key] is None else scale * p[key] for p in points]
                    for key in ("interval_low", "interval_high")
                )
                draw_band(
                    axes,
                    [point["step"] for point in points],
                    [scale * point["value"] for point in points],
                    low,
                    high,
                    colour=COLOURS[number % len(COLOURS)],
                    label=_LABELS[name].split(" (")[0],
                    style="--" if name in _DASHED else "-",
                )
            axes.set(xlabel="step", title=_HEADS[metric])
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(figure, columns=3)

    return draw_plot(draw, alt=f"Scores by step of long rollouts. {'; '.join(ends)}.")
