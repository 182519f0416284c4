"""The rows of a report, their tables, and the order the paper found them in."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..tables import Table

ROW_LABELS = {
    "copy_last": "Copy last (lower bound)",
    "dinoworld": "DINO-world, discriminative",
    "dinoworld_mean": "DINO-world, mean of samples",
    "dinoworld_best": "DINO-world, best sample",
    "predictions_mean": "Predictions given, mean of samples",
    "predictions_best": "Predictions given, best sample",
    "discriminative": "Discriminative",
    "regressor_null": "Regressor null (best draw)",
    "mean": "Mean of samples",
    "best": "Best sample",
    "reconstruction": "Tokenizer reconstruction",
    "reconstruction_open_loop": "Tokenizer reconstruction, open loop",
    "present": "Present (upper bound)",
}
ROW_NAMES = tuple(ROW_LABELS)
HORIZONS = ("short", "mid")
METRICS = ("miou", "rmse", "delta1", "feature_loss")
_METRIC_HEADS = {
    "miou": "mIoU % ↑",
    "rmse": "RMSE m ↓",
    "delta1": "depth δ1 % ↑",
    "feature_loss": "feature loss ↓",
}
_ORDER_TEXTS = {
    "miou": "mid-term mIoU",
    "rmse": "mid-term RMSE, > meaning better",
    "feature_loss": "mid-term feature loss, > meaning better",
}
MODE_METRICS = ("mode_recall", "mode_precision", "mode_recall_weighted")
"""Fractions, 0 to 1, where all possible futures are known; in a table of their own."""
FREQUENCY_METRICS = (
    "frequency_distance",
    "impossible_mass",
    "excess_mass",
    "likeliest_share",
    "likeliest_probability",
)
"""How often forecasts hit each of the possible futures, against its probability; fractions, defined
in forecast/modes.py."""
MODE_ROWS = ("copy_last", "discriminative", "mean", "samples", "reconstruction", "present")
"""Rows that have them; `samples`: all samples of a window together."""
SAMPLES_ROW = "samples"
MODE_ROW_LABELS = ROW_LABELS | {SAMPLES_ROW: "All samples"}
ENSEMBLE_METRICS = ("energy_score", "spread_skill", "outside_share")
"""Samples held against the one future that came; defined in forecast/ensemble.py."""
ENSEMBLE_ROWS = (
    "copy_last",
    "dinoworld",
    "dinoworld_mean",
    "predictions_mean",
    "discriminative",
    "mean",
    SAMPLES_ROW,
    "reconstruction",
    "present",
)
"""Rows that have an energy score: no one chose them by the truth. Samples have the others, too."""
DRIFT_ROWS = (
    "copy_last",
    "dinoworld",
    "dinoworld_mean",
    "discriminative",
    "mean",
    "sample",
    "best",
    "reconstruction",
    "reconstruction_open_loop",
    "present",
)
"""Rows of long rollouts, step by step: forecast/drift.py."""
PERCENT = ("miou", "delta1", *MODE_METRICS, *FREQUENCY_METRICS, "outside_share")
METRIC_TITLES = _METRIC_HEADS | {
    "mode_recall": "mode recall % ↑",
    "mode_recall_weighted": "mode recall by probability % ↑",
    "mode_precision": "mode precision % ↑",
    "frequency_distance": "distance of frequencies % ↓",
    "impossible_mass": "no possible future % ↓",
    "excess_mass": "too often % ↓",
    "energy_score": "energy score ↓",
}
# The order of the paper's tables, mid-term: (better, worse)
EXPECTED_ORDER = (("present", "best"), ("best", "discriminative"), ("mean", "copy_last"))


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One number of a report, at the horizon's last frame.

    `miou` is a fraction, 0 to 1, and so is `delta1`, the share of pixels whose depth is within 1.25
    times the true one either way: higher is better. `rmse` is the root mean squared depth error in
    metres, `feature_loss` the smooth-L1 loss (beta 0.1) to the true features: lower is better.
    """

    dataset: str
    horizon: str  # short | mid
    row: str  # one of ROW_NAMES; of MODE_ROWS or ENSEMBLE_ROWS for metrics of their own
    metric: str  # one of METRICS, MODE_METRICS, FREQUENCY_METRICS, ENSEMBLE_METRICS
    value: float  # mean over seeds
    interval_low: float | None = None  # 95 %, see intervals.py; None with a single sequence
    interval_high: float | None = None
    by_seed: list[float] = field(default_factory=list)  # the values of several seeds


@dataclass(frozen=True, kw_only=True)
class ModePair:
    """Mode recall and mode precision of one row. Either alone is easy: samples that are anything
    have the one, samples that are all alike the other."""

    horizon: str
    row: str
    recall: ReportRow
    precision: ReportRow

    def text(self) -> str:
        """`60.0 [52.5, 67.8] | 51.3 [43.3, 59.3]`, in percent."""
        return f"{show_row(self.recall)} | {show_row(self.precision)}"

    def values(self) -> dict[str, str | float | None]:
        """Plain JSON values."""
        parts = {"recall": self.recall, "precision": self.precision}
        return {"horizon": self.horizon, "row": self.row} | {
            f"{name}{end}": getattr(row, attribute)
            for name, row in parts.items()
            for end, attribute in (
                ("", "value"),
                ("_low", "interval_low"),
                ("_high", "interval_high"),
            )
        }


def mode_pairs(rows: Iterable[ReportRow]) -> list[ModePair]:
    """The pairs of all rows that have both, short before mid; none where futures are not known."""
    found = {(row.horizon, row.row, row.metric): row for row in rows}
    return [
        ModePair(
            horizon=horizon,
            row=name,
            recall=found[horizon, name, "mode_recall"],
            precision=found[horizon, name, "mode_precision"],
        )
        for horizon in HORIZONS
        for name in MODE_ROWS
        if {(horizon, name, "mode_recall"), (horizon, name, "mode_precision")} <= found.keys()
    ]


