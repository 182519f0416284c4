"""`deltatok-evaluate compare`: several reports side by side, paired by sequence.

Only sequences that every report has are compared. What differs between two reports is resampled
together (the same sequences are drawn for both), so that what is hard for both does not widen the
interval of their difference. Differences are to the first report.

    OUT/compare.json, compare.md, compare.html
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..shards.cache import flatten
from ..shards.errors import CacheMismatch, UsageError
from ..shards.files import make_folder, read_text, write_bytes, write_json
from .forecast.intervals import Estimate, Resamples
from .forecast.sequences import Score, SequenceScores, read_sequences
from .report.html import render_page, value_text
from .report.plots import COLOURS, Plot, draw_plot, legend_below
from .report.rows import (
    HORIZONS,
    METRIC_TITLES,
    METRICS,
    MODE_METRICS,
    MODE_ROWS,
    PERCENT,
    ROW_NAMES,
    show,
    show_interval,
)
from .report.rows import MODE_ROW_LABELS as LABELS
from .tables import Table

LOWER_IS_BETTER = (
    "rmse",
    "feature_loss",
    "frequency_distance",
    "impossible_mass",
    "excess_mass",
    "energy_score",
)
COMPARED = tuple(dict.fromkeys((*METRICS, *MODE_METRICS, *LOWER_IS_BETTER)))
"""Metrics of which it is known what is better."""
PAIR = ("mode_recall", "mode_precision")
"""Never one without the other."""
SAME = {
    "provenance.cache.fingerprint": "cache.fingerprint",
    "config.dataset": "dataset",
    "config.num_context": "num_context",
    "config.short_steps": "short_steps",
    "config.mid_steps": "mid_steps",
    "config.num_samples": "num_samples",
    "config.mode_overlap": "mode_overlap",
    "provenance.head.num_classes": "num_classes",
}
"""What reports must share to be compared: where it lies in report.json, what it is called."""
_OWN = ("config.out", "config.num_pictures", "config.batch_windows", "config.curves")
"""Settings that may differ without a word."""
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
TEXT = (
    "All numbers are of the sequences that every report has. In brackets: 95 % intervals, "
    "sequences (and seeds) drawn again with replacement, the same ones for all reports. A "
    "difference is called better or worse where its interval does not hold 0."
)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Which reports, and where the comparison goes."""

    reports: tuple[str, ...]
    """Report folders of `deltatok-evaluate forecast`; the first is what others are held against."""
    out: str
    """Folder for compare.json, compare.md and compare.html."""
    names: tuple[str, ...] = ()
    """What to call the reports, in their order; none: their folders' names."""
    seed: int = 0
    """Seed of the intervals' resampling."""

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        if len(self.reports) < 2:
            raise UsageError(f"compare: got {len(self.reports)} reports, wanted two or more")
        if self.names and len(self.names) != len(self.reports):
            raise UsageError(
                f"names: got {len(self.names)}, wanted one for each of {len(self.reports)} reports"
            )
        if len(set(self.names)) < len(self.names):
            raise UsageError("names: two reports have the same name; give different ones")
        if self.seed < 0:
            raise UsageError(f"seed: got {self.seed}, wanted 0 or more")


@dataclass(frozen=True, kw_only=True)
class ComparedReport:
    """One report, as read."""

    name: str
    folder: str
    report: Mapping[str, Any]
    scores: SequenceScores


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """One report's number minus the first one's."""

    verdict: str
    """`better` or `worse` where the interval does not hold 0, else `unclear`."""


@dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """One number of all reports; None in those that do not have it."""

    horizon: str
    row: str
    metric: str
    values: list[Estimate | None]
    differences: list[Difference | None]
    """To the first report; None for itself."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What compare.json holds."""

    runs: list[dict[str, Any]]
    """[{"name", "folder", "num_sequences", "missing": sequences that others have}]."""
    num_paired: int
    rows: list[ComparedRow]
    differing: dict[str, list[Any]]
    """Setting or origin -> its value in each report, where they differ."""


def run_compare(config: CompareConfig) -> Comparison:
    """Compare, and write the three files into `config.out`.

    Raises:
        UsageError: a folder without a report, or names of no use.
        CacheMismatch: reports of different caches, protocols or classes; names the field.
    """
    runs = [
        _read_run(folder, name) for folder, name in zip(config.reports, _names(config), strict=True)
    ]
    for other in runs[1:]:
        check_comparable(runs[0], other)
    found = compare_runs(runs, seed=config.seed)
    out = make_folder(config.out, flag="--out")
    (out / "compare.json").unlink(missing_ok=True)
    write_bytes(out / "compare.md", compare_markdown(found).encode())
    write_bytes(out / "compare.html", compare_page(found).encode())
    write_json(out / "compare.json", asdict(found))
    return found


