"""A choice at sampling time: draw M samples, keep the 20 that are far apart, or likely.

    python tests/experiments/choices.py --quickstart runs/quickstart --out DIR --json FILE

World models of winners.py (same DIR) and its clips. The M samples are rolled out as delta tokens,
which is cheap; the kept ones alone are decoded. Distances are between all delta tokens of two
rollouts. Rules:

    first     the first 20: no choice
    far       from the medoid on, always the one that is farthest from those already kept
    medoids   20 medoids, each the nearest to its cluster's others (alternating, from `far` on)
    likely    the first 20 of the half with the most near neighbours
    both      `far` within that half

JSON: clips, rows: [{arm, rule, drawn: M, seeds, values, differences: to `first` of the same arm}],
values as winners.json.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quickstart_runs import QuickstartRuns, save
from torch import Tensor
from winners import FRESH_CLIPS, estimates, folder_name, fresh_clips, merged, report, train

from deltatok.evaluate.forecast import rollout
from deltatok.evaluate.forecast.config import ForecastConfig
from deltatok.evaluate.forecast.rollout import RolloutContext
from deltatok.train.models.deltaworld import DeltaWorldNetwork

Rule = Callable[[Tensor, int], Tensor]
"""rule(distances (M, M), count): int64 (count,), which are kept."""
NEIGHBOURS = 3
"""A sample is as likely as this many-th nearest one is near."""
ALTERNATIONS = 10
DRAW = rollout.window_noise


def first(distances: Tensor, count: int) -> Tensor:
    """No choice."""
    return torch.arange(count)


def far(distances: Tensor, count: int) -> Tensor:
    """Farthest-point sampling."""
    kept = [int(distances.sum(1).argmin())]
    nearest = distances[kept[0]]
    for _ in range(count - 1):
        kept.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distances[kept[-1]])
    return torch.tensor(kept)


def medoids(distances: Tensor, count: int) -> Tensor:
    """k-medoids."""
    kept = far(distances, count)
    for _ in range(ALTERNATIONS):
        cluster = distances[:, kept].argmin(1)
        together = cluster[:, None] == cluster
        within = (distances * together).sum(1)
        elsewhere = cluster != torch.arange(count)[:, None]
        kept = within.expand(count, -1).masked_fill(elsewhere, torch.inf).argmin(1)
    return kept


def likely(distances: Tensor, count: int) -> Tensor:
    """Of the likely half, the first."""
    return likely_half(distances)[:count]


def both(distances: Tensor, count: int) -> Tensor:
    """Of the likely half, those far apart."""
    half = likely_half(distances)
    return half[far(distances[half][:, half], count)]


def likely_half(distances: Tensor) -> Tensor:
    """In the order they were drawn."""
    radius = distances.sort(1).values[:, NEIGHBOURS]  # the nearest is the sample itself
    return radius.argsort()[: len(radius) // 2].sort().values


RULES: dict[str, Rule] = {rule.__name__: rule for rule in (first, far, medoids, likely, both)}


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True, help="a finished quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder of winners.py's runs")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument(
        "--arms", nargs="+", default=["16-1", "64-1", "16-4", "64-4"], help="names in winners.ARMS"
    )
    parser.add_argument("--drawn", type=int, nargs="+", default=[100], help="values of M [100]")
    parser.add_argument("--rules", nargs="+", default=list(RULES), help="names in RULES [all]")
    arguments = parser.parse_args()
    stages = QuickstartRuns(arguments.quickstart, arguments.out)
    fresh = fresh_clips(stages)
    asked = list(itertools.product(arguments.arms, arguments.drawn, arguments.rules))
    for seed, (arm, drawn, rule) in itertools.product(arguments.seeds, asked):
        world = train(stages, arm, seed)
        rollout.window_noise = choosing(RULES[rule], drawn)
        name = f"report-{choice_name(arm, drawn, rule)}-{seed}"
        report(stages, name, fresh, {"world": str(world)}, seed=seed)
        rows = [row for each in asked if (row := row_of(arguments.out, *each)) is not None]
        save(arguments.json, {"clips": FRESH_CLIPS, "rows": rows})


def choosing(rule: Rule, drawn: int) -> Callable[..., Tensor]:
    """What takes the place of window_noise: the noise of the samples that `rule` keeps."""

    def window_noise(
        world: DeltaWorldNetwork, config: ForecastConfig, clip: RolloutContext
    ) -> Tensor:
        noise = DRAW(world, replace(config, num_samples=drawn), clip)
        z = world.rollout(
            clip.z_context, clip.times, horizon=clip.steps, num_samples=drawn, noise=noise
        )
        tokens = z.float().flatten(2)
        kept = [rule(distances, config.num_samples) for distances in torch.cdist(tokens, tokens)]
        return torch.stack([noise[:, at, index] for at, index in enumerate(kept)], dim=1)

    return window_noise


def choice_name(arm: str, drawn: int, rule: str) -> str:
    """Of an arm's reports with a choice."""
    return f"{folder_name(arm)}-{drawn}-{rule}"


def row_of(out: Path, arm: str, drawn: int, rule: str) -> dict[str, Any] | None:
    """What is kept of a choice; None if there is none yet."""
    ours = merged(out, choice_name(arm, drawn, rule))
    if not ours:
        return None
    base = merged(out, choice_name(arm, drawn, "first"))
    return {
        "arm": arm,
        "rule": rule,
        "drawn": drawn,
        "seeds": sorted(ours),
        "values": estimates(ours, None),
        "differences": estimates(ours, base),
    }


if __name__ == "__main__":
    main()
