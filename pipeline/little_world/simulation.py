"""The little world: a shape walks over a textured ground and, now and then, turns left or right.

Its clock ticks every `tick_s`. At a tick the shape turns left or right, each with half of
`turn_probability`, unless it turned less than `rest_s` ago; walls are mirrors. Nothing in the
picture tells a turn beforehand, and since turns happen at ticks only, every possible future of a
clip is known, with its probability.

Whether a shape may turn at the next tick depends on when it turned last, and a turn at the first
frame that is seen, or before it, cannot be seen: the walk before it is not in the picture. So the
futures are those of every state that fits the frames seen, each with its probability.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...evaluate.forecast.modes import KnownFutures
from ...shards.errors import UsageError

CLASS_NAMES = ("ground", "disc", "square", "triangle")
SHAPE_COLOURS = ((214, 62, 48), (54, 96, 214), (236, 186, 36))  # RGB of disc, square, triangle


@dataclass(frozen=True, kw_only=True)
class LittleWorldConfig:
    """How the little world looks and moves; lengths are shares of the frame's side."""

    out: str
    """Folder for the clips, labels and world.json."""
    num_train_clips: int = 320
    """Clips to train tokenizer and world model on; they have no labels."""
    num_head_clips: int = 48
    """Labelled clips to train the segmentation head on."""
    num_val_clips: int = 60
    """Labelled clips to evaluate on."""
    frame_size: int = 96
    """Side of the square frames, pixels."""
    fps: int = 25
    """Frames a second."""
    train_duration_s: float = 3.0
    """Length of a training clip, seconds."""
    labelled_duration_s: float = 1.4
    """Length of a clip to fit the head or to evaluate on, seconds."""
    speed: float = 0.5
    """Distance walked in one second, share of the side."""
    radius: float = 0.16
    """Size of the shape, share of the side."""
    tick_s: float = 0.2
    """Turns happen at multiples of this time, seconds."""
    rest_s: float = 0.8
    """A shape that turned does not turn again for this long, seconds."""
    turn_probability: float = 0.14
    """Chance of a turn at a tick, left and right together, 0 to 1."""
    seed: int = 0
    """Seed of everything drawn."""

    def __post_init__(self) -> None:
        if self.frame_size % 2 or self.frame_size < 16:
            raise UsageError(f"frame_size: got {self.frame_size}, wanted an even number >= 16")
        if not 0 < self.turn_probability < 1:
            raise UsageError(f"turn_probability: got {self.turn_probability}, wanted 0 to 1")
        if not 0 < self.radius < 0.4:
            raise UsageError(f"radius: got {self.radius}, wanted more than 0 and under 0.4")


@dataclass(frozen=True)
class Walker:
    """Where a shape is between two ticks. Positions are shares of the side, y down."""

    kind: int  # 1..3: index into CLASS_NAMES
    position: tuple[float, float]  # x, y
    heading: tuple[int, int]  # unit step along x or y
    ticks_since_turn: int


def first_walker(config: LittleWorldConfig, rng: np.random.Generator) -> Walker:
    """A walker anywhere, heading anywhere, its last turn long ago."""
    low, high = config.radius, 1 - config.radius
    x, y = (float(value) for value in rng.uniform(low, high, size=2))
    heading = ((1, 0), (0, 1), (-1, 0), (0, -1))[int(rng.integers(4))]
    return Walker(int(rng.integers(1, len(CLASS_NAMES))), (x, y), heading, 10**6)


def choices(config: LittleWorldConfig, walker: Walker) -> list[tuple[float, Walker]]:
    """What can happen at a tick: (probability, walker) for straight on, left, right."""
    if walker.ticks_since_turn * config.tick_s < config.rest_s - 1e-9:
        return [(1.0, walker)]
    dx, dy = walker.heading
    side = config.turn_probability / 2
    left = Walker(walker.kind, walker.position, (dy, -dx), 0)
    right = Walker(walker.kind, walker.position, (-dy, dx), 0)
    return [(1 - 2 * side, walker), (side, left), (side, right)]


