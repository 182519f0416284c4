"""The folder of a training run: who made it, what may go on in it, and whether it is finished.

OUT/train.json          command, merged config, identity of the data, versions; written first
OUT/log.jsonl           logs.py
OUT/run.lock            held by the one process that trains into the folder
OUT/checkpoints/        checkpoints.py
OUT/config.json, model.safetensors, provenance.json     the model, when training ends
"""

import fcntl
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...shards.cache import differences
from ...shards.errors import CacheMismatch, DamagedShard, UsageError
from ...shards.files import (
    flush_names,
    is_partial,
    open_append,
    remove_partials,
    write_json,
)
from ...shards.schema import STORED, load, plain, read_json
from ..config import TrainConfig
from .checkpoints import find_checkpoints
from .devices import Accelerator, on_main
from .model_folder import STATE

LOCK = "run.lock"
"""An empty file in OUT; the system drops the lock when its holder ends, however it ends."""


@contextmanager
def locked(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold OUT's lock on the main rank; the other ranks are led by it.

    Raises UsageError, on every rank, where another process trains into the folder, or it cannot be
    written.
    """
    with ExitStack() as stack:
        on_main(accelerator, lambda: _lock(folder, stack))
        yield


def _lock(folder: Path, stack: ExitStack) -> None:
    """Until the stack is left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(open_append(folder / LOCK))
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be written ({error.strerror or error}): make room on the disk, or "
            "set another out"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"{folder}: another process is training into it: wait for it, stop it, or set "
            "another out"
        ) from None


DESCRIPTION = "train.json"


@dataclass(frozen=True, kw_only=True)
class _Description:
    """What train.json, and the state.json of a checkpoint, say of a run."""

    command: str
    data: dict[str, Any]
    config: dict[str, Any]
    finished_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One run: the command, its merged config and what it trains on."""

    command: str
    """tokenizer, world or head."""
    config: TrainConfig
    data: Mapping[str, Any]
    """Name -> identity of everything the weights depend on beside the config."""
    fingerprints: Mapping[str, str]
    """Name -> fingerprint of the caches; to be read, `data` is what is compared."""

    @property
    def folder(self) -> Path:
        """OUT."""
        return Path(self.config.out)

    @property
    def checkpoints(self) -> Path:
        """OUT/checkpoints."""
        return self.folder / "checkpoints"

    @property
    def log_file(self) -> Path:
        """OUT/log.jsonl."""
        return self.folder / "log.jsonl"

    def describe(self, *, finished_step: int | None = None) -> dict[str, Any]:
        """What train.json and every checkpoint's state.json say of the run."""
        return {
            "command": self.command,
            "config": plain(asdict(self.config)),
            "data": plain(self.data),
            "fingerprints": dict(self.fingerprints),
            "versions": {
                **{name: version(name) for name in ("deltatok", "accelerate", "numpy")},
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "finished_step": finished_step,
        }

    def is_finished(self) -> bool:
        """Whether this very run has already ended, here.

        Raises CacheMismatch naming what differs if another run lives in the folder, DamagedShard if
        its description cannot be read, UsageError if the folder holds something else or more steps
        were trained than are asked for.
        """
        file = self.folder / DESCRIPTION
        if not file.is_file():
            self._check_empty()
            return False
        try:
            stored = load(_Description, read_json(file), where=str(file), how=STORED)
        except DamagedShard as error:
            raise DamagedShard(
                f"{file}: not readable: copy {STATE} of the newest checkpoint over it, or set "
                "another out"
            ) from error
        finished = stored.finished_step
        has_checkpoints = bool(find_checkpoints(self.checkpoints))
        if finished is None and not has_checkpoints:
            return False  # nothing was trained yet: what the file says binds nobody
        self._check_continues(stored, what=str(file))
        if finished is None or (finished < self.config.steps and has_checkpoints):
            return False
        if finished > self.config.steps:
            raise UsageError(
                f"{self.folder}: {finished} steps are trained, steps asks for {self.config.steps}: "
                "set steps higher, or another out"
            )
        if finished < self.config.steps:
            raise UsageError(
                f"{self.folder}: training ended at step {finished} and the checkpoints are gone, "
                f"so it cannot go on to {self.config.steps}: set another out, and start_from "
                f"{self.folder}"
            )
        return True

    def check_checkpoint(self, checkpoint: Path) -> None:
        """CacheMismatch if a checkpoint in the folder is of another model, config or cache."""
        file = checkpoint / STATE
        stored = load(_Description, read_json(file), where=str(file), how=STORED)
        self._check_continues(stored, what=str(file))

    def begin(self) -> None:
        """Make the folder and write train.json; what killed writers left is removed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(
                self.folder / DESCRIPTION, self.describe()
            )  # first: it makes the folder ours
            self.checkpoints.mkdir(exist_ok=True)
            flush_names(self.folder)
        except OSError as error:
            raise UsageError(
                f"{self.folder}: cannot be written ({error.strerror or error}): make room on the "
                "disk, or set another out"
            ) from error
        remove_partials(self.folder)
        remove_partials(self.checkpoints)

    def finish(self) -> None:
        """Note in train.json, after the model was written, that training has ended."""
        write_json(self.folder / DESCRIPTION, self.describe(finished_step=self.config.steps))

    def _check_continues(self, stored: "_Description", *, what: str) -> None:
        """CacheMismatch naming all that differs between this run and the stored one."""
        mine = self.describe()
        if stored.command != self.command:
            raise CacheMismatch(
                f"{what}: a run of {stored.command!r}, wanted {self.command!r}: set another out"
            )
        for what_of, got, wanted in (
            ("data", stored.data, mine["data"]),
            ("config", self._bound(stored.config), self._bound(mine["config"])),
        ):
            if found := differences(got, wanted):
                named = "; ".join(
                    f"{what_of} {name} is {theirs}, this run has {ours}"
                    for name, theirs, ours in found
                )
                raise CacheMismatch(
                    f"{what}: {named}: go on with what the run began with, or begin a new stage: "
                    f"set another out, and start_from {self.folder}"
                )

    def _bound(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that must not change while a run goes on."""
        return {n: value for n, value in config.items() if n not in self.config.MAY_CHANGE}

    def _check_empty(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder}: is a file, wanted a folder: set another out")
        children = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        if strangers := [c for c in children if not is_partial(c) and c.name != LOCK]:
            raise UsageError(
                f"{self.folder}: holds {strangers[0].name!r} but no {DESCRIPTION}, so it is no run "
                "folder: set a new or empty folder as out"
            )
