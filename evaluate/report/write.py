"""A report's two files: report.json for programs, report.html for people.

    OUT/report.json   {"rows", "expected_order", "mode_pairs", "probes", "best_of_k",
                       "per_class_iou", "rank_histogram", "drift", "provenance", "seconds",
                       "config", "num_windows", "num_clips", "step_s", "paper", "diagnosis"}
    OUT/report.html   one file, nothing fetched: tables, pictures, curves (templates/page.html.j2)
    OUT/sequences.jsonl  the scores by sequence, for `deltatok-evaluate compare`
    OUT/pictures/     the panels as PNG files and the moving pictures as GIFs, to show elsewhere

report.json is written last: where it is, the report is whole.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...shards.cache import flatten
from ...shards.files import write_bytes, write_json
from ..forecast.config import UNNAMED
from ..forecast.sequences import FILE_NAME as SEQUENCES
from ..forecast.sequences import SequenceScores, sequences_jsonl
from ..tables import Table
from . import readings
from .animation import Moving
from .drift import drift_section, read_drift, read_drift_mious
from .ensemble import ensemble_section
from .html import render_page, value_text
from .modes import mode_section
from .paper_rows import PaperComparison, paper_table
from .pictures import Panel, panel_image, png_bytes
from .plots import Plot, plot_best_of_k
from .rows import (
    METRIC_TITLES,
    METRICS,
    ROW_LABELS,
    ReportRow,
    class_table,
    expected_order,
    mode_pairs,
    mode_pairs_text,
    rows_by_name,
    table,
)

PICTURES = ("features", "classes", "depth", "rgb")
"""Panels by kind, as `Pictures` has them and their files are called."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What report.json holds; plain JSON values but for the rows."""

    rows: list[ReportRow]
    probes: dict[str, Any]
    best_of_k: list[dict[str, Any]]
    """[{"horizon", "k", "feature_loss", "mean_feature_loss", and the intervals of both}]; empty
    without a world model."""
    per_class_iou: list[dict[str, Any]]
    """[{"horizon", "row", "iou"}], iou 0-1 or None of every class; empty without mIoU."""
    provenance: dict[str, Any]
    seconds: dict[str, float]
    config: dict[str, Any]
    num_windows: int
    num_clips: int
    step_s: float
    """Seconds of a step, the median over the windows."""
    diagnosis: list[dict[str, Any]] = field(default_factory=list)
    """[{"cause", "measured", "next_step"}]: why the numbers are not as they should be, if known:
    forecast/diagnosis.py."""
    rank_histogram: list[dict[str, Any]] = field(default_factory=list)
    """[{"horizon", "rank", "share", "interval_low", "interval_high"}]; empty without samples."""
    drift: dict[str, Any] | None = None
    """Scores of long rollouts by step (forecast/drift.py); None where windows are too short."""
    paper: PaperComparison | None = None
    """Whether the paper's rows may stand beside these; None: it has none of this data set."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What only report.html holds."""

    moving: Sequence[Moving] = ()
    features: Sequence[Panel] = ()
    classes: Sequence[Panel] = ()
    depth: Sequence[Panel] = ()
    rgb: Sequence[Panel] = ()
    curves: Sequence[Plot] = ()


def write_report(out: Path, report: Report, pictures: Pictures, scores: SequenceScores) -> None:
    """Write the files of a report into the folder `out`, in place of an earlier one's;
    `scores`: by sequence."""
    (out / "report.json").unlink(missing_ok=True)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    for kind in PICTURES:
        for old in (out / "pictures").glob(f"{kind}-*.png"):
            old.unlink()
        panels: Sequence[Panel] = getattr(pictures, kind)
        for i, panel in enumerate(panels):
            write_bytes(out / "pictures" / f"{kind}-{i}.png", png_bytes(panel_image(panel)))
    for old in (out / "pictures").glob("moving-*.gif"):
        old.unlink()
    for i, moving in enumerate(pictures.moving):
        write_bytes(out / "pictures" / f"moving-{i}.gif", moving.gif())
    write_bytes(out / SEQUENCES, sequences_jsonl(scores))
    write_bytes(out / "report.html", report_page(report, pictures, scores).encode())
    write_json(out / "report.json", report_json(report))


