"""What a run tells: log.jsonl (always), a progress line (on a terminal), a line of logging, and
TensorBoard and W&B if asked for. All of it by the main rank.

    {"kind": "train", "step": 50, "loss": ..., "gradient_norm": ..., "learning_rate": ...,
     "pairs_per_s": ..., "tokens_per_s": ..., "tflop_per_s": ..., "loader_wait_share": ...,
     "peak_memory_gb": ..., "eta_s": ...}
    {"kind": "validation", "step": 1000, "validation_loss": ..., ...}

Everything but what a clock or the memory decides (those six) is the same in a run that was killed
and gone on with. Rates are over all ranks, shares and memory the main one's.

    tensorboard   OUT/tensorboard: `tensorboard --logdir runs`; pip install deltatok[tensorboard]
    wandb         OUT/wandb, offline unless WANDB_MODE says otherwise; pip install deltatok[wandb]

log.jsonl stays the record: it alone is cut back to the checkpoint that a run goes on from.
"""

import contextlib
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import (  # type: ignore[import-untyped]
    LOGGER_TYPE_TO_CLASS,
    GeneralTracker,
)
from tqdm import tqdm

from ...shards.cache import flatten
from ...shards.errors import UsageError
from ...shards.files import disk_errors, open_append, open_file, write_bytes
from ...shards.running.stopwatch import Stopwatch

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


def open_trackers(
    names: Sequence[str], *, folder: Path, config: Mapping[str, Any], start: int
) -> list[GeneralTracker]:
    """The trackers of a run. folder: OUT. start: steps that are trained already."""
    trackers = []
    for name in names:
        make = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":  # points after the checkpoint, from before a kill, are hidden
            tracker = make("tensorboard", str(folder), purge_step=start + 1)
        else:
            mode = os.environ.get("WANDB_MODE", "offline")
            tracker = make(PROJECT, dir=str(folder), name=folder.name, mode=mode)
        tracker.start()
        if start == 0:  # what is no number, word or truth value as its text: they take no other
            tracker.store_init_configuration(
                {
                    key: value if isinstance(value, str | int | float | bool) else str(value)
                    for key, value in flatten(config).items()
                }
            )
        trackers.append(tracker)
    return trackers


logger = logging.getLogger(__name__)


def is_time(step: int, *, every: int, last: int) -> bool:
    """Whether what happens every `every` steps happens after `step` steps, or at the `last`."""
    return step % every == 0 or step == last


class RunLog:
    """log.jsonl, the trackers and the progress line. Lines of steps after `start`, from before a
    kill, go."""

    def __init__(
        self,
        path: Path,
        *,
        start: int,
        stop: int,
        enabled: bool,
        trackers: Sequence[GeneralTracker],
    ) -> None:
        """enabled: this is the main rank; on any other nothing is written."""
        self._enabled = enabled
        self._path = path
        self._trackers = trackers
        self._progress = tqdm(
            total=stop, initial=start, unit="step", dynamic_ncols=True, disable=not enabled or None
        )
        if enabled:
            with disk_errors(path):
                _drop_after(path, start)
                self._file = open_append(path)  # unbuffered: closing it has nothing left to write

    def close(self) -> None:
        """Flush and end all."""
        self._progress.close()
        for tracker in self._trackers:
            tracker.finish()
        if self._enabled:
            self._file.close()

    def advance(self) -> None:
        """One more step is done."""
        self._progress.update()

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One line; for trackers as KIND/NAME, validation_NAME as validation/NAME. JSON has no
        infinities: a value that is none is written as null."""
        finite = {n: v if math.isfinite(v) else None for n, v in values.items()}
        line = {"kind": kind, "step": step, **finite}
        for tracker in self._trackers:
            named = {f"{kind}/{n.removeprefix(f'{kind}_')}": value for n, value in values.items()}
            tracker.log(named, step=step)
        with disk_errors(self._path):
            self._file.write((json.dumps(line) + "\n").encode())
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._progress.disable:
            logger.info("%s step %d: %s", kind, step, shown)
        else:
            self._progress.set_postfix_str(shown, refresh=False)

    def sync(self) -> None:
        """Everything written so far is on the disk: called before a checkpoint promises it."""
        if self._enabled:
            with disk_errors(self._path):
                os.fsync(self._file.fileno())


class Meter:
    """Samples a second since the last report, and which share of the time went where."""

    def __init__(
        self, unit: str, device: torch.device, *, tokens_per_sample: int | None = None
    ) -> None:
        self._unit = unit
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._tokens_per_sample = tokens_per_sample
        self.flop_per_sample: float | None = None
        """FLOPs of one sample of the steps at hand, where they were counted."""
        self.is_counting = False
        """Whether this meter belongs to a pass whose FLOPs are counted."""
        self._reset()

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._samples = 0
        self._flop = 0.0
        self._watch = Stopwatch()
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def count(self, samples: int) -> None:
        """`samples` more are done, over all ranks."""
        self._samples += samples
        self._flop += samples * (self.flop_per_sample or 0.0)

    def waiting(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Counts what the host does inside as `name`."""
        return self._watch.at(name)

    @contextlib.contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Counts what the device computes inside as `name`, without waiting for it."""
        if not self._on_cuda:
            with self.waiting(name):
                yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        self._events.append((name, start, end))

    def report(self, *, samples_left: int | None = None) -> dict[str, float]:
        """Of everything since the last report: UNIT_per_s and NAME_share; tokens_per_s and
        tflop_per_s (10^12 FLOPs a second) where they are known; the peak memory so far; and
        seconds to go at this rate, if it is said how many samples are left."""
        seconds = time.perf_counter() - self._started
        if self._events:
            self._events[-1][2].synchronize()  # and so are those before it
        for name, start, end in self._events:
            self._watch.add(name, start.elapsed_time(end) / 1000)
        rate = self._samples / seconds
        values = {f"{self._unit}_per_s": rate}
        if self._tokens_per_sample is not None:
            values["tokens_per_s"] = rate * self._tokens_per_sample
        if self.flop_per_sample is not None:
            values["tflop_per_s"] = self._flop / seconds / 1e12
        values |= {f"{name}_share": part / seconds for name, part in self._watch.seconds.items()}
        values["peak_memory_gb"] = peak_memory_bytes(self._device) / 1e9
        if samples_left is not None:
            values["eta_s"] = samples_left / rate if rate > 0 else float("inf")
        self._reset()
        return values


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: tensors on cuda, else all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # elsewhere in kilobytes


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole lines of log.jsonl up to `step`; what a kill tore goes."""
    if not path.exists():
        return
    with open_file(path) as file:
        lines = file.read().splitlines(keepends=True)
    kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
    if kept != lines:
        write_bytes(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    try:
        value: Any = json.loads(line)
    except ValueError:
        return None
    step = value.get("step") if isinstance(value, dict) else None
    return step if isinstance(step, int) else None
