"""The little world after longer training: more windows a clip, more steps, several seeds.

    python tests/experiments/longer.py --quickstart runs/quickstart --out DIR --json FILE

The quickstart's best-of-many and discriminative world models on 64 windows a clip (delta tokens
straight from its training videos) for twice its steps; under an hour on two cores. Each seed is a
training of its own; every report has three seeds of noise.

JSON: steps, rows: [{seed, values: report rows as "mid best miou" -> value}].
"""

import argparse
from pathlib import Path
from typing import Any

from quickstart_runs import QuickstartRuns, report_values, save

WINDOWS = 64


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True, help="a finished quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder for cache and runs")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--steps", type=int, default=3000, help="steps of each model [3000]")
    parser.add_argument("--seeds", type=int, default=3, help="trainings [3]")
    arguments = parser.parse_args()
    stages = QuickstartRuns(arguments.quickstart, arguments.out)
    deltas = stages.run(
        "patches",
        f"deltas-{WINDOWS}",
        {"tokenizer": str(arguments.quickstart / "tokenizer"), "num_windows": WINDOWS},
    )
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        models = {
            kind: stages.run(
                stage,
                f"{kind}-seed{seed}",
                {"deltas": str(deltas), "steps": arguments.steps, "seed": seed},
            )
            for kind, stage in {"world": "world-model", "discriminative": "discriminative"}.items()
        }
        report = stages.run(
            "report",
            f"report-seed{seed}",
            {
                **{kind: str(model) for kind, model in models.items()},
                "curves": [str(model) for model in models.values()],
            },
        )
        rows.append({"seed": seed, "values": report_values(report)})
        save(arguments.json, {"steps": arguments.steps, "rows": rows})


if __name__ == "__main__":
    main()
