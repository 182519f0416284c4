"""A report's two files: report.json for programs, report.html for people.

    OUT/report.json   {"rows", "expected_order", "probes", "best_of_k", "per_class_iou",
                       "provenance", "seconds", "config", "num_windows", "num_clips", "step_s",
                       "paper"}
    OUT/report.html   one file, nothing fetched: tables, pictures, curves
    OUT/sequences.jsonl  the scores by sequence, for `deltatok-evaluate compare`
    OUT/pictures/     the panels as PNG files and the moving pictures as GIFs, to show elsewhere

report.json is written last: where it is, the report is whole.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from ...shards.files import write_bytes, write_json
from ..forecast.config import UNNAMED
from ..forecast.scores import FILE_NAME as SEQUENCES
from .class_table import classes_html
from .headline import headline_html
from .mode_section import modes_html
from .moving import Moving, moving_html
from .page import facts_html, flatten, panels_html, plot_html, table_html, value_text
from .paper_rows import PaperComparison, paper_html
from .pictures import Panel, panel_image, png_bytes
from .plots import Plot, plot_best_of_k
from .rows import ROW_LABELS, ReportRow, expected_order, markdown_table, table
from .template import PAGE, STYLE

PROBE_TEXTS = {
    "z_swap_ratio": "tokenizer loss with delta tokens swapped between windows / loss; near 1 = the "
    "decoder ignores its delta token",
    "zero_z_ratio": "tokenizer loss with the delta token zeroed / loss; near 1 = the same",
    "copy_last_ratio": "tokenizer loss / loss of copying the last frame; below 1 = better",
    "z_participation_ratio": "directions that carry the delta tokens' variance, of {hidden_size}",
    "open_loop_feature_loss": "feature loss of the tokenizer fed with the true pairs' delta tokens",
    "sample_spread": "spread of the samples / motion of the true features; 0 = all samples alike",
}


PICTURES = ("features", "classes", "depth", "rgb")
"""Panels by kind, as `Pictures` has them and their files are called."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What report.json holds; plain JSON values but for the rows."""

    rows: list[ReportRow]
    probes: dict[str, Any]
    best_of_k: list[dict[str, Any]]
    """[{"horizon", "k", "feature_loss"}]; empty without a world model."""
    per_class_iou: list[dict[str, Any]]
    """[{"horizon", "row", "iou"}], iou 0-1 or None of every class; empty without mIoU."""
    provenance: dict[str, Any]
    seconds: dict[str, float]
    config: dict[str, Any]
    num_windows: int
    num_clips: int
    step_s: float
    """Seconds of a step, the median over the windows."""
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


def write_report(out: Path, report: Report, pictures: Pictures, *, sequences: bytes = b"") -> None:
    """Write the files of a report into the folder `out`, in place of an earlier one's;
    `sequences`: of sequences.jsonl."""
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
        write_bytes(out / "pictures" / f"moving-{i}.gif", moving.gif)
    write_bytes(out / SEQUENCES, sequences)
    write_bytes(out / "report.html", report_page(report, pictures).encode())
    write_json(out / "report.json", report_json(report))


def report_json(report: Report) -> dict[str, Any]:
    """The report as plain JSON values."""
    return {
        **asdict(report),
        "expected_order": asdict(expected_order(report.rows)),
    }


def report_page(report: Report, pictures: Pictures) -> str:
    """The whole page."""
    config = report.config
    title = "Forecasts" if config["dataset"] == UNNAMED else f"Forecasts on {config['dataset']}"
    is_evaluation = report.provenance["cache"]["policy"] == "evaluation"
    windows, clips = ("crops", "targets") if is_evaluation else ("windows", "clips")
    summary = (
        f"{report.num_windows} {windows} of {report.num_clips} {clips}; {config['num_context']} "
        f"frames seen, the target {_ahead(report, 'short')} and {_ahead(report, 'mid')} later"
    )
    if report.best_of_k:
        last = config["seed"] + config["num_seeds"] - 1
        seeds = f"seeds {config['seed']} to {last}" if config["num_seeds"] > 1 else f"seed {last}"
        samples = "1 sample" if config["num_samples"] == 1 else f"{config['num_samples']} samples"
        summary += f"; {samples}, {seeds}"
    sections = [
        headline_html(
            report.rows,
            num_samples=config["num_samples"],
            horizon_s=config["mid_steps"] * report.step_s,
        ),
        _scores(report),
        paper_html(report.rows, report.paper),
        classes_html(report.per_class_iou, report.config["class_names"]),
        modes_html(report.rows, report.probes.get("modes", {}), report.config),
        moving_html(pictures.moving),
        _probes(report),
        _best_of_k(report),
        panels_html("Features", FEATURES_TEXT, pictures.features),
        panels_html("Segmentation", CLASSES_TEXT, pictures.classes),
        panels_html("Depth", DEPTH_TEXT, pictures.depth),
        panels_html("Pictures", RGB_TEXT, pictures.rgb),
        _curves(pictures.curves),
        _origin(report),
    ]
    body = "\n".join(filter(None, sections))
    return PAGE.substitute(
        title=escape(title), summary=escape(summary), style=STYLE, body=body + _size(body)
    )