def check_comparable(first: ComparedReport, other: ComparedReport) -> None:
    """Raises CacheMismatch, naming the field, unless two reports scored the same thing."""
    ours, theirs = flatten(first.report), flatten(other.report)
    for place, field in SAME.items():
        if ours.get(place) != theirs.get(place):
            raise CacheMismatch(
                f"{other.folder}: {field} is {theirs.get(place)!r}, but {ours.get(place)!r} in "
                f"{first.folder}: only reports of the same cache and protocol can be compared; "
                "evaluate one of them again"
            )
    for what in ("windows", "labels"):
        held, found = getattr(first.scores, what), getattr(other.scores, what)
        for sequence in held.keys() & found.keys():
            if held[sequence] != found[sequence]:
                raise CacheMismatch(
                    f"{other.folder}: {what} of sequence {sequence!r} differ from those of "
                    f"{first.folder}; evaluate both on the same cache with the same labels"
                )


def compare_runs(runs: Sequence[ComparedReport], *, seed: int) -> Comparison:
    """All numbers on the sequences that all runs have; CacheMismatch if there is none."""
    everything = sorted(set().union(*(run.scores.windows for run in runs)))
    paired = [key for key in everything if all(key in run.scores.windows for run in runs)]
    if not paired:
        raise CacheMismatch(
            "sequences: no sequence is in all reports; evaluate them on the same cache"
        )
    resamples = Resamples(len(paired), seed=seed)
    scores = [
        Score(horizon, row, metric)
        for metric in COMPARED
        for horizon in HORIZONS
        for row in dict.fromkeys((*ROW_NAMES, *MODE_ROWS))
    ]
    rows = (_compare_score(score, runs, paired, resamples) for score in scores)
    return Comparison(
        runs=[
            {
                "name": run.name,
                "folder": run.folder,
                "num_sequences": len(run.scores.windows),
                "missing": [key for key in everything if key not in run.scores.windows],
            }
            for run in runs
        ],
        num_paired=len(paired),
        rows=[row for row in rows if any(value is not None for value in row.values)],
        differing=_differing(runs),
    )


def _compare_score(
    score: Score, runs: Sequence[ComparedReport], paired: Sequence[str], resamples: Resamples
) -> ComparedRow:
    by_run = [run.scores.by_seed(score, paired) for run in runs]
    values = [resamples.estimate(score.metric, by_seed) if by_seed else None for by_seed in by_run]
    draws = [resamples.resampled(score.metric, by_seed) if by_seed else None for by_seed in by_run]
    differences: list[Difference | None] = []
    for value, drawn in zip(values, draws, strict=True):
        base, base_drawn = values[0], draws[0]
        if value is None or base is None or drawn is None or base_drawn is None or value is base:
            differences.append(None)
            continue
        found = resamples.interval(value.value - base.value, drawn - base_drawn)
        verdict = _verdict(found, lower_is_better=score.metric in LOWER_IS_BETTER)
        differences.append(Difference(**asdict(found), verdict=verdict))
    return ComparedRow(
        horizon=score.horizon,
        row=score.row,
        metric=score.metric,
        values=values,
        differences=differences,
    )


def _verdict(difference: Estimate, *, lower_is_better: bool) -> str:
    if difference.low is None or difference.high is None:
        return "unclear"
    if difference.low <= 0 <= difference.high:
        return "unclear"
    return "better" if (difference.value < 0) == lower_is_better else "worse"


def _differing(runs: Sequence[ComparedReport]) -> dict[str, list[Any]]:
    flat = [
        flatten({part: run.report.get(part, {}) for part in ("provenance", "config")})
        for run in runs
    ]
    names = dict.fromkeys(name for settings in flat for name in settings)
    found = {name: [settings.get(name) for settings in flat] for name in names}
    return {
        name: values
        for name, values in found.items()
        if name not in _OWN and any(value != values[0] for value in values)
    }


def _names(config: CompareConfig) -> list[str]:
    """The names given, else the last parts of the folders by which they differ."""
    if config.names:
        return list(config.names)
    parts = [Path(folder).resolve().parts for folder in config.reports]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError("compare: the same report twice; give different ones, or --names")


def _read_run(folder: str, name: str) -> ComparedReport:
    path = Path(folder) / "report.json"
    try:
        report = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: cannot be read ({error}); give a folder that deltatok-evaluate forecast made"
        ) from None
    if not isinstance(report, dict) or not {"rows", "config", "provenance"} <= report.keys():
        raise UsageError(f"{path}: no report of deltatok-evaluate forecast")
    scores = read_sequences(Path(folder))
    found = sum(scores.windows.values())
    if report.get("num_windows", found) != found:  # a file cut off after a line reads well
        raise UsageError(
            f"{folder}: sequences.jsonl has {found} windows, report.json says "
            f"{report['num_windows']!r}: they are not of one run, or one is cut off; evaluate again"
        )
    return ComparedReport(name=name, folder=folder, report=report, scores=scores)


