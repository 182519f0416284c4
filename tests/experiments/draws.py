"""How many cached draws are enough: a world model trained on 1, 2, 4, 16 and 64 windows a clip, at
equal steps, against fresh windows every step.

    python tests/experiments/draws.py --quickstart runs/quickstart --out DIR --json FILE

Delta tokens are made straight from the quickstart's training videos by its tokenizer. "Fresh" is a
cache of as many windows a clip as training takes, each used once. The validation loss of all is
taken on the same windows: those that the 64-window cache has of the clips kept out of training.

JSON: steps, batch_size, validation_windows, rows: [{windows_per_clip, seed, epochs, fresh,
validation_best_loss, validation_mean_loss, values: report rows as "mid best miou" -> value}].
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from quickstart_runs import QuickstartRuns, report_values, save

from deltatok.shards import DeltaShards
from deltatok.train.config import WorldTrainConfig
from deltatok.train.data.order import RankSlice, split_windows
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.world import DeltaWorldObjective

VALIDATION_FRACTION = 0.05
"""Share of the clips that no run trains on: 17 of the quickstart's 320."""
VALIDATION_WINDOWS = 512
BATCH_SIZE = 64


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True, help="a finished quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder for caches and runs")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--steps", type=int, default=900, help="steps a run [900]")
    parser.add_argument(
        "--windows", type=int, nargs="+", default=[1, 2, 4, 16, 64], help="windows a clip"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs [0 1 2]"
    )
    arguments = parser.parse_args()
    stages = QuickstartRuns(arguments.quickstart, arguments.out)
    caches = {count: _cache(stages, arguments.quickstart, count) for count in arguments.windows}
    num_clips = len(_training(caches[max(caches)])) // max(caches)
    fresh = math.ceil(arguments.steps * BATCH_SIZE / num_clips)
    caches[fresh] = _cache(stages, arguments.quickstart, fresh)
    rows: list[dict[str, Any]] = []
    for seed, (count, cache) in itertools.product(arguments.seeds, caches.items()):
        name = f"{count}-seed{seed}"
        world = stages.run(
            "world-model",
            f"world-{name}",
            {
                "deltas": str(cache),
                "seed": seed,
                "steps": arguments.steps,
                "batch_size": BATCH_SIZE,
                "validation_fraction": VALIDATION_FRACTION,
                "validation_windows": VALIDATION_WINDOWS,
            },
        )
        report = stages.run(
            "report",
            f"report-{name}",
            {"world": str(world), "curves": [str(world)]},
        )
        rows.append(
            {
                "windows_per_clip": count,
                "seed": seed,
                "fresh": count == fresh,
                "epochs": arguments.steps * BATCH_SIZE / len(_training(cache)),
                **_validation(world, caches[max(arguments.windows)]),
                "values": report_values(report),
            }
        )
        save(
            arguments.json,
            {
                "steps": arguments.steps,
                "batch_size": BATCH_SIZE,
                "clips": num_clips,
                "validation_windows": VALIDATION_WINDOWS,
                "rows": rows,
            },
        )


def _cache(stages: QuickstartRuns, quickstart: Path, windows: int) -> Path:
    return stages.run(
        "patches",
        f"deltas-{windows}",
        {"tokenizer": str(quickstart / "tokenizer"), "num_windows": windows},
    )


def _training(cache: Path) -> Any:
    shards = DeltaShards(cache)
    return split_windows(shards.keys, shards.clip_index, VALIDATION_FRACTION).training


def _validation(world: Path, cache: Path) -> dict[str, float]:
    """The trainer's own validation of a finished model, on the windows of `cache`."""
    config = WorldTrainConfig(
        deltas=str(cache),
        out=str(world),
        batch_size=1,
        validation_fraction=VALIDATION_FRACTION,
        validation_windows=VALIDATION_WINDOWS,
    )
    stage = DeltaWorldObjective(
        DeltaWorldNetwork.from_pretrained(world),
        DeltaShards(cache),
        config,
        RankSlice(rank=0, num_ranks=1),
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        values = stage.evaluate()
    return {name: values[name] for name in ("validation_best_loss", "validation_mean_loss")}


if __name__ == "__main__":
    main()
