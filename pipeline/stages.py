"""Run the stages of a pipeline file, each through its ordinary command, each at most once.

A pipeline file:

    out: runs/mine                 ${out} stands for it below
    stages:
      - name: patches              once per file; `--set patches.dtype=bfloat16` reaches it
        command: deltatok-extract  a key of COMMANDS
        seconds: 40                how long it took its author; only the ETA uses it
        settings: {videos: [clips/], out: "${out}/patches"}    the command's own config

Each stage's settings are written to OUT/stages/NAME.yaml and handed to the command as --config, so
that any stage can be repeated by hand. OUT/stages.json remembers which are done. A stage is skipped
where it is done, its folders are there and nothing that it reads was made anew. One that was run
with other settings, or whose files an earlier version wrote, is refused before anything runs: its
folders would be mixed or refused in the middle.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..shards.cache import differences
from ..shards.errors import CacheMismatch, DeltatokError, UsageError
from ..shards.files import local_path, read_text, write_bytes, write_json
from ..shards.schema import load
from .alive import SignOfLife
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


REPORT = "deltatok-evaluate forecast"
"""The command whose report is what a pipeline was run for."""
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "deltatok-extract": extract.main,
    REPORT: _begin(evaluate.main, "forecast"),
    **{f"deltatok-train {kind}": _begin(train.main, kind) for kind in train.COMMANDS},
    **{kind: _begin(partial(run_table, "stage", LITTLE_WORLD), kind) for kind in LITTLE_WORLD},
}
VERSION = 1
"""Of what the stages write; to be raised when a folder of the version before cannot be gone on
with."""
REPLACES = "deltatok-evaluate"
"""Commands that write their results anew each time."""
MAY_CHANGE = frozenset(
    {
        *("device", "workers", "residency", "micro_batch_size", "compile", "compile_mode"),
        *("log_every", "eval_every", "save_every", "keep_checkpoints", "trackers"),
        *("decode_timeout_s", "max_quarantined", "min_free", "retry_quarantined", "time_limit"),
    }
)
"""Settings of which no result depends."""
SETTLED_S = 60.0
"""Of work, after which what it took counts as much as what was expected."""
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
    seconds: float = 0.0
    """About how long it takes, for the time left; 0: nobody knows."""

    def __post_init__(self) -> None:
        if self.command not in COMMANDS:
            allowed = ", ".join(COMMANDS)
            raise UsageError(
                f"stage {self.name}: command {self.command!r}, wanted one of {allowed}"
            )
        if not isinstance(self.settings, dict):
            raise UsageError(f"stage {self.name}: settings must be `key: value` pairs")

    @property
    def outputs(self) -> list[Path]:
        """The folders that it writes."""
        keys = ("out", "deltas") if self.command == "deltatok-train tokenizer" else ("out",)
        return [Path(self.settings[key]) for key in keys if key in self.settings]

    def reads_any(self, folders: Sequence[Path]) -> bool:
        """Whether one of its settings names one of these folders, or something in it."""
        named = [Path(text) for text in _texts(self.settings)]
        return any(path.is_relative_to(folder) for path in named for folder in folders)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A pipeline file."""

    out: str
    """Folder of all results."""
    stages: tuple[Stage, ...]
    """In the order they run."""
    gigabytes: float = 0.0
    """Of disk that all of it takes, about."""

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
    values["stages"] = [_replaced(stage, "${out}", str(values["out"])) for stage in stages]
    for text in _texts(values):
        local_path(text)  # before any stage runs
    return load(Pipeline, values, where=str(file))


def stages_to_run(pipeline: Pipeline) -> list[Stage]:
    """Those that are not done, and those that read what one of them makes."""
    state, todo = read_state(pipeline), []
    made: list[Path] = []
    for stage in pipeline.stages:
        is_done = "seconds" in state.get(stage.name, {}) and all(map(Path.exists, stage.outputs))
        if not is_done or stage.reads_any(made) or differences_of(pipeline, stage):
            todo.append(stage)
            made += stage.outputs
    return todo


def differences_of(pipeline: Pipeline, stage: Stage) -> list[str]:
    """What is not as it was when the folders of the stage were begun, like "steps: 100, was 50";
    settings that change no result do not count."""
    entry = read_state(pipeline).get(stage.name)
    if entry is None or not any(map(Path.exists, stage.outputs)):
        return []
    if (version := entry.get("version", 0)) != VERSION:
        return [f"its files are of version {version} of the stages, this is {VERSION}"]
    return [
        f"{name}: {now}, was {then}"
        for name, now, then in differences(_recorded(pipeline, stage), entry["settings"])
        if name.partition(".")[0] not in MAY_CHANGE
    ]


