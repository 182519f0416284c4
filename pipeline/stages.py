"""Run the stages of a pipeline file, each through its ordinary command, each at most once.

A pipeline file:

    out: runs/mine                 ${out} stands for it below
    stages:
      - name: patches              once per file; `--set patches.dtype=bfloat16` reaches it
        command: deltatok-extract  a key of COMMANDS
        seconds: 40                how long it took its author; only the ETA uses it
        settings: {videos: [clips/], out: "${out}/patches"}    the command's own config

Each stage's settings are written to OUT/stages/NAME.yaml and handed to the command as --config, so
that any stage can be repeated by hand. OUT/stages.json remembers what is done: a stage is skipped
when its settings are unchanged and no earlier stage had to run.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..shards.errors import DeltatokError, UsageError
from ..shards.files import local_path, read_text, write_bytes, write_json
from ..shards.schema import load
from .cli import Command, apply_settings, read_yaml, run_table
from .commands import evaluate, extract, train

LITTLE_WORLD = {
    "little-world": Command(
        help="the world of the quickstart",
        summary="Write clips of a shape that turns unforeseeably, with labels and futures.",
        examples=("a stage of configs/quickstart.yaml",),
        config="pipeline.little_world.simulation:LittleWorldConfig",
        run="pipeline.little_world.files:make_little_world",
    ),
    "tiny-backbone": Command(
        help="the backbone of the quickstart",
        summary="Write a small DINOv3 with fixed random weights as a model folder.",
        examples=("a stage of configs/quickstart.yaml",),
        config="pipeline.little_world.backbone:TinyBackboneConfig",
        run="pipeline.little_world.backbone:make_tiny_backbone",
    ),
}
"""The stages that only the quickstart has."""


def _begin(main: Callable[[list[str]], int], kind: str) -> Callable[[list[str]], int]:
    """`main` with a first word."""
    return lambda words: main([kind, *words])


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "deltatok-extract": extract.main,
    "deltatok-evaluate forecast": _begin(evaluate.main, "forecast"),
    **{f"deltatok-train {kind}": _begin(train.main, kind) for kind in train.COMMANDS},
    **{kind: _begin(partial(run_table, "stage", LITTLE_WORLD), kind) for kind in LITTLE_WORLD},
}
log = logging.getLogger(__name__)


class StageFailed(DeltatokError):
    """A stage ended with an exit code other than 0; the pipeline ends with the same one."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a pipeline file."""

    name: str
    """Name, unique in the file."""
    command: str
    """A key of COMMANDS."""
    settings: Any
    """The command's config, as nested plain values."""
    seconds: float = 60.0
    """About how long it takes; for the ETA only."""

    def __post_init__(self) -> None:
        if self.command not in COMMANDS:
            allowed = ", ".join(COMMANDS)
            raise UsageError(
                f"stage {self.name}: command {self.command!r}, wanted one of {allowed}"
            )
        if not isinstance(self.settings, dict):
            raise UsageError(f"stage {self.name}: settings must be `key: value` pairs")

    @property
    def digest(self) -> str:
        """sha256 of what the stage does: equal settings, equal digest."""
        text = json.dumps([self.command, self.settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A pipeline file."""

    out: str
    """Folder of all results."""
    stages: tuple[Stage, ...]
    """In the order they run."""

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(f"stage names must differ; twice: {', '.join(twice)}")


def read_pipeline(file: Path, *, out: str | None, settings: Sequence[str]) -> Pipeline:
    """A pipeline from its file; `settings` are STAGE.KEY=VALUE words that override it.

    Raises:
        UsageError: unreadable file, unknown stage, unknown command, or misshapen settings.
    """
    values = read_yaml(file)
    values["out"] = out or values.get("out", "runs/" + file.stem)
    stages = values.get("stages")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise UsageError(f"{file}: wanted `stages:`, a list of name, command, settings")
    by_name = {stage.get("name"): stage.setdefault("settings", {}) for stage in stages}
    for setting in settings:
        name, dot, rest = setting.partition(".")
        if not dot or name not in by_name:
            raise UsageError(f"--set {setting}: wanted STAGE.KEY=VALUE, stages: {sorted(by_name)}")
        apply_settings(by_name[name], [rest])
    values["stages"] = [_fill(stage, str(values["out"])) for stage in stages]
    return load(Pipeline, values, where=str(file))


def stages_to_run(pipeline: Pipeline) -> list[Stage]:
    """The stages that are not done: from the first one whose settings changed or never ran."""
    done = read_state(pipeline)
    for i, stage in enumerate(pipeline.stages):
        if done.get(stage.name, {}).get("digest") != stage.digest:
            return list(pipeline.stages[i:])
    return []


def run_pipeline(pipeline: Pipeline) -> dict[str, float]:
    """Run what is not done; give seconds per stage (from the run that did it).

    Raises:
        StageFailed: a command ended with another exit code than 0; run again to go on.
    """
    out, state = Path(pipeline.out), read_state(pipeline)
    todo = stages_to_run(pipeline)
    for stage in pipeline.stages:
        if stage not in todo:
            log.info("[done] %s", stage.name)
    began, expected = time.monotonic(), sum(stage.seconds for stage in todo)
    for i, stage in enumerate(todo):
        number = len(pipeline.stages) - len(todo) + i + 1
        log.info("[%d/%d] %s: %s", number, len(pipeline.stages), stage.name, stage.command)
        file = out / "stages" / f"{stage.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, yaml.safe_dump(stage.settings, sort_keys=False).encode())
        start = time.monotonic()
        code = COMMANDS[stage.command](["--config", str(file)])
        if code:
            raise StageFailed(f"stage {stage.name} ended with exit code {code}", code)
        seconds = time.monotonic() - start
        state[stage.name] = {"digest": stage.digest, "seconds": round(seconds, 2)}
        write_json(out / "stages.json", state)
        behind = sum(s.seconds for s in todo[: i + 1])
        pace = (time.monotonic() - began) / max(behind, 1e-9)
        left = pace * (expected - behind)
        if to_come := len(todo) - i - 1:
            log.info("  %.0f s; about %.0f s left, stages to come: %d", seconds, left, to_come)
    return {stage.name: float(state[stage.name]["seconds"]) for stage in pipeline.stages}


def read_state(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """Stage name -> {digest, seconds} of the finished stages ({} where nothing ran)."""
    try:
        loaded = json.loads(read_text(Path(pipeline.out) / "stages.json"))
    except (OSError, json.JSONDecodeError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _fill(value: Any, out: str) -> Any:
    """`value` with ${out} replaced in every string."""
    if isinstance(value, str):
        local_path(value)  # before any stage runs
        return value.replace("${out}", out)
    if isinstance(value, Mapping):
        return {key: _fill(item, out) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, out) for item in value]
    return value
