"""The training loop that all commands share: `Trainer(stage, run, accelerator).train()`.

Used by tokenizer.py, world.py, dinoworld.py and head.py. What is computed is in the stage; when it
is read, logged, evaluated and saved is here.

When something is due in a training loop. Used by loop.py.

Which windows to look at when a number is not finite. Used by loop.py and the stages.

AdamW's parameter groups and the learning-rate warm-up, by the released rules.

What the training loop asks of a stage (tokenizer, world model, head). Used by loop.py.

Letters: B samples of one rank's batch, b samples of one micro-batch of it.

FLOPs of a training step, counted from the step itself: at the first one, and where the work of
a step changes (the number of candidates may follow a schedule). Used by loop.py for its log.

2 per multiply-add, products only, backward as it runs; of best-of-many, the selection too.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...shards.errors import DamagedShard, DeltatokError, Stopped, UsageError
from ...shards.files import disk_errors
from ...shards.interrupts import StopRequest
from ..data.batches import Batch, Prefetcher
from ..data.order import Indices
from .checkpoints import (
    Best,
    check_checkpoint,
    find_checkpoints,
    load_checkpoint,
    load_optimizer,
    read_best,
    save_checkpoint,
    start_folder,
    write_best,
)
from .devices import Accelerator, check_compiler, from_main, on_main
from .logs import Meter, RunLog, Trackers, check_trackers
from .model_folder import Pretrained
from .run_folder import Run


def is_time(step: int, *, every: int, last: int) -> bool:
    """Whether what happens every `every` steps happens after `step` steps, or at the `last`."""
    return step % every == 0 or step == last


MAX_NAMED_WINDOWS = 4
"""Windows that are named at most."""


def named_windows(losses: Tensor, batch: Batch, *, clip_of: Callable[[int], str]) -> str:
    """ "(its own loss is not finite): window 3 of clip 'a.mp4', ...": of one rank's losses (B,)
    those that are not finite; all, where every one is (then it is the gradient, or another rank).
    """
    bad = (~losses.isfinite()).nonzero()[:, 0].tolist()
    which = "its own loss is not finite" if bad else "its own losses are finite"
    chosen = bad or range(len(losses))
    return f"({which}): {_named([int(batch.windows[index]) for index in chosen], clip_of)}"


def check_finite(tokens: Tensor, windows: Indices, *, clip_of: Callable[[int], str]) -> None:
    """DamagedShard naming those of the validation `windows`, tokens (w, ...), that hold anything
    but numbers: else every evaluation would say nothing, and no checkpoint be the best."""
    bad = (~tokens.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise DamagedShard(
            f"validation: {_named([int(windows[index]) for index in bad], clip_of)}: holds "
            "numbers that are not finite: run `deltatok-shards verify` on the cache, and make what "
            "it names again"
        )


def _named(windows: list[int], clip_of: Callable[[int], str]) -> str:
    different = list(dict.fromkeys(windows))
    named = ", ".join(
        f"window {window} of clip {clip_of(window)!r}" for window in different[:MAX_NAMED_WINDOWS]
    )
    return f"{named}{', ...' if len(different) > MAX_NAMED_WINDOWS else ''}"


class ParameterGroup(TypedDict):
    """One group as torch.optim takes it, with the names of its parameters."""

    params: list[nn.Parameter]
    names: list[str]
    weight_decay: float


def parameter_groups(model: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """The decayed and the other trainable parameters, each in the module's order.

    Decayed are the weights of linear and convolution layers only; embeddings, norms, layer scales
    and biases are not.
    """
    decayed: set[str] = set()
    for path, part in model.named_modules():
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            decayed.add(f"{path}.weight" if path else "weight")
    groups: list[ParameterGroup] = [
        {"params": [], "names": [], "weight_decay": weight_decay},
        {"params": [], "names": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[0 if name in decayed else 1]
            group["params"].append(parameter)
            group["names"].append(name)
    return groups


def warmup_factor(step: int, *, warmup_steps: int) -> float:
    """The factor on the learning rate of update number `step` (from 0): step / warmup_steps up to
    1, so that the very first update has learning rate 0 (as released); no warm-up: always 1."""
    return min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0


class Stage(Protocol):
    """A model, its batches and its loss. Everything is a function of the step alone."""

    unit: str
    """What a sample is, in the log: "pairs", "windows", "frames"."""
    best_by: str
    """The number of `evaluate` that tells the best checkpoint: the lower, the better."""

    @property
    def tokens_per_sample(self) -> int:
        """Tokens that a sample brings, for the log's tokens a second."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every training window comes once."""

    @property
    def model(self) -> Pretrained:
        """The bare model, float32, on the CPU when the loop takes it."""

    @property
    def can_evaluate(self) -> bool:
        """Whether there are validation windows."""

    def read(self, step: int) -> Batch:
        """This rank's batch of a step (from 0). Called from the prefetch thread."""

    def losses(
        self, forward: nn.Module, batch: Batch, samples: slice, *, step: int, meter: Meter
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """float32 (b,): the loss of each of the batch's `samples`, with gradient through
        `forward`, which is `model` as wrapped for this launch; and scalars for the log."""

    def check(self, numbers: Mapping[str, float], *, step: int) -> None:
        """DeltatokError if what is about to be logged of a training step, the same on every rank,
        says that it must not change the weights."""

    def evaluate(self) -> dict[str, float]:
        """Validation numbers, by their names in the log; the same on every rank. Called in eval
        mode and without gradient."""

    def judge(self, values: Mapping[str, float], *, step: int) -> None:
        """DeltatokError if validation shows that going on is pointless."""

    def work_at(self, step: int) -> int:
        """Any number that is the same for steps that take the same FLOPs a sample."""

    def clip_of(self, window: int) -> str:
        """The key of a window's clip."""

    def provenance(self) -> dict[str, Any]:
        """provenance.json of the trained model."""


COUNTED_SAMPLES = 2
"""Samples of the pass that is counted: FLOPs grow in proportion, and BatchNorm needs two."""


def flops_per_sample(stage: Stage, batch: Batch, *, step: int, device: torch.device) -> float:
    """FLOPs that one sample of a step takes, forward and backward.

    The pass runs on a second model of zeros, so that neither weights, gradients, running
    statistics nor a compiled or distributed wrapper see it; no random state is drawn from.
    """
    with torch.device("meta"):
        twin = type(stage.model)(stage.model.config)
    twin = twin.to_empty(device=device).train()
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    count = min(COUNTED_SAMPLES, len(batch.samples))
    meter = Meter(stage.unit, device)
    meter.is_counting = True
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        losses, _ = stage.losses(twin, batch, slice(0, count), step=step, meter=meter)
        losses.sum().backward()  # type: ignore[no-untyped-call]
    total: int = counter.get_total_flops()
    return total / count


logger = logging.getLogger(__name__)


class Update(NamedTuple):
    """What one step is about to change the weights by; the same on every rank."""

    loss: float
    gradient_norm: float
    stopping: bool
    """Some rank was asked to stop."""


class Trainer:
    """One run on one rank: the wrapped model, its optimizer, and where to go on."""

    def __init__(self, stage: Stage, run: Run, accelerator: Accelerator) -> None:
        self.stage, self.run, self.accelerator = stage, run, accelerator
        self.config = run.config
        self.meter = Meter(
            stage.unit, accelerator.device, tokens_per_sample=stage.tokens_per_sample
        )
        self.best: Best | None = None
        if not stage.can_evaluate:
            logger.warning(
                "no validation windows: nothing is evaluated and no best checkpoint kept; for "
                "that, set validation_fraction above 0, or extract more clips"
            )
        check_trackers(self.config.trackers)
        if self.config.compile:
            check_compiler(accelerator.device)
        on_main(accelerator, run.begin)
        self.start = 0
        checkpoints = find_checkpoints(run.checkpoints)
        if checkpoints:
            self.start, folder = checkpoints[-1]
            if self.start > self.config.steps:
                raise UsageError(
                    f"{run.folder}: {self.start} steps are trained, steps asks for "
                    f"{self.config.steps}: set steps higher, or another out"
                )
            state = check_checkpoint(folder)
            run.check_checkpoint(folder)
            load_checkpoint(folder, stage.model)
            self.best = read_best(folder, state)
            on_main(accelerator, partial(write_best, run.checkpoints, self.best))
            logger.info("going on after step %d, from %s", self.start, folder)
        groups = parameter_groups(stage.model, self.config.weight_decay)
        optimizer = torch.optim.AdamW(
            [dict(group) for group in groups],
            lr=self.config.lr,
            fused=accelerator.device.type in ("cpu", "cuda"),  # one kernel, not one a parameter
        )
        if self.config.compile:
            stage.model.compile(mode=self.config.compile_mode)
        self.forward: nn.Module
        self.forward, self.optimizer = accelerator.prepare(stage.model, optimizer)
        if checkpoints:
            load_optimizer(folder, model=stage.model, optimizer=optimizer)
        elif self.config.start_optimizer and (source := start_folder(self.config)) is not None:
            load_optimizer(source, model=stage.model, optimizer=optimizer)
        self.raw_optimizer = optimizer
        stage.model.train()

    def train(self) -> None:
        """Train to the end and write the model.

        Raises Stopped after SIGTERM or Ctrl-C (a checkpoint was written), DeltatokError for a loss
        or gradient that is not finite, before it reaches the weights, and for what the stage judges
        hopeless.
        """
        config, stage, last = self.config, self.stage, self.config.steps
        with (
            Prefetcher(self._read, start=self.start, stop=last) as batches,
            self._open_log() as log,
            StopRequest() as stop,
        ):
            for step in range(self.start, last):
                batch = self._fetch(batches)
                if step == self.start or stage.work_at(step) != stage.work_at(step - 1):
                    self._count_flops(batch, step)
                learning_rate = self._set_learning_rate(step)
                losses, extras = self._forward_backward(batch, step)
                norm = self._clip()
                update = self._agree(losses, norm, stop.asked)
                self._check_finite(update, losses, batch, step)
                done = step + 1
                is_logged = is_time(done, every=config.log_every, last=last)
                if is_logged:
                    numbers = self._numbers(update, learning_rate, extras)
                    stage.check(numbers, step=done)
                self.optimizer.step()
                self.optimizer.zero_grad()

                log.advance()
                if is_logged:
                    speed = self.meter.report(samples_left=(last - done) * config.batch_size)
                    values = {**numbers, **speed}
                    on_main(self.accelerator, partial(log.write, "train", done, values))
                found_best = False
                if is_time(done, every=config.eval_every, last=last) and stage.can_evaluate:
                    values = self._evaluate()
                    on_main(self.accelerator, partial(log.write, "validation", done, values))
                    stage.judge(values, step=done)
                    found_best = self._is_best(values, step=done)
                is_due = is_time(done, every=config.save_every, last=last)
                if is_due or found_best or update.stopping:
                    on_main(self.accelerator, partial(self._save, done, log))
                if update.stopping and done < last:
                    raise Stopped(f"stopped after step {done} of {last}: run again to go on")
        on_main(self.accelerator, self._finish)

    def _open_log(self) -> RunLog:
        is_main = self.accelerator.is_main_process
        trackers = Trackers(
            self.config.trackers if is_main else (),
            folder=self.run.folder,
            config=self.run.describe()["config"],
            start=self.start,
        )
        return RunLog(
            self.run.log_file,
            start=self.start,
            stop=self.config.steps,
            enabled=is_main,
            trackers=trackers,
        )

    def _count_flops(self, batch: Batch, step: int) -> None:
        device = self.accelerator.device
        with self.accelerator.autocast(), self.meter.waiting("counting"):
            self.meter.flop_per_sample = flops_per_sample(
                self.stage, batch, step=step, device=device
            )

    def _read(self, step: int) -> Batch:
        batch = self.stage.read(step)
        return batch.pinned() if self.accelerator.device.type == "cuda" else batch

    def _fetch(self, batches: Prefetcher[Batch]) -> Batch:
        with self.meter.waiting("loader_wait"):
            batch = batches.next()
        return batch.to(self.accelerator.device)

    def _set_learning_rate(self, step: int) -> float:
        factor = warmup_factor(step, warmup_steps=self.config.warmup_steps)
        for group in self.raw_optimizer.param_groups:
            group["lr"] = self.config.lr * factor
        return self.config.lr * factor

    def _forward_backward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of the mean loss of this rank's samples; the losses (B,), extras' means."""
        count = len(batch.samples)
        size = self.config.micro_batch_size or count
        parts = [slice(at, min(at + size, count)) for at in range(0, count, size)]
        losses: list[Tensor] = []
        extras: dict[str, Tensor] = {}
        for part in parts:
            is_last = part is parts[-1]  # ranks exchange gradients once a step
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.forward):
                with self.accelerator.autocast():
                    loss, more = self.stage.losses(
                        self.forward, batch, part, step=step, meter=self.meter
                    )
                self.accelerator.backward(loss.sum() / count)
            losses.append(loss.detach())
            for name, value in more.items():
                extras[name] = extras.get(name, 0) + value.detach() * (len(loss) / count)
        self.meter.count(count * self.accelerator.num_processes)
        return torch.cat(losses), extras

    def _clip(self) -> Tensor:
        norm: Tensor | None = self.accelerator.clip_grad_norm_(
            self.stage.model.parameters(), self.config.clip_grad_norm or math.inf
        )
        if norm is None:
            raise AssertionError("only DeepSpeed gives no gradient norm; devices.py refuses it")
        return norm.detach()

    def _agree(self, losses: Tensor, norm: Tensor, stop_requested: bool) -> Update:
        """The step's numbers over all ranks, read from the device at once."""
        stop = torch.tensor(float(stop_requested), device=losses.device)
        mine = torch.stack([losses.mean(), stop])
        # Gradients, and so their norm, are already the mean over the ranks.
        loss, stopping = self.accelerator.reduce(mine, reduction="mean").tolist()
        return Update(loss=loss, gradient_norm=norm.item(), stopping=stopping > 0)

    def _check_finite(self, update: Update, losses: Tensor, batch: Batch, step: int) -> None:
        if not (math.isfinite(update.loss) and math.isfinite(update.gradient_norm)):
            rank = self.accelerator.process_index
            raise DeltatokError(
                f"step {step + 1}: loss {update.loss}, gradient norm {update.gradient_norm}; the "
                f"weights were not changed. In the batch of rank {rank} "
                f"{named_windows(losses, batch, clip_of=self.stage.clip_of)}. Check these clips, "
                "or set a lower lr, a longer warm-up or precision float32; run again to go on "
                "from the last checkpoint"
            )

    def _numbers(
        self, update: Update, learning_rate: float, extras: Mapping[str, Tensor]
    ) -> dict[str, float]:
        names = sorted(extras)
        values: list[float] = []
        if names:
            mine = torch.stack([extras[name].float() for name in names])
            values = self.accelerator.reduce(mine, reduction="mean").tolist()
        return {
            "loss": update.loss,
            "gradient_norm": update.gradient_norm,
            "learning_rate": learning_rate,
            **dict(zip(names, values, strict=True)),
        }

    def _evaluate(self) -> dict[str, float]:
        self.stage.model.eval()
        with torch.no_grad(), self.accelerator.autocast(), self.meter.waiting("evaluation"):
            values = from_main(self.stage.evaluate())
        self.stage.model.train()
        return values

    def _is_best(self, values: Mapping[str, float], *, step: int) -> bool:
        """Whether no earlier evaluation gave a lower or an equal value."""
        value = values[self.stage.best_by]
        if not value < (math.inf if self.best is None else self.best.value):  # NaN is not
            return False
        self.best = Best(step=step, by=self.stage.best_by, value=value)
        return True

    def _save(self, step: int, log: RunLog) -> None:
        log.sync()
        with self.meter.waiting("saving"):
            save_checkpoint(
                self.run.checkpoints,
                step,
                model=self.stage.model,
                optimizer=self.raw_optimizer,
                provenance=self.stage.provenance(),
                state={**self.run.describe(), "loader": self._position(step)},
                keep=self.config.keep_checkpoints,
                best=self.best,
            )

    def _position(self, step: int) -> dict[str, int]:
        """Where the loader is after `step` steps, for people: the step alone decides it."""
        epoch, batch = divmod(step, self.stage.steps_per_epoch)
        return {
            "epoch": epoch,
            "batch": batch,
            "batches_per_epoch": self.stage.steps_per_epoch,
            "ranks": self.accelerator.num_processes,
        }

    def _finish(self) -> None:
        with disk_errors(self.run.folder):
            self.stage.model.save_pretrained(self.run.folder, self.stage.provenance())
            self.run.finish()
        logger.info("trained %d steps: the model is in %s", self.config.steps, self.run.folder)
