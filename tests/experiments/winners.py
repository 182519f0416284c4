"""How many candidates, and how many of them win: recall against precision of the samples.

    python tests/experiments/winners.py --quickstart runs/quickstart --out DIR --json FILE

World models of the quickstart's size, 1,500 steps of 32 windows: K candidates a position, of which
the N with the lowest losses are trained; schedules of both; some arms for longer; and the
discriminative model. Every arm is trained anew for every seed, and reported (20 samples) on clips
of a little world of another seed, on which nothing was chosen. Arms in the order of ARMS, all of
the first seed before the second; the JSON is written after each.

JSON: steps, batch_size, clips, rows: [{arm, settings: what of a world model's differs from the
quickstart's, seeds, cpu_ms_per_step: of the training process, by seed, values: "mid samples
mode_recall" -> [value, low, high], over clips and trainings, differences: the same minus the arm
16-1, paired by clip, of the seeds that both have}].
"""

import argparse
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quickstart_runs import QuickstartRuns, merge, save

from deltatok.evaluate.forecast.intervals import Resamples
from deltatok.evaluate.forecast.sequences import Score, SequenceScores, read_sequences

STEPS, BATCH_SIZE = 1500, 32
FRESH_SEED, FRESH_CLIPS = 1, 200
"""The little world that is reported on; the quickstart's own has seed 0."""


def arm(num_samples: int, num_winners: int, **changed: Any) -> dict[str, Any]:
    """A world model's settings."""
    model = {"num_samples_train": num_samples}
    return {"model": model, "num_winners": num_winners, **changed}


ARMS: dict[str, dict[str, Any]] = {
    "discriminative": {},
    "16-1": arm(16, 1),
    "16-2": arm(16, 2),
    "16-4": arm(16, 4),
    "16-8": arm(16, 8),
    "64-1": arm(64, 1),
    "64-4": arm(64, 4),
    "64-8": arm(64, 8),
    "4-1": arm(4, 1),
    "4-2": arm(4, 2),
    "16-1 then 4": arm(16, 1, num_winners_schedule=[[0, 1], [750, 4]]),
    "16-8 then 1": arm(16, 8, num_winners_schedule=[[0, 8], [750, 1]]),
    "64-2": arm(64, 2),
    "64 then 4-1": arm(64, 1, num_samples_schedule=[[0, 64], [750, 4]]),
    "4 then 64-1": arm(64, 1, num_samples_schedule=[[0, 4], [750, 64]]),
    "4-4": arm(4, 4),
}
"""Name -> settings. "16-4": 4 winners of 16."""
BASELINE = "16-1"
METRICS = {
    "samples": ("mode_recall", "mode_precision"),
    "discriminative": ("mode_recall", "mode_precision", "miou"),
    "best": ("miou",),
    "mean": ("miou",),
    "present": ("miou",),
}
PLAIN = {"curves": None, "videos": None, "num_seeds": 1, "num_pictures": 0, "regressor_null": False}
"""Settings of all reports; None takes one of the quickstart's away."""


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True, help="a finished quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="names in ARMS [all]")
    arguments = parser.parse_args()
    stages = QuickstartRuns(arguments.quickstart, arguments.out)
    fresh = fresh_clips(stages)
    for seed, name in itertools.product(arguments.seeds, arguments.arms):
        world = train(stages, name, seed)
        role = "discriminative" if name == "discriminative" else "world"
        report(stages, f"report-{folder_name(name)}-{seed}", fresh, {role: str(world)}, seed=seed)
        rows = [row for name in ARMS if (row := row_of(arguments.out, name)) is not None]
        settings = {"steps": STEPS, "batch_size": BATCH_SIZE, "clips": FRESH_CLIPS}
        save(arguments.json, {**settings, "rows": rows})


def fresh_clips(stages: QuickstartRuns) -> dict[str, Any]:
    """What a report reads of a little world that nothing was chosen on."""
    counts = {"num_train_clips": 0, "num_head_clips": 0, "num_val_clips": FRESH_CLIPS}
    world = stages.run("world", "fresh-world", {"seed": FRESH_SEED, **counts})
    patches = stages.run("val-patches", "fresh-patches", {"videos": [str(world / "val")]})
    labels, futures = world / "labels/val", world / "futures"
    return {"patches": str(patches), "labels": str(labels), "futures": str(futures)}