def _recorded(pipeline: Pipeline, stage: Stage) -> dict[str, Any]:
    """The settings as stages.json has them: the same wherever the pipeline's folder lies."""
    settings: dict[str, Any] = _replaced(stage.settings, pipeline.out, "${out}")
    return settings


def check_folders(pipeline: Pipeline, command: str) -> None:
    """Raises CacheMismatch, naming the stages and what differs, where stages were run with other
    settings or by another version; command: the one that runs the pipeline."""
    otherwise: dict[str, str] = {}
    made: list[Path] = []
    for stage in pipeline.stages:
        follows = stage.reads_any(made)
        found = differences_of(pipeline, stage)
        if found and not follows and not stage.command.startswith(REPLACES):
            otherwise[stage.name] = f"stage {stage.name} was run otherwise ({'; '.join(found[:5])})"
        if follows or stage.name in otherwise:
            made += stage.outputs
    if otherwise:
        again = " ".join(f"--again {name}" for name in otherwise)
        raise CacheMismatch(
            f"{pipeline.out}: {', '.join(otherwise.values())}: give another --out, the settings it "
            f"was run with, or make it and all that is made of it again: {command} {again}"
        )


def forget(pipeline: Pipeline, names: Sequence[str]) -> list[Path]:
    """Removes the folders of these stages, and of all that read them; gives the folders.

    Raises UsageError for an unknown stage and for a folder that does not lie in the pipeline's.
    """
    known, out = [stage.name for stage in pipeline.stages], Path(pipeline.out).resolve()
    for name in names:
        if name not in known:
            raise UsageError(f"--again {name}: wanted one of {', '.join(known)}")
    state, gone = read_state(pipeline), list[Path]()
    for stage in pipeline.stages:
        if stage.name in names or stage.reads_any(gone):
            gone += stage.outputs
            state.pop(stage.name, None)
    for folder in gone:
        if out not in folder.resolve().parents:
            raise UsageError(f"--again: {folder} is not in {out}: remove it yourself")
    if gone and out.is_dir():
        write_json(out / "stages.json", state)
    there = [folder for folder in gone if folder.exists()]
    for folder in there:
        shutil.rmtree(folder)
    return there


def run_pipeline(pipeline: Pipeline, *, life: SignOfLife | None = None) -> dict[str, float]:
    """Run what is not done; give seconds per stage (from the run that did it).

    Raises:
        StageFailed: a command ended with another exit code than 0; run again to go on.
    """
    out, state, todo = Path(pipeline.out), read_state(pipeline), stages_to_run(pipeline)
    began, expected = time.monotonic(), expected_s(todo)
    pace, done_s = 1.0, 0.0
    for number, stage in enumerate(pipeline.stages, 1):
        place = f"[{number}/{len(pipeline.stages)}] {stage.name}"
        if stage not in todo:
            log.info("%s: done before", place)
            continue
        left = f", about {clock(pace * (expected - done_s))} to go" if expected else ""
        gone = clock(time.monotonic() - began)
        log.info("%s: %s (%s gone%s)", place, stage.command, gone, left)
        if life is not None:
            life.doing = f"at stage {stage.name}"
        file = out / "stages" / f"{stage.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        state[stage.name] = {"settings": _recorded(pipeline, stage), "version": VERSION}
        write_json(out / "stages.json", state)
        write_bytes(file, yaml.safe_dump(stage.settings, sort_keys=False).encode())
        start = time.monotonic()
        code = COMMANDS[stage.command](["--config", str(file)])
        if code:
            hint = ": --again makes it anew" if code == CacheMismatch.exit_code else ""
            raise StageFailed(f"stage {stage.name} ended with exit code {code}{hint}", code)
        seconds = round(time.monotonic() - start, 2)
        state[stage.name]["seconds"] = seconds
        write_json(out / "stages.json", state)
        done_s += stage.seconds
        # As expected at first, more and more as it goes: the first stages are short.
        pace = (time.monotonic() - began + SETTLED_S) / (done_s + SETTLED_S)
    return {stage.name: float(state[stage.name]["seconds"]) for stage in pipeline.stages}


def expected_s(stages: Sequence[Stage]) -> float:
    """Of all of them; 0 where of one nobody knows."""
    return sum(stage.seconds for stage in stages) if all(s.seconds for s in stages) else 0.0


def clock(seconds: float) -> str:
    """Like 0:07 or 1:02:30."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _texts(value: Any) -> Iterator[str]:
    """Every string in nested settings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def read_state(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """Stage name -> {settings, version} of the stages that were begun, {seconds} of those that are
    done ({} where nothing ran)."""
    try:
        loaded = json.loads(read_text(Path(pipeline.out) / "stages.json"))
    except (OSError, json.JSONDecodeError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _replaced(value: Any, old: str, new: str) -> Any:
    """`value` with `old` replaced in every string."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, Mapping):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    return value
