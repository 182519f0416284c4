"""Which futures a best-of-many world model misses, and what helps: more samples, more noise, more
candidates in training.

    python tests/experiments/modes.py --quickstart runs/quickstart --out DIR --json FILE

The quickstart's own world model with its noise scaled and with more samples; then world models
trained with other numbers of candidates K, at equal steps, with its noise as it is. Every report
has three seeds.

JSON: rows: [{num_samples_train, noise_scale, num_samples, values: report rows as
"mid samples mode_recall" -> [value, interval_low, interval_high], modes: the probes of the
report}]. The rows of the discriminative model are in all of them, the same.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quickstart_runs import QuickstartRuns, save

ROWS = ("samples", "discriminative", "best", "mean", "present")


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True, help="a finished quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--noise", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    parser.add_argument("--samples", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument(
        "--candidates", type=int, nargs="*", default=[4, 64], help="values of K beside its own"
    )
    arguments = parser.parse_args()
    stages = QuickstartRuns(arguments.quickstart, arguments.out)
    own = arguments.quickstart / "world-model"
    own_candidates = json.loads((own / "config.json").read_text())["num_samples_train"]
    rows: list[dict[str, Any]] = []

    def evaluate(world: Path, candidates: int, noise: float, samples: int) -> None:
        about = {"noise_scale": noise, "num_samples": samples}
        report = stages.run(
            "report",
            f"report-{candidates}-{noise:g}-{samples}",
            {
                **about,
                "world": str(world),
                "curves": None,
                "videos": None,
                "num_seeds": 3,
                "num_pictures": 0,
                "regressor_null": False,
            },
        )
        rows.append({"num_samples_train": candidates, **about, **figures(report)})
        save(arguments.json, {"rows": rows})

    for noise in arguments.noise:
        evaluate(own, own_candidates, noise, arguments.samples[0])
    for samples in arguments.samples[1:]:
        evaluate(own, own_candidates, arguments.noise[0], samples)
    for candidates in arguments.candidates:
        changes = {"model": {"num_samples_train": candidates}}
        world = stages.run("world-model", f"world-{candidates}", changes)
        evaluate(world, candidates, arguments.noise[0], arguments.samples[0])


def figures(report: Path) -> dict[str, Mapping[str, Any]]:
    """What is kept of a report folder: its rows with intervals, and its probes of modes."""
    found = json.loads((report / "report.json").read_text(encoding="utf-8"))
    values = {
        f"{row['horizon']} {row['row']} {row['metric']}": [
            round(row[key], 4) for key in ("value", "interval_low", "interval_high")
        ]
        for row in found["rows"]
        if row["row"] in ROWS and row["metric"] != "mode_recall_weighted"
    }
    modes = {
        horizon: {key: value for key, value in part.items() if key != "reliability"}
        for horizon, part in found["probes"]["modes"].items()
        if horizon != "overlap"
    }
    return {"values": values, "modes": modes}


if __name__ == "__main__":
    main()
