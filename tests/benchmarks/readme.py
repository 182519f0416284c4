"""Write the figures of README.md and docs/measured.md from JSON files.

    python tests/benchmarks/readme.py                        from quickstart.json beside this script
                                                             and tests/gpu/report.json
    python tests/benchmarks/readme.py --report REPORT.json   first take a quickstart's report.json

quickstart.json: the rows, probes and seconds of the report of one `make quickstart`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from deltatok.evaluate.report.rows import ReportRow, mode_pairs, table

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))
import page

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
FIGURES = HERE / "quickstart.json"
BEGIN, END = "<!-- quickstart: begin -->\n", "<!-- quickstart: end -->\n"
MEASURED = HERE.parents[1] / "docs" / "measured.md"
GPU_BEGIN, GPU_END = "<!-- gpu: begin -->\n", "<!-- gpu: end -->\n"
KEPT = ("rows", "probes", "seconds")
PROBES = ("z_swap_ratio", "zero_z_ratio", "copy_last_ratio")


def section(figures: dict[str, Any]) -> str:
    """The README's lines between the two markers, from quickstart.json."""
    rows = [ReportRow(**row) for row in figures["rows"]]
    seconds = sum(figures["seconds"]["stages"].values())
    probes = ", ".join(f"{name} {figures['probes'][name]:.3g}" for name in PROBES)
    return (
        f"{table(rows).markdown()}\n\n{modes(rows)}"
        f"All stages together took {seconds:.0f} s on two CPU cores. The tokenizer on this cache: "
        f"{probes}.\n"
    )


def modes(rows: list[ReportRow]) -> str:
    """A paragraph on the mode metrics, mid-term; nothing from a report without them."""
    pairs = {pair.row: pair.text() for pair in mode_pairs(rows) if pair.horizon == "mid"}
    if "samples" not in pairs:
        return ""
    return (
        "All possible futures of these clips are known. 0.6 s ahead, mode recall (the share of "
        "those that can be told apart that some forecast hits) | mode precision (the share of the "
        f"forecasts that are one of them), in %: the samples {pairs['samples']}, the "
        f"discriminative model's one forecast {pairs['discriminative']}, the true frames, as the "
        f"head reads them, {pairs['present']}. In brackets: 95 % intervals.\n\n"
    )


def main() -> int:
    """Take a report if one is given, then rewrite the sections; 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path)
    report = parser.parse_args().report
    if report is not None:
        loaded = json.loads(report.read_text(encoding="utf-8"))
        kept = {key: loaded[key] for key in KEPT}
        FIGURES.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    put(README, BEGIN, section(figures), END)
    put(MEASURED, GPU_BEGIN, page.measured(page.read_report()), GPU_END)
    return 0


def put(path: Path, begin: str, text: str, end: str) -> None:
    """`text` in place of what is between the two markers."""
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(before + begin + text + end + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