def report_json(report: Report) -> dict[str, Any]:
    """The report as plain JSON values."""
    return {
        **asdict(report),
        "expected_order": asdict(expected_order(report.rows)),
        "mode_pairs": {
            "pairs": [pair.values() for pair in mode_pairs(report.rows)],
            "text": mode_pairs_text(report.rows),
        },
    }


def report_page(report: Report, pictures: Pictures, scores: SequenceScores) -> str:
    """The whole page."""
    rows, config, probes = report.rows, report.config, report.probes
    num_samples = config["num_samples"]
    metric = next((name for name in METRICS if any(row.metric == name for row in rows)), None)
    values = {
        "report": report,
        "config": config,
        "pictures": pictures,
        "num_moments": max((len(moving.moments) for moving in pictures.moving), default=0),
        "has_name": config["dataset"] != UNNAMED,
        "is_evaluation": report.provenance["cache"]["policy"] == "evaluation",
        "hidden_size": report.provenance["cache"].get("hidden_size", "D"),
        "metric": metric,
        "metric_titles": METRIC_TITLES,
        "mid": {name: rows_by_name(rows, "mid", name) for name in METRIC_TITLES},
        "order": expected_order(rows),
        "scores": table(rows),
        "reading": _readings(report, scores),
        "paper": paper_table(rows, report.paper) if report.paper else None,
        "classes": class_table(report.per_class_iou, config["class_names"], horizon="mid"),
        "modes": mode_section(rows, probes.get("modes", {}), num_samples=num_samples),
        "ensemble": ensemble_section(rows, report.rank_histogram, num_samples=num_samples),
        "drift": drift_section(report.drift),
        "losses_by_step": _losses_by_step(probes.get("feature_loss_by_step", {})),
        "best_of_k": plot_best_of_k(report.best_of_k, rows) if report.best_of_k else None,
        "seconds": {name: f"{value:.2f} s" for name, value in report.seconds.items()},
        "provenance": flatten(report.provenance),
        "settings": flatten(config),
    }
    return render_page("page.html.j2", values)


def _readings(report: Report, scores: SequenceScores) -> dict[str, str]:
    """What each table says, by the name of its section."""
    rows, probes = report.rows, report.probes
    modes, num_samples = probes.get("modes", {}), report.config["num_samples"]
    return {
        "scores": readings.read_scores(rows, scores, seed=report.config["seed"]),
        "paper": readings.read_paper(rows, report.paper) if report.paper else "",
        "classes": readings.read_classes(report.per_class_iou, report.config["class_names"]),
        "modes": readings.read_modes(rows, modes, num_samples=num_samples),
        "frequencies": readings.read_frequencies(rows, modes, num_samples=num_samples),
        "energy": readings.read_energy(rows),
        "spread": readings.read_spread(rows, num_samples=num_samples),
        "ranks": readings.read_ranks(report.rank_histogram),
        "drift": read_drift(report.drift),
        "drift_mious": read_drift_mious(report.drift),
        "calibration": readings.read_calibration(modes),
        "bins": readings.read_bins(modes),
        "probes": readings.read_probes(probes),
        "steps": readings.read_steps(probes.get("feature_loss_by_step", {})),
        "best_of_k": readings.read_best_of_k(report.best_of_k),
    }


def _losses_by_step(by_row: dict[str, list[float]]) -> Table:
    steps = max(map(len, by_row.values()), default=0)
    header = ["row", *(f"step {step + 1}" for step in range(steps))]
    return Table(
        header, [[ROW_LABELS[name], *map(value_text, losses)] for name, losses in by_row.items()]
    )