def folder_name(name: str) -> str:
    """An arm's name without spaces."""
    return name.replace(" ", "-")


def train(stages: QuickstartRuns, name: str, seed: int) -> Path:
    """Train an arm, unless that was done; gives its folder. Its CPU time is noted beside that."""
    folder = f"world-{folder_name(name)}-{seed}"
    settings = {"steps": STEPS, "batch_size": BATCH_SIZE, "seed": seed, **ARMS[name]}
    never = {"eval_every": settings["steps"], "save_every": settings["steps"]}
    timed = stages.out / f"{folder}.seconds.json"
    started_s = time.process_time()
    stage = "discriminative" if name == "discriminative" else "world-model"
    world = stages.run(stage, folder, {**settings, **never})
    if not timed.exists():
        cpu_s = time.process_time() - started_s
        timed.write_text(json.dumps(1000 * cpu_s / settings["steps"]))
    return world


def report(
    stages: QuickstartRuns,
    name: str,
    fresh: Mapping[str, Any],
    models: Mapping[str, str],
    *,
    seed: int,
) -> Path:
    """The report of models, unless it is there; gives its folder."""
    folder = stages.out / name
    if not (folder / "report.json").exists():
        none = {"world": None, "discriminative": None}
        stages.run("report", name, merge({**none, **PLAIN, **fresh, "seed": seed}, models))
    return folder


def row_of(out: Path, name: str) -> dict[str, Any] | None:
    """What is kept of an arm's trainings; None if there is none yet."""
    ours = merged(out, name)
    if not ours:
        return None
    seconds = (out / f"world-{folder_name(name)}-{seed}.seconds.json" for seed in ours)
    return {
        "arm": name,
        "settings": ARMS[name],
        "seeds": sorted(ours),
        "cpu_ms_per_step": [round(json.loads(path.read_text()), 1) for path in seconds],
        "values": estimates(ours, None),
        "differences": estimates(ours, merged(out, BASELINE)),
    }


def merged(out: Path, name: str) -> dict[int, SequenceScores]:
    """Seed -> scores of an arm's reports, by clip."""
    prefix = f"report-{folder_name(name)}-"
    found = {}
    for path in sorted(out.glob(f"{prefix}*/report.json")):
        if (seed := path.parent.name.removeprefix(prefix)).isdigit():
            found[int(seed)] = read_sequences(path.parent)
    return found


def estimates(
    ours: Mapping[int, SequenceScores], base: Mapping[int, SequenceScores] | None
) -> dict[str, list[float | None]]:
    """Values with their intervals, over clips and trainings; or, with a base, the differences to
    it, where clips and trainings are drawn alike for both. Fractions, not per cent."""
    seeds = sorted(ours if base is None else ours.keys() & base.keys())
    if not seeds:
        return {}
    clips = sorted(ours[seeds[0]].windows)
    resamples = Resamples(len(clips))
    found = {}
    for horizon, row in itertools.product(("short", "mid"), METRICS):
        for metric in METRICS[row]:
            score = Score(horizon, row, metric)
            mine = {seed: sums_of(ours[seed], score, clips) for seed in seeds}
            theirs = {} if base is None else {s: sums_of(base[s], score, clips) for s in seeds}
            if None in (*mine.values(), *theirs.values()):
                continue
            value = resamples.estimate(metric, mine)
            if theirs:
                value = resamples.interval(
                    value.value - resamples.estimate(metric, theirs).value,
                    resamples.resampled(metric, mine) - resamples.resampled(metric, theirs),
                )
            numbers = (value.value, value.low, value.high)
            found[f"{horizon} {row} {metric}"] = [
                None if number is None else round(number, 4) for number in numbers
            ]
    return found


def sums_of(scores: SequenceScores, score: Score, clips: Sequence[str]) -> Any:
    """A report's sums of a score by clip, of its first seed; None if it has no such row."""
    return next(iter(scores.by_seed(score, clips).values()), None)


if __name__ == "__main__":
    main()