def walk(config: LittleWorldConfig, walker: Walker, seconds: float) -> Walker:
    """The walker after `seconds` of straight walking, mirrored at the walls."""
    x, dx = _reflect(walker.position[0], walker.heading[0], config, seconds)
    y, dy = _reflect(walker.position[1], walker.heading[1], config, seconds)
    return Walker(walker.kind, (x, y), (dx, dy), walker.ticks_since_turn)


def next_tick(config: LittleWorldConfig, walker: Walker) -> Walker:
    """The walker one tick later, its rest counted."""
    there = walk(config, walker, config.tick_s)
    return Walker(there.kind, there.position, there.heading, there.ticks_since_turn + 1)


def simulate(
    config: LittleWorldConfig, rng: np.random.Generator, duration_s: float
) -> list[Walker]:
    """The walker just after the decision of every tick from 0 on, for `duration_s` seconds."""
    walker, path = first_walker(config, rng), []
    for _ in range(int(np.ceil(duration_s / config.tick_s)) + 1):
        options = choices(config, walker)
        picked = rng.choice(len(options), p=[probability for probability, _ in options])
        walker = options[int(picked)][1]
        path.append(walker)
        walker = next_tick(config, walker)
    return path


def position_at(
    config: LittleWorldConfig, path: list[Walker], time_s: float
) -> tuple[float, float]:
    """Position (x, y) at `time_s` along a simulated path."""
    tick = min(int(time_s / config.tick_s + 1e-6), len(path) - 1)
    return walk(config, path[tick], time_s - tick * config.tick_s).position


def futures(
    config: LittleWorldConfig, walker: Walker, num_ticks: int
) -> Iterator[tuple[float, list[tuple[float, float]]]]:
    """Every possible future of a walker that stands before the decision of a tick.

    Yields (probability, positions): the (x, y) after 1, 2, ... `num_ticks` ticks. The
    probabilities add up to 1.
    """
    if num_ticks == 0:
        yield 1.0, []
        return
    for probability, chosen in choices(config, walker):
        after = next_tick(config, chosen)
        for rest, positions in futures(config, after, num_ticks - 1):
            yield probability * rest, [after.position, *positions]


def draw_ground(config: LittleWorldConfig, rng: np.random.Generator) -> NDArray[np.float32]:
    """A textured ground, float32 (H, W, 3), values 0 to 255: smooth noise at three scales."""
    size = config.frame_size
    level = np.zeros((size, size), np.float32)
    for cells, weight in ((3, 18.0), (8, 12.0), (20, 8.0)):
        grid = rng.uniform(-1, 1, size=(cells + 1, cells + 1))
        level += np.float32(weight) * _stretch(grid, size)
    base = np.array([104, 124, 96], np.float32) + rng.uniform(-12, 12, size=3).astype(np.float32)
    picture: NDArray[np.float32] = np.clip(base + level[:, :, None], 0, 255)
    return picture


def draw_mask(
    config: LittleWorldConfig, kind: int, position: tuple[float, float]
) -> NDArray[np.float32]:
    """How much of each pixel the shape covers: float32 (H, W), 0 to 1, edges one pixel soft."""
    size = config.frame_size
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = centres[None, :] - position[0], centres[:, None] - position[1]
    if kind == 1:
        distance = np.hypot(x, y) - config.radius
    elif kind == 2:
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.85 * config.radius
    else:  # an equilateral triangle, point up
        edge = 0.55 * config.radius
        slope = np.abs(x) * np.float32(3**0.5 / 2) - y / 2
        distance = np.maximum(slope, y) - edge
    return np.clip(0.5 - distance * size, 0, 1).astype(np.float32)


def _reflect(
    start: float, step: int, config: LittleWorldConfig, seconds: float
) -> tuple[float, int]:
    low, high = config.radius, 1 - config.radius
    place = start + step * config.speed * seconds
    if place < low:
        return 2 * low - place, -step
    if place > high:
        return 2 * high - place, -step
    return place, step


def _stretch(grid: NDArray[np.float64], size: int) -> NDArray[np.float32]:
    """A (cells + 1)^2 grid stretched to (size, size), bilinear."""
    cells = grid.shape[0] - 1
    at = np.linspace(0, cells, size, endpoint=False)
    low = at.astype(int)
    part = at - low
    rows = grid[low] * (1 - part)[:, None] + grid[low + 1] * part[:, None]
    stretched = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return np.asarray(stretched, np.float32)


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
