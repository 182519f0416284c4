"""Does a tokenizer's decoder come to use its delta token? z-swap over steps for two LayerScales.

    python tests/experiments/layer_scale.py --quickstart runs/quickstart --out DIR --json FILE

Trains the quickstart's tokenizer with layer_scale_init 1e-5 (released) and 0.1, three seeds each,
all else as in the quickstart, whose first weights are wider (standard deviation 0.08) than the
released ones (0.02: --initializer-range 0.02). z-swap ratio: the validation loss with delta tokens
swapped between windows over the loss with the right ones; near 1: the decoder ignores the token.

JSON: steps, initializer_range, runs: [{layer_scale_init, seed, z_swap_ratio: [[step, ratio]],
copy_last_ratio, escaped_at_step: the first evaluation with a z-swap ratio of 1.5 or more or null}].
"""

import argparse
from pathlib import Path
from typing import Any

from quickstart_runs import QuickstartRuns, logged, save

ESCAPED = 1.5
"""z-swap ratio from which a decoder counts as using its token (stuck: 1.00, healthy: 4 or more)."""


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True, help="a finished quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--steps", type=int, default=1200, help="steps a run [1200]")
    parser.add_argument("--seeds", type=int, default=3, help="seeds a value [3]")
    parser.add_argument(
        "--initializer-range", type=float, default=0.08, help="of the first weights [0.08]"
    )
    arguments = parser.parse_args()
    stages = QuickstartRuns(arguments.quickstart, arguments.out)
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for init in (1e-5, 0.1):
            run = stages.run(
                "tokenizer",
                f"tokenizer-{init:g}-seed{seed}",
                {
                    "model": {
                        "layer_scale_init": init,
                        "initializer_range": arguments.initializer_range,
                    },
                    "seed": seed,
                    "steps": arguments.steps,
                    "eval_every": 100,
                    "deltas": None,
                    "allow_stuck": True,
                },
            )
            swaps = logged(run, "validation_z_swap_ratio")
            runs.append(
                {
                    "layer_scale_init": init,
                    "seed": seed,
                    "z_swap_ratio": swaps,
                    "copy_last_ratio": logged(run, "validation_copy_last_ratio"),
                    "escaped_at_step": next((s for s, ratio in swaps if ratio >= ESCAPED), None),
                }
            )
    save(
        arguments.json,
        {
            "steps": arguments.steps,
            "initializer_range": arguments.initializer_range,
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
