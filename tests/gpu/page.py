"""What people read of a report.json: REPORT.md, and the section of docs/measured.md."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
REPORT = Path(__file__).with_name("report.json")
NOT_MEASURED = (
    "Not measured on a GPU: `make gpu` does so where there is one, and its figures come here.\n"
)
STAGES = (  # what is trained; the section and config whose rate is taken
    ("tokenizer/released-256", "tokenizer", "tokenizer/one-h200-256"),
    ("tokenizer/released-512", "tokenizer", "tokenizer/released-512"),
    ("tokenizer/released-512-cooldown-1", "tokenizer", "tokenizer/released-512"),
    ("tokenizer/released-512-cooldown-2", "tokenizer", "tokenizer/released-512"),
    ("world/released", "world", "world/one-h200"),
    ("world/released-cooldown", "world", "world/one-h200"),
)
"""The released schedule. Same model and frame size; released batches are 1,024."""
K = "256"

Rows = list[list[Any]]


def markdown(report: dict[str, Any]) -> str:
    """REPORT.md."""
    return "\n".join(_lines(report)).rstrip() + "\n"


def measured(report: dict[str, Any] | None) -> str:
    """The GPU's part of docs/measured.md; only a report made on one has figures."""
    if report is None or report["dry"]:
        return NOT_MEASURED
    table = _table(["what", "measured"], [*_summary(report)])
    made = report["made"].partition("T")[0]
    return (
        f"On one {report['device']} (torch {report['torch']}, CUDA {report['cuda']}, {made}; "
        f"`make gpu`, all figures in tests/gpu/REPORT.md):\n\n{table}\n"
    )


def read_report() -> dict[str, Any] | None:
    """The committed one."""
    if not REPORT.exists():
        return None
    report: dict[str, Any] = json.loads(REPORT.read_text(encoding="utf-8"))
    return report


def schedule(report: dict[str, Any]) -> Rows:
    """Stage, samples in all, samples/s that were measured, GPU-hours that follow; without those
    whose rate is not known."""
    rows = []
    for stage, section, config in STAGES:
        rate = _rate(_figures(report, section).get(config, {}))
        if rate:
            values = yaml.safe_load((ROOT / "configs" / f"{stage}.yaml").read_text())
            samples = values["steps"] * values["batch_size"]
            rows.append([stage, samples, config, rate, samples / rate / 3600])
    return rows


def _summary(report: dict[str, Any]) -> Iterator[list[Any]]:
    found = _figures(report, "backbone")
    for name, row in found.items():
        yield [f"ViT-B alone, {name}", f"{row['frames_per_s']:,.0f} frames/s, {_tflops(row)}"]
    for name, row in _figures(report, "extraction").items():
        if "end_to_end_over_forward" in row:
            ratio = f"{row['end_to_end_over_forward']:.2f} ({row['slowest_stage']})"
            yield [f"extraction from videos over the backbone alone, {name}", ratio]
    for section in ("tokenizer", "world", "compiled"):
        for name, row in _figures(report, section).items():
            unit = "pairs" if "pairs_per_s" in row else "windows"
            memory = f"{row['peak_memory_gb']:.0f} GB"
            text = f"{_rate(row):,.0f} {unit}/s, {_tflops(row)}, {memory}"
            yield [f"steps of {name}{', compiled' if section == 'compiled' else ''}", text]
    for name, by_count in _figures(report, "selection").get("variants", {}).items():
        if name != "plain" and K in by_count:
            yield [f"best of {K}, {name}: speed over the plain form", by_count[K]["speedup"]]
    hours = [row[-1] for row in schedule(report)]
    if len(hours) == len(STAGES):
        yield ["released schedule, GPU-hours (computed from the rates above)", f"{sum(hours):.0f}"]


def _lines(report: dict[str, Any]) -> Iterator[str]:
    dry = " (dry: everything small, no figure means anything)" if report["dry"] else ""
    yield f"# {report['device']}{dry}\n"
    told = ("made", "commit", "driver", "torch", "cuda", "cudnn", "capability", "python", "cores")
    yield ", ".join(f"{name} {report[name]}" for name in told if report.get(name)) + "."
    if report["not_installed"]:
        yield f"Not installed: {', '.join(report['not_installed'])}."
    yield ""
    rows = []
    for name, section in report["sections"].items():
        outcomes = [test["outcome"] for test in section.get("tests", {}).values()]
        counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
        text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        rows.append([name, section["status"], section["seconds"], section.get("reason", text)])
    yield _table(["section", "status", "s", "tests"], rows)
    for name, section in report["sections"].items():
        shown = list(_tests(section)) + list(_timed(name, section.get("figures", {})))
        if "said" in section:
            shown += ["```", *section["said"], "```"]
        if shown:
            yield f"\n## {name}\n"
            yield from shown
    rows = [] if report["dry"] else schedule(report)
    if rows:
        yield "\n## The released schedule\n"
        yield "Computed: samples of the stage over the samples/s measured above.\n"
        yield _table(["stage", "samples", "rate of", "samples/s", "GPU-hours"], rows)
        yield f"\nAll together: {_shown(sum(row[-1] for row in rows))} GPU-hours."


def _tests(section: dict[str, Any]) -> Iterator[str]:
    tests = section.get("tests", {})
    rows: Rows = []
    for name, test in tests.items():
        figures = test["figures"].get("parity", test["figures"])
        if "worst_share" in figures:
            figures = {
                "largest relative error": figures["max_relative"],
                "of its tolerance": figures["worst_share"],
                "in": figures["worst_name"],
            }
        text = ", ".join(f"{key} {_shown(value)}" for key, value in figures.items())
        if test["outcome"] == "skipped":
            text = test["reason"]
        if text or test["outcome"] != "passed":
            rows.append([name.removeprefix("test_"), test["outcome"], text])
    if rows:
        yield _table(["test", "outcome", "figures"], rows)
    for name, test in tests.items():
        if test["outcome"] == "failed":
            yield f"\n{name}, {test['outcome']}:\n\n```\n{test['reason']}\n```"


def _timed(name: str, figures: dict[str, Any]) -> Iterator[str]:
    """Tables of figures: rows of numbers by name, and traces."""
    if name == "selection":
        figures = {kind: by[K] for kind, by in figures.get("variants", {}).items() if K in by}
    plain = {row: values for row, values in figures.items() if "longest" not in values}
    columns = list(dict.fromkeys(key for values in plain.values() for key in values))
    columns = [
        key for key in columns if not any(isinstance(v.get(key), list) for v in plain.values())
    ]
    if plain:
        rows = [[row, *(values.get(key) for key in columns)] for row, values in plain.items()]
        yield _table(["", *columns], rows)
    for row, values in figures.items():
        if "longest" in values:
            told = {key: value for key, value in values.items() if key != "longest"}
            yield f"\n{row}: " + ", ".join(f"{key} {_shown(v)}" for key, v in told.items()) + "\n"
            yield _table([*values["longest"][0]], [[*each.values()] for each in values["longest"]])


def _figures(report: dict[str, Any], section: str) -> dict[str, Any]:
    figures: dict[str, Any] = report["sections"].get(section, {}).get("figures", {})
    return figures


def _rate(row: dict[str, Any]) -> float:
    return float(row.get("pairs_per_s") or row.get("windows_per_s") or 0.0)


def _tflops(row: dict[str, Any]) -> str:
    return f"{row['tflop_per_s']:.0f} TFLOP/s"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|")


def _table(heading: list[str], rows: Rows) -> str:
    lines = [heading, ["---"] * len(heading), *([_shown(v) for v in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