def mode_pairs_text(rows: Iterable[ReportRow]) -> str:
    """A line of the pairs at the mid horizon; empty without any."""
    pairs = {pair.row: pair for pair in mode_pairs(rows) if pair.horizon == "mid"}
    parts = [
        f"{MODE_ROW_LABELS[name]} {pairs[name].text()}"
        for name in (SAMPLES_ROW, "discriminative", "present")
        if name in pairs
    ]
    return f"mode recall | mode precision, mid-term %: {'; '.join(parts)}" if parts else ""


@dataclass(frozen=True, kw_only=True)
class OrderCheck:
    """Whether the rows stand in the paper's order. `holds` is None where no pair is there."""

    holds: bool | None
    metric: str
    text: str


def find_value(rows: Iterable[ReportRow], *, horizon: str, row: str, metric: str) -> float | None:
    """The value of one row, None where the report has no such row."""
    found = find_row(rows, horizon=horizon, row=row, metric=metric)
    return None if found is None else found.value


def find_row(rows: Iterable[ReportRow], *, horizon: str, row: str, metric: str) -> ReportRow | None:
    """One row, None where the report has no such row."""
    for found in rows:
        if (found.horizon, found.row, found.metric) == (horizon, row, metric):
            return found
    return None


def rows_by_name(rows: Iterable[ReportRow], horizon: str, metric: str) -> dict[str, ReportRow]:
    """Row name -> row, of one horizon and metric."""
    return {row.row: row for row in rows if (row.horizon, row.metric) == (horizon, metric)}


def table(rows: Sequence[ReportRow]) -> Table:
    """A line for each row name, a column for each metric and horizon."""
    metrics = [m for m in METRICS if any(row.metric == m for row in rows)]
    columns = [(metric, horizon) for metric in metrics for horizon in HORIZONS]
    header = ["row", *(f"{_METRIC_HEADS[metric]} {horizon}" for metric, horizon in columns)]
    body = []
    for name in ROW_NAMES:
        found = [
            find_row(rows, horizon=horizon, row=name, metric=metric) for metric, horizon in columns
        ]
        if any(row is not None for row in found):
            body.append([ROW_LABELS[name], *map(show_row, found)])
    return Table(header, body)


def class_table(
    per_class: Sequence[Mapping[str, Any]], names: Sequence[str], *, horizon: str
) -> Table:
    """A line for each class that occurs in any row, a column for each row; IoU in percent, a dash
    where a class occurs in neither the labels nor the row."""
    rows = [entry for entry in per_class if entry["horizon"] == horizon]
    header = ["class", *(ROW_LABELS[entry["row"]] for entry in rows)]
    body = []
    for number, ious in enumerate(zip(*(entry["iou"] for entry in rows), strict=True)):
        if any(iou is not None for iou in ious):
            name = names[number] if number < len(names) else f"class {number}"
            body.append([name, *(show(iou, "miou") for iou in ious)])
    return Table(header, body)


def show_row(row: ReportRow | None) -> str:
    """A row's value and, in brackets, its interval."""
    if row is None:
        return "-"
    value = show(row.value, row.metric)
    return value + show_interval(row.interval_low, row.interval_high, row.metric)


def show_interval(low: float | None, high: float | None, metric: str) -> str:
    """` [low, high]`, with fewer digits than a value has; nothing without an interval."""
    if low is None or high is None:
        return ""
    bounds = [show(bound, metric) if metric in PERCENT else f"{bound:.3g}" for bound in (low, high)]
    return f" [{bounds[0]},\u00a0{bounds[1]}]"


def show(value: float | None, metric: str) -> str:
    """A value as people read it: mIoU in percent, losses with four digits, a dash for none."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if metric in PERCENT else f"{value:.4g}"


def expected_order(rows: Sequence[ReportRow]) -> OrderCheck:
    """Check present > best > discriminative and mean > copy_last, mid-term.

    On mIoU or RMSE where the report has one; else on the feature loss. Equal values do not hold.
    Pairs with a missing row are left out and said to be.
    """
    present = {row.metric for row in rows}
    metric = next((metric for metric in _ORDER_TEXTS if metric in present), "feature_loss")
    sign = 1.0 if metric == "miou" else -1.0
    holds: list[str] = []
    fails: list[str] = []
    absent: list[str] = []
    for better, worse in EXPECTED_ORDER:
        high = find_value(rows, horizon="mid", row=better, metric=metric)
        low = find_value(rows, horizon="mid", row=worse, metric=metric)
        if high is None or low is None:
            absent.append(f"{better} > {worse}")
            continue
        is_better = sign * high > sign * low and math.isfinite(high) and math.isfinite(low)
        sign_text = ">" if is_better else "is no better than"
        shown = f"{better} ({show(high, metric)}) {sign_text} {worse} ({show(low, metric)})"
        (holds if is_better else fails).append(shown)
    on = _ORDER_TEXTS[metric]
    left_out = f" (not in this report: {', '.join(absent)})" if absent else ""
    if fails:
        text = f"expected order: does not hold on {on}: {'; '.join(fails)}{left_out}"
        return OrderCheck(holds=False, metric=metric, text=text)
    if not holds:
        return OrderCheck(holds=None, metric=metric, text=f"expected order: not checked{left_out}")
    text = f"expected order: holds on {on}: {'; '.join(holds)}{left_out}"
    return OrderCheck(holds=True, metric=metric, text=text)
