"""Which futures a best-of-many world model misses, and what helps: more samples, more noise, more
candidates in training, several winners.

    python tests/experiments/modes.py --quickstart runs/quickstart --out DIR --json FILE

The quickstart's own world model with its noise scaled and with more samples; then world models
trained with other numbers of candidates K, and ones whose loss is the mean over the best few
of their K candidates instead of the best alone; at equal steps, with the noise as it is. Every
report has three seeds.

Found (modes.json: 60 clips, one training a setting, code of a few commits earlier): 50 and 100
samples hit what 20 miss. Noise scaled by 1.5 or 2 lowers precision, by 0.5 recall. K = 64 lowers
precision at equal steps; K = 4 raises it and lowers recall. Four winners of 16 raise precision at
both horizons and keep the best sample; short recall falls (84 to 70 %), of mid recall the 60 clips
do not tell. One training a setting; three, on other clips: winners.py.

JSON: rows: [{num_samples_train, num_winners, noise_scale, num_samples, values: report rows as
"mid samples mode_recall" -> [value, interval_low, interval_high], modes: the probes of the
report}]. The rows of the discriminative model are in all of them, the same.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quickstart_runs import QuickstartRuns, save

PLAIN = {
    "curves": None,
    "videos": None,
    "num_seeds": 3,
    "num_pictures": 0,
    "regressor_null": False,
}
"""Settings of all reports; None takes one of the quickstart's away."""
ROWS = ("samples", "discriminative", "best", "mean", "present")


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True, help="a finished quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--noise", type=float, nargs="+", default=[1.0, 0.5, 0.75, 1.5, 2.0])
    parser.add_argument("--samples", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument(
        "--candidates", type=int, nargs="*", default=[4, 64], help="values of K beside its own"
    )
    parser.add_argument(
        "--winners", type=int, nargs="*", default=[4], help="winners of its own K candidates"
    )
    arguments = parser.parse_args()
    stages = QuickstartRuns(arguments.quickstart, arguments.out)
    own = arguments.quickstart / "world-model"
    own_candidates = json.loads((own / "config.json").read_text())["num_samples_train"]
    rows: list[dict[str, Any]] = []

    def evaluate(
        world: Path, name: str, noise: float, samples: int, *, candidates: int, winners: int = 1
    ) -> None:
        about = {"noise_scale": noise, "num_samples": samples}
        name = f"report-{name}-{noise:g}-{samples}"
        report = stages.out / name
        if not (report / "report.json").exists():
            changes = {**about, "world": str(world), **PLAIN}
            stages.run("report", name, changes)
        trained = {"num_samples_train": candidates, "num_winners": winners}
        rows.append({**trained, **about, **figures(report)})
        save(arguments.json, {"rows": rows})

    first_noise, first_samples = arguments.noise[0], arguments.samples[0]
    for noise in arguments.noise:
        evaluate(own, "own", noise, first_samples, candidates=own_candidates)
    for samples in arguments.samples[1:]:
        evaluate(own, "own", first_noise, samples, candidates=own_candidates)
    for candidates in arguments.candidates:
        changes = {"model": {"num_samples_train": candidates}}
        name = f"world-{candidates}"
        world = stages.run("world-model", name, changes)
        evaluate(world, name, first_noise, first_samples, candidates=candidates)
    for winners in arguments.winners:
        name = f"winners-{winners}"
        world = stages.run("world-model", name, {"num_winners": winners})
        evaluate(
            world, name, first_noise, first_samples, candidates=own_candidates, winners=winners
        )


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
