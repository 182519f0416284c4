"""Where a rollout's error comes from, and what closed-loop training does about it: feature loss and
mIoU by step over rollouts of ten steps.

    python tests/experiments/drift.py --quickstart runs/quickstart --out DIR --json FILE

A last stage of a few hundred steps, with optimizer state, from the quickstart's tokenizer: as it
was trained, or in a closed loop; and tokenizers trained so from their first step (--whole). World
models: a last stage too, from the quickstart's, on the delta tokens of the tokenizer. All else as
in the quickstart. The seed of a last stage decides its batches alone.

Measured on clips of 3 s of another little world (its own seed, nothing was chosen on them): four
frames seen, ten forecast, 0.2 s apart. Of a tokenizer the reconstructions, closed loop (encoder and
decoder start from its own last reconstruction) and open loop (true frames' delta tokens, decoded
from its own last reconstruction: what is left of a forecast whose delta tokens are all right); of a
world model the best of 20 samples (at each step its own best), and their mean.

JSON: clips, steps, rows: [{stage: last or whole, tokenizer, world, seed, settings, the last
validation_loss and validation_z_swap_ratio or validation_best_loss, loss: {row: [smooth L1 of step
1, 2, ...]}, miou: {row: [percent of step 1, 2, ...]}}]: a row a trained model; world: the arm of
the world model, null for the tokenizer alone.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quickstart_runs import QuickstartRuns, logged, save
from torch import Tensor

from deltatok.evaluate.forecast.config import ForecastConfig
from deltatok.evaluate.forecast.rollout import encode_windows, feature_loss, forecast_horizon
from deltatok.evaluate.forecast.run import ForecastInputs, open_inputs
from deltatok.evaluate.forecast.scores import class_counts, class_ious, class_maps, confusion_matrix
from deltatok.shards.evaluation.labels import ClipLabels
from deltatok.train.models.heads import SegmentationHead

STEPS = 10
CONTEXT = 4
STAGE = {"steps": 300, "warmup_steps": 20, "eval_every": 100, "start_optimizer": True}
WORLD_STAGE = {"steps": 500, "warmup_steps": 20, "eval_every": 250, "start_optimizer": True}
WORLD = {
    "num_train_clips": 0,
    "num_head_clips": 0,
    "num_val_clips": 120,
    "labelled_duration_s": 3.0,
    "seed": 1,
}


def _closed(steps: int, half: str, gradient: str) -> dict[str, Any]:
    return {
        "closed_loop_steps": steps,
        "closed_loop": half,
        "closed_loop_gradient": gradient,
    }


TOKENIZERS: dict[str, dict[str, Any]] = {
    "as now": {},
    **{
        f"{half} {steps} {gradient}": _closed(steps, half, gradient)
        for steps in (2, 4)
        for half in ("both", "decoder")
        for gradient in ("through", "stopped")
    },
    "decoder 7 through": {**_closed(7, "decoder", "through"), "batch_size": 63},
}
WORLDS: dict[str, dict[str, Any]] = {
    "as now": {},
    "rollout 0.25": {"rollout_probability": 0.25},
    "rollout 0.5": {"rollout_probability": 0.5},
}


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True, help="a finished quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--json", type=Path, required=True, help="the result; rows are added to it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument(
        "--tokenizers", nargs="*", default=list(TOKENIZERS), choices=list(TOKENIZERS), help="[all]"
    )
    parser.add_argument(
        "--whole",
        nargs="*",
        default=[],
        choices=list(TOKENIZERS),
        help="from the first step [none]",
    )
    parser.add_argument(
        "--worlds",
        nargs="*",
        default=list(WORLDS),
        choices=list(WORLDS),
        help="world models to train on the delta tokens of each [all]; given none: none",
    )
    arguments = parser.parse_args()
    stages = QuickstartRuns(arguments.quickstart, arguments.out)
    # --- the clips: of a seed of their own, longer ---
    world = stages.run("world", "long-world", WORLD)
    patches = stages.run(
        "val-patches", "long-patches", {"videos": [str(world / "val")], "num_frames": 14}
    )
    rows: list[dict[str, Any]] = []
    if arguments.json.exists():
        rows = json.loads(arguments.json.read_text(encoding="utf-8"))["rows"]
    done = {(row["stage"], row["tokenizer"], row["world"], row["seed"]) for row in rows}

    def measure(
        told: dict[str, Any], settings: dict[str, Any], folder: Path, world_model: Path | None
    ) -> None:
        if tuple(told.values()) in done:
            return
        config = ForecastConfig(
            patches=str(patches),
            labels=str(world / "labels" / "val"),
            head=str(arguments.quickstart / "head"),
            tokenizer=str(folder),
            world=None if world_model is None else str(world_model),
            out=str(arguments.out),
            num_context=CONTEXT,
            mid_steps=STEPS,
            regressor_null=False,
            batch_windows=8,
            seed=told["seed"],
        )
        kept = ("validation_loss", "validation_z_swap_ratio", "validation_best_loss")
        logs = {name: logged(world_model or folder, name) for name in kept}
        last = {name: values[-1][1] for name, values in logs.items() if values}
        inputs = open_inputs(config, torch.device("cpu"))
        rows.append({**told, "settings": settings, **last, **measured(inputs)})
        save_rows(arguments.json, rows)

    for seed in arguments.seeds:
        for name in arguments.whole:
            told = {"stage": "whole", "tokenizer": name, "world": None, "seed": seed}
            tokenizer = arguments.quickstart / "tokenizer"
            if name != "as now" or seed:
                slug = f"whole-{name.replace(' ', '-')}-seed{seed}"
                changed = {**TOKENIZERS[name], "seed": seed, "deltas": None}
                tokenizer = stages.run("tokenizer", f"tokenizer-{slug}", changed)
            measure(told, TOKENIZERS[name], tokenizer, None)
        for name in arguments.tokenizers:
            slug = f"{name.replace(' ', '-')}-seed{seed}"
            deltas = arguments.out / f"deltas-{slug}"
            told = {"stage": "last", "tokenizer": name, "world": None, "seed": seed}
            settings = {
                **STAGE,
                **TOKENIZERS[name],
                "start_from": str(arguments.quickstart / "tokenizer"),
                "seed": seed + 100,  # other batches than there
                "deltas": str(deltas) if arguments.worlds else None,
            }
            tokenizer = stages.run("tokenizer", f"tokenizer-{slug}", settings)
            measure(told, TOKENIZERS[name], tokenizer, None)
            for arm in arguments.worlds:
                settings = {
                    **WORLD_STAGE,
                    **WORLDS[arm],
                    "start_from": str(arguments.quickstart / "world-model"),
                    "seed": seed + 100,
                    "deltas": str(deltas),
                }
                folder = f"world-{slug}-{arm.replace(' ', '-')}"
                world_model = stages.run("world-model", folder, settings)
                measure({**told, "world": arm}, WORLDS[arm], tokenizer, world_model)


def save_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """The result so far."""
    save(file, {"clips": WORLD["num_val_clips"], "steps": STEPS, "rows": rows})


@torch.no_grad()
def measured(inputs: ForecastInputs) -> dict[str, Any]:
    """Loss and mIoU by step of every row, over all windows."""
    config, cache, head = inputs.config, inputs.cache, inputs.models.head
    assert isinstance(head, SegmentationHead)
    frames = cache.frame_index(np.arange(len(cache)))
    labels = ClipLabels(
        str(config.labels),
        last_frames={key: int(frames.max()) for key in cache.keys},
        num_classes=head.config.num_classes,
    )
    losses: dict[str, list[list[float]]] = defaultdict(list)
    counts: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for indices in inputs.batches():
        x, times = inputs.windows(indices)
        names = inputs.arrangement.names(indices)
        batch = encode_windows(inputs.models, indices, x, times, names=names)
        forecast = forecast_horizon(config, inputs.models, batch, "mid")
        truth, found = forecast.truth, dict(forecast.rows)
        if forecast.samples is not None:
            found["best"] = best_by_step(forecast.samples, truth)
        for name, row in found.items():
            losses[name] += feature_loss(row, truth).tolist()
            for step in range(STEPS):
                true = torch.from_numpy(
                    np.stack(
                        [
                            labels.frame(
                                inputs.arrangement.sequence(index),
                                int(frames[index, CONTEXT + step]),
                            )
                            for index in indices
                        ]
                    )
                )
                size = (true.shape[1], true.shape[2])
                maps = class_maps(head, row[:, step], grid=cache.grid, size=size)
                counts[name, step].append(
                    class_counts(
                        confusion_matrix(
                            torch.from_numpy(maps), true, num_classes=head.config.num_classes
                        )
                    )
                )
    mious: dict[str, list[float]] = {}
    for name in losses:
        mious[name] = []
        for step in range(STEPS):
            both, either = (sum(part) for part in zip(*counts[name, step], strict=True))
            ious = [value for value in class_ious(both, either) if value is not None]
            mious[name].append(round(100 * float(np.mean(ious)), 2))
    return {
        "loss": {name: np.mean(found, axis=0).round(5).tolist() for name, found in losses.items()},
        "miou": mious,
    }


def best_by_step(samples: Tensor, truth: Tensor) -> Tensor:
    """Features (B, H, N, D): of samples (B, S, H, N, D) at each step the one nearest the truth."""
    best = feature_loss(samples, truth[:, None]).argmin(dim=1)  # (B, H)
    chosen = best[:, None, :, None, None].expand(-1, 1, -1, *samples.shape[3:])
    return samples.gather(1, chosen)[:, 0]


if __name__ == "__main__":
    main()
