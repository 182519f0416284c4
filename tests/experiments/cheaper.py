"""Tokenizer training for less: loss, z-swap ratio and FLOPs by step, for ways to leave work out.

    python tests/experiments/cheaper.py --quickstart runs/quickstart --out DIR --json FILE

The quickstart's tokenizer, trained on a share of the patches (of the decoder, or of both halves; to
the end, or with all patches for the last fifth of the steps), with wider pairs, and as it is; all
else as in the quickstart. The learning rate is constant after the warm-up, so the curve of a run
that is the same in all its steps is that of every shorter run too: it tells equal time as well as
equal steps. FLOPs are those that the run's own log counts. `--times` measures seconds of a step
instead, all arms in turn in one process.

JSON: batch_size, rows: [{arm, seed, settings, curve: [[step, GFLOP a pair so far, validation_loss,
z_swap_ratio, copy_last_ratio]]}], times: {arm: seconds of a step, the median of its turns}.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quickstart_runs import QuickstartRuns, save

from deltatok.shards import PatchShards
from deltatok.train.config import TokenizerTrainConfig
from deltatok.train.data.order import RankSlice, generator
from deltatok.train.engine.logs import Meter
from deltatok.train.models.configs import DeltaTokConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.tokenizer import TokenizerObjective

STEPS = 1200
EVERY = 100
TURNS = 9
LAST_FIFTH = {"whole_frames_from": STEPS * 4 // 5}


def _share(encoder: float, decoder: float) -> dict[str, float]:
    return {"encoder_patch_fraction": encoder, "decoder_patch_fraction": decoder}


ARMS: dict[str, dict[str, Any]] = {
    "as now": {},
    "decoder 1/2": _share(1, 0.5),
    "decoder 1/4": _share(1, 0.25),
    "decoder 1/4, then all": {**_share(1, 0.25), **LAST_FIFTH},
    "both 1/2": _share(0.5, 0.5),
    "both 1/2, then all": {**_share(0.5, 0.5), **LAST_FIFTH},
    "both 1/4, then all": {**_share(0.25, 0.25), **LAST_FIFTH},
    "encoder 1/2, decoder 1/4, then all": {**_share(0.5, 0.25), **LAST_FIFTH},
    "wide pairs 1/4": {"wide_pair_fraction": 0.25},
}


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True, help="a finished quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--json", type=Path, required=True, help="the result; rows are added to it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="[all]")
    parser.add_argument(
        "--times", action="store_true", help="measure seconds a step, train nothing"
    )
    arguments = parser.parse_args()
    stages = QuickstartRuns(arguments.quickstart, arguments.out)
    result: dict[str, Any] = {"rows": [], "times": {}}
    if arguments.json.exists():
        result = json.loads(arguments.json.read_text(encoding="utf-8"))
    if arguments.times:
        result["times"] = step_times(arguments.quickstart / "patches")
        save(arguments.json, result)
        return
    done = {(row["arm"], row["seed"]) for row in result["rows"]}
    for seed in arguments.seeds:
        for arm in arguments.arms:
            if (arm, seed) in done:
                continue
            name = "".join(c if c.isalnum() else "-" for c in f"{arm}-seed{seed}")
            settings = {"steps": STEPS, "eval_every": EVERY, "log_every": EVERY, "seed": seed}
            run = stages.run(
                "tokenizer",
                f"tokenizer-{name}",
                {**settings, **ARMS[arm], "deltas": None, "allow_stuck": True},
            )
            result["rows"].append(
                {"arm": arm, "seed": seed, "settings": ARMS[arm], "curve": curve(run)}
            )
            save(arguments.json, result)


def curve(run: Path) -> list[list[float]]:
    """Of every evaluation: step, GFLOP so far by pair of a batch, and what it found."""
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    found: list[list[float]] = []
    spent, last = 0.0, 0
    for line in lines:
        if line["kind"] == "train":
            per_pair = line["tflop_per_s"] * 1e3 / line["pairs_per_s"]
            spent, last = spent + per_pair * (line["step"] - last), line["step"]
        elif line["kind"] == "validation":
            names = ("loss", "z_swap_ratio", "copy_last_ratio")
            values = [round(line[f"validation_{name}"], 5) for name in names]
            found.append([line["step"], round(spent, 4), *values])
    return found


def step_times(patches: Path) -> dict[str, float]:
    """Seconds of forward and backward of 64 pairs, the median of TURNS; the arms take turns."""
    shards, cpu = PatchShards(patches), torch.device("cpu")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 384}
    objectives = {}
    for arm, settings in ARMS.items():
        config = TokenizerTrainConfig(
            patches=str(patches),
            out="unused",
            model=DeltaTokConfig(
                hidden_size=shards.shape[2], use_rope_aug=False, layer_scale_init=0.1, **sizes
            ),
            batch_size=64,
            **settings,
        )
        model = DeltaTok(config.model, generator=generator(0, "first weights"))
        objectives[arm] = TokenizerObjective(model, shards, config, RankSlice(), cpu)
    taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for step in range(TURNS):
        for arm, objective in objectives.items():
            batch, meter = objective.read(step), Meter("pairs", cpu)
            begun = time.process_time()
            losses, _ = objective.losses(
                objective.model, batch, slice(0, 64), step=step, meter=meter
            )
            losses.mean().backward()  # type: ignore[no-untyped-call]
            taken[arm].append(time.process_time() - begun)
    return {arm: round(float(np.median(values)), 4) for arm, values in taken.items()}


if __name__ == "__main__":
    main()
