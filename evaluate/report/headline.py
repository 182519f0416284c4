"""What a report says first: a few numbers, from the lower bound to the upper one, in words."""

from collections.abc import Sequence
from html import escape

from .rows import METRIC_TITLES, METRICS, ReportRow, find_row, show, show_interval

_ROWS = {
    "copy_last": "copying the last frame",
    "mean": "the mean of {samples}",
    "discriminative": "the discriminative model",
    "dinoworld": "DINO-world",
    "dinoworld_best": "DINO-world, best of {samples}",
    "predictions_best": "the predictions given, best sample",
    "best": "best of {samples}",
    "reconstruction": "the tokenizer's reconstruction",
    "present": "the true future itself",
}
"""Rows worth a place, and what they are; those that a report has not are left out."""
_MAIN = "best"
_HORIZON = "mid"


def headline_html(rows: Sequence[ReportRow], *, num_samples: int, horizon_s: float) -> str:
    """The numbers of the mid horizon in the report's first metric, then what is known of modes."""
    metric = next((name for name in METRICS if any(row.metric == name for row in rows)), None)
    if metric is None:
        return ""
    samples = f"{num_samples} samples" if num_samples > 1 else "one"
    parts = []
    for name, text in _ROWS.items():
        row = find_row(rows, horizon=_HORIZON, row=name, metric=metric)
        if row is not None and (num_samples > 1 or name != "mean"):  # of one they are the same
            interval = show_interval(row.interval_low, row.interval_high, metric).strip()
            small = f"<small>{escape(interval)}</small>" if interval else ""
            kind = ' class="main"' if name == _MAIN else ""
            parts.append(
                f"<li{kind}><strong>{escape(show(row.value, metric))}</strong>"
                f"<span>{escape(text.format(samples=samples))}</span>{small}</li>"
            )
    title = f"{METRIC_TITLES[metric]}, {horizon_s:.2g} s ahead (mid)"
    return f"""<p class="result-title">{escape(title)}</p>
<ul class="result">{"".join(parts)}</ul>
{_modes(rows)}"""


def _modes(rows: Sequence[ReportRow]) -> str:
    recall, precision = (
        find_row(rows, horizon=_HORIZON, row="samples", metric=metric)
        for metric in ("mode_recall", "mode_precision")
    )
    if recall is None or precision is None:
        return ""
    hit, possible = (show(row.value, row.metric) for row in (recall, precision))
    return (
        f"<p>The samples hit <strong>{hit} %</strong> of all futures that are possible; "
        f"<strong>{possible} %</strong> of the samples are a possible future.</p>"
    )
