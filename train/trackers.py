"""TensorBoard and W&B beside log.jsonl, if asked for, through accelerate's trackers. Used by
loop.py on the main process.

    tensorboard   OUT/tensorboard: `tensorboard --logdir runs`; pip install deltatok[tensorboard]
    wandb         OUT/wandb, offline unless WANDB_MODE says otherwise; pip install deltatok[wandb]

log.jsonl stays the record: it alone is cut back to the checkpoint that a run goes on from.
"""

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

# accelerate publishes no type information.
from accelerate.tracking import (  # type: ignore[import-untyped]
    LOGGER_TYPE_TO_CLASS,
    GeneralTracker,
)

from ..shards.errors import UsageError

PROJECT = "deltatok"


def check_trackers(names: Sequence[str]) -> None:
    """UsageError for a tracker whose package is not installed."""
    for name in names:
        try:
            distribution(name)  # a folder wandb/ here, left by a run, imports as well
        except PackageNotFoundError:
            raise UsageError(
                f"trackers: {name} is not installed: pip install 'deltatok[{name}]', or leave it "
                "out; log.jsonl is written always"
            ) from None


class Trackers:
    """The trackers of one run; none: does nothing."""

    def __init__(
        self, names: Sequence[str], *, folder: Path, config: Mapping[str, Any], start: int
    ) -> None:
        """folder: OUT. start: steps that are trained already."""
        self._trackers: list[GeneralTracker] = []
        for name in names:
            tracker = _make(name, folder, start=start)
            tracker.start()
            if start == 0:
                tracker.store_init_configuration(flat(config))
            self._trackers.append(tracker)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Values of one line of log.jsonl, as KIND/NAME; validation_NAME is validation/NAME."""
        named = {f"{kind}/{n.removeprefix(f'{kind}_')}": value for n, value in values.items()}
        for tracker in self._trackers:
            tracker.log(named, step=step)

    def close(self) -> None:
        """Flush and end all."""
        for tracker in self._trackers:
            tracker.finish()


def _make(name: str, folder: Path, *, start: int) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":  # points after the checkpoint, from before a kill, are hidden
        return kind("tensorboard", str(folder), purge_step=start + 1)
    mode = os.environ.get("WANDB_MODE", "offline")
    return kind(PROJECT, dir=str(folder), name=folder.name, mode=mode)


def flat(values: Mapping[str, Any], *, under: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as dotted names; what is no number, word or truth value, as its text."""
    found: dict[str, str | int | float | bool] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, under=f"{under}{name}.")
        else:
            plain = isinstance(value, str | int | float | bool)
            found[f"{under}{name}"] = value if plain else str(value)
    return found