FEATURES_TEXT = (
    "Patch tokens as colours: the three main directions of the true features are red, green and "
    "blue, the same for all rows of a window. Forecasts start after the time 0. Of the samples, "
    "those that differ most are shown; the spread is that of all of them, bright where they differ."
)
CLASSES_TEXT = (
    "What the segmentation head reads from the features. Forecasts start after the time 0."
)
DEPTH_TEXT = (
    "What the depth head reads from the features: dark is near. Forecasts start after the time 0."
)
RGB_TEXT = (
    "What the RGB head draws from the features; nothing is measured by it. Forecasts start after "
    "the time 0."
)
SCORES_TEXT = (
    "All at the target frame. Best: the sample nearest to the true features at the last step, "
    "chosen window by window (crop by crop). Mean: the samples' features averaged, then the head "
    "once. Regressor null: the best of as many Gaussian draws around the discriminative forecast, "
    "spread as the samples are. Reconstruction: closed loop, each frame encoded and decoded "
    "against the reconstruction before it; open loop: encoded against the true frame before it. "
    "Feature loss: smooth-L1, beta 0.1. In brackets: 95 % intervals, clips (and seeds) drawn "
    "again with replacement."
)


def _ahead(report: Report, horizon: str) -> str:
    """`0.6 s (mid, 3 steps)`"""
    steps = report.config[f"{horizon}_steps"]
    many = "1 step" if steps == 1 else f"{steps} steps"
    return f"{steps * report.step_s:.2g} s ({horizon}, {many})"


def _scores(report: Report) -> str:
    order = expected_order(report.rows)
    mood = {True: " holds", False: " fails", None: ""}[order.holds]
    header, body = table(report.rows)
    return f"""<h2>Scores</h2>
<p class="order{mood}">{escape(order.text)}</p>
<div class="wide">{table_html(header, body)}</div>
<p class="soft">{escape(SCORES_TEXT)}</p>
<details><summary>As Markdown, to paste</summary>
<pre>{escape(markdown_table(report.rows))}</pre></details>"""


def _probes(report: Report) -> str:
    hidden_size = str(report.provenance["cache"].get("hidden_size", "D"))
    lines = "\n".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td>"
        f"<td>{escape(value_text(report.probes[name]))}</td>"
        f"<td>{escape(text.replace('{hidden_size}', hidden_size))}</td></tr>"
        for name, text in PROBE_TEXTS.items()
        if name in report.probes
    )
    by_step = report.probes.get("feature_loss_by_step", {})
    steps = max(map(len, by_step.values()), default=0)
    header = ["row", *(f"step {step + 1}" for step in range(steps))]
    body = [[ROW_LABELS[name], *map(value_text, losses)] for name, losses in by_step.items()]
    return f"""<h2>Probes</h2>
<table class="facts probes"><tbody>
{lines}
</tbody></table>
<details><summary>Feature loss at each step of the mid horizon</summary>
<div class="wide">{table_html(header, body)}</div></details>"""


def _best_of_k(report: Report) -> str:
    if not report.best_of_k:
        return ""
    plot = plot_best_of_k(report.best_of_k, report.rows)
    return f"""<h2>Best of k samples</h2>
<p>Expected feature loss of the best of k samples at the target frame.</p>
{plot_html(plot)}"""


def _curves(plots: Sequence[Plot]) -> str:
    if not plots:
        return ""
    return "\n".join(["<h2>Training curves</h2>", *map(plot_html, plots)])


def _origin(report: Report) -> str:
    seconds = {name: f"{value:.2f} s" for name, value in report.seconds.items()}
    parts = [
        ("Time", seconds),
        ("Provenance", flatten(report.provenance)),
        ("Settings", flatten(report.config)),
    ]
    blocks = [
        f"<details><summary>{title}</summary>{facts_html(facts)}</details>"
        for title, facts in parts
    ]
    return "\n".join(["<h2>Where this comes from</h2>", *blocks])


def _size(body: str) -> str:
    size_mb = (len(body) + len(STYLE) + len(PAGE.template)) / 1e6
    return f'<p class="soft">This page is one file of {size_mb:.1f} MB; it fetches nothing.</p>'
