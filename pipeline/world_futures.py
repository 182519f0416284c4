"""The possible futures of a little world's clip, given what its context frames show.

Whether a shape may turn at the next tick depends on when it turned last, and a turn at the first
frame that is seen, or before it, cannot be seen: the walk before it is not in the picture. So the
futures are those of every state that fits the frames seen, each with its probability.
"""

import math
from collections import defaultdict

import numpy as np

from ..evaluate.known_futures import KnownFutures
from .little_world import LittleWorldConfig, Walker, choices, draw_mask, futures, next_tick

BACKGROUND = 0


def seen_futures(
    config: LittleWorldConfig, path: list[Walker], *, first_tick: int, last_tick: int, ticks: int
) -> KnownFutures:
    """What can be seen `ticks` after `last_tick`, given the frames at the ticks first..last.

    `path`: the walker just after the decision of every tick, from 0 on. Futures that end at one
    place are one, most probable first.
    """
    now = next_tick(config, path[last_tick - 1])  # before the decision of last_tick
    ends: dict[tuple[float, float], float] = defaultdict(float)
    for since_turn, weight in possible_rests(config, path, first_tick, last_tick).items():
        walker = Walker(now.kind, now.position, now.heading, since_turn)
        for probability, positions in futures(config, walker, ticks):
            x, y = positions[-1]
            ends[round(x, 6), round(y, 6)] += weight * probability
    ordered = sorted(ends.items(), key=lambda end: (-end[1], end[0]))
    maps = [
        np.where(draw_mask(config, now.kind, end) >= 0.5, now.kind, BACKGROUND)
        for end, _ in ordered
    ]
    return KnownFutures(
        probability=np.array([probability for _, probability in ordered]),
        classes=np.stack(maps).astype(np.uint8),
        background=BACKGROUND,
    )


def possible_rests(
    config: LittleWorldConfig, path: list[Walker], first_tick: int, last_tick: int
) -> dict[int, float]:
    """Ticks since the last turn, before the decision of `last_tick` -> probability, given which
    of the ticks between the first and the last one seen had a turn. All times after which the
    shape may turn again are one.

    Where a shape is and where it heads tell nothing of its last turn: every place and heading is
    as likely at all times, walls being mirrors.
    """
    rested = math.ceil(config.rest_s / config.tick_s - 1e-9)
    weights = {rested: 1.0}  # a clip begins long after the last turn
    for tick in range(last_tick):
        was_turn = path[tick].ticks_since_turn == 0
        after: dict[int, float] = defaultdict(float)
        for since_turn, weight in weights.items():
            walker = Walker(path[tick].kind, (0.5, 0.5), (1, 0), since_turn)
            for probability, chosen in choices(config, walker):
                is_turn = chosen.ticks_since_turn == 0
                if tick <= first_tick or is_turn == was_turn:
                    since = min(chosen.ticks_since_turn + 1, rested)
                    after[since] += weight * probability
        total = sum(after.values())
        weights = {since: weight / total for since, weight in after.items()}
    return weights
