"""What more candidates bring: best-of-20 and mean of a world model trained with K = 1 ... 1,024.

    python tests/experiments/candidates.py --quickstart runs/quickstart --out DIR --json FILE

The quickstart's world model at equal steps for every K, and the discriminative one beside them
(the paper's figure 5 at toy scale: does best keep improving, does mean dip and flatten?).

With --selection-dtype bfloat16 the selection is made in bfloat16 and its best 8 are compared again
in full (several times as fast for large K).

JSON: steps, batch_size, rows: [{selection_dtype, num_samples_train (0: discriminative),
validation_best_loss, validation_mean_loss, values: report rows as "mid best miou" -> value}].
"""

import argparse
from pathlib import Path
from typing import Any

from quickstart_runs import QuickstartRuns, logged, report_values, save


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True, help="a finished quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--steps", type=int, default=1000, help="steps a run [1000]")
    parser.add_argument("--batch-size", type=int, default=64, help="windows a step [64]")
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024], help="values of K"
    )
    parser.add_argument("--selection-dtype", default="auto", help="auto or bfloat16 [auto]")
    arguments = parser.parse_args()
    selection: dict[str, Any] = {}
    if arguments.selection_dtype != "auto":
        selection = {"selection_dtype": arguments.selection_dtype, "selection_finalists": 8}
    stages = QuickstartRuns(arguments.quickstart, arguments.out)
    common = {"steps": arguments.steps, "batch_size": arguments.batch_size}
    discriminative = stages.run("discriminative", "discriminative", common)
    rows: list[dict[str, Any]] = []
    for candidates in (0, *arguments.candidates):
        if candidates:
            world = stages.run(
                "world-model",
                f"world-{candidates}",
                {
                    **common,
                    **selection,
                    "save_every": 100,
                    "model": {"num_samples_train": candidates},
                },
            )
        else:
            world = discriminative
        report = stages.run(
            "report",
            f"report-{candidates}",
            {
                "world": str(world) if candidates else None,
                "discriminative": str(discriminative),
                "curves": [str(world)],
            },
        )
        rows.append(
            {
                "selection_dtype": arguments.selection_dtype,
                "num_samples_train": candidates,
                "validation_best_loss": logged(world, "validation_best_loss")[-1][1],
                "validation_mean_loss": logged(world, "validation_mean_loss")[-1][1],
                "values": report_values(report),
            }
        )
        save(arguments.json, {**common, "rows": rows})


if __name__ == "__main__":
    main()