def compare_markdown(found: Comparison) -> str:
    """Title, tables, and what differs."""
    parts = [f"# {_title(found)}", _summary(found)]
    parts += ["\n".join(f"- {line}" for line in result_lines(found)), TEXT]
    parts += [f"## {title}\n\n{table.markdown()}" for title, table in tables(found).items()]
    parts += [f"Missing in {name}: {', '.join(keys)}" for name, keys in _missing(found).items()]
    return "\n\n".join(parts) + "\n"


def compare_page(found: Comparison) -> str:
    """The whole page, nothing fetched."""
    values = {
        "title": _title(found),
        "summary": _summary(found),
        "lines": result_lines(found),
        "text": TEXT,
        "missing": _missing(found),
        "differences": _difference_plot(found),
        "tables": tables(found),
        "settings": _settings(found),
        "folders": {run["name"]: run["folder"] for run in found.runs},
    }
    return render_page("compare.html.j2", values)


def result_lines(found: Comparison) -> list[str]:
    """What the comparison says first: a line for each report after the first, on the first row
    (best sample before others), first metric and mid horizon in which any of them differs; then,
    where futures are known, the samples' mode recall and precision, always both."""
    return [*_first_difference(found), *_mode_lines(found)]


def _mode_lines(found: Comparison) -> list[str]:
    """`All samples, mode recall | mode precision, mid: b 66.0 | 75.0 against 60.0 | 51.3 of a: ...`
    for each report after the first."""
    rows = {row.metric: row for row in found.rows if (row.row, row.horizon) == ("samples", "mid")}
    if not set(PAIR) <= rows.keys():
        return []
    names = [run["name"] for run in found.runs]
    values = [
        " | ".join(_value(rows[metric].values[i], metric) for metric in PAIR)
        for i in range(len(names))
    ]
    changes = [
        " | ".join(_difference(rows[metric].differences[i], metric) for metric in PAIR)
        for i in range(len(names))
    ]
    return [
        f"{LABELS['samples']}, mode recall | mode precision %, mid: {name} {value} against "
        f"{values[0]} of {names[0]}: {change}"
        for name, value, change in zip(names[1:], values[1:], changes[1:], strict=True)
    ]


def _value(value: Estimate | None, metric: str) -> str:
    return show(None if value is None else value.value, metric)


def _first_difference(found: Comparison) -> list[str]:
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


def tables(found: Comparison) -> dict[str, Table]:
    """Title -> table, of each metric and horizon: a line a row, a column a report, then
    differences."""
    names = [run["name"] for run in found.runs]
    header = ["row", *names, *(f"{name} - {names[0]}" for name in names[1:])]
    by_title = {}
    pairs = dict.fromkeys(PAIR if row.metric in PAIR else (row.metric,) for row in found.rows)
    for metric, horizon in ((m, h) for metrics in pairs for h in HORIZONS for m in metrics):
        body = [
            [
                LABELS[row.row],
                *(_estimate(value, metric) for value in row.values),
                *(_difference(value, metric) for value in row.differences[1:]),
            ]
            for row in found.rows
            if (row.metric, row.horizon) == (metric, horizon)
        ]
        if body:
            by_title[f"{METRIC_TITLES[metric]}, {horizon}"] = Table(header, body)
    return by_title


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


def _settings(found: Comparison) -> Table:
    names = [run["name"] for run in found.runs]
    body = [[name, *map(value_text, values)] for name, values in found.differing.items()]
    return Table(["", *names], body)


def _difference_plot(found: Comparison) -> Plot | None:
    """Differences of the first metric, a panel a horizon; None where nothing differs."""
    metric = found.rows[0].metric
    rows = [
        row
        for row in found.rows
        if row.metric == metric and any(d is not None and d.value for d in row.differences)
    ]
    if not rows:
        return None
    names = [run["name"] for run in found.runs]
    parts = [
        f"{LABELS[row.row]}, {row.horizon}: {name} {_difference(difference, metric)}"
        for row in rows
        for name, difference in zip(names, row.differences, strict=True)
        if difference is not None
    ]
    alt = f"Differences to {names[0]} in {METRIC_TITLES[metric]}. " + "; ".join(parts) + "."
    draw = functools.partial(_draw_differences, rows=rows, names=names, metric=metric)
    return draw_plot(draw, alt=alt)


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
    legend_below(figure, columns=3)
