"""The training loop that all commands share: `Trainer(stage, run, accelerator).train()`.

Used by tokenizer.py, world.py, dinoworld.py and head.py. What is computed is in the stage; when it
is read, logged, evaluated and saved is here.
"""

import contextlib
import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..shards.errors import DeltatokError, Stopped, UsageError
from ..shards.files import disk_errors
from ..shards.interrupts import StopRequest
from .checkpoints import (
    MODEL,
    Best,
    check_whole,
    find_checkpoints,
    load_optimizer,
    read_best,
    save_checkpoint,
    write_best,
)
from .data import Batch
from .devices import Accelerator, check_compiler, from_main, on_main
from .finite import named_windows
from .first_weights import start_folder
from .flops import flops_per_sample
from .logs import Meter, RunLog
from .optim import parameter_groups, warmup_factor
from .prefetch import Prefetcher
from .pretrained import load_weights, read_tensors
from .run_folder import Run
from .schedule import is_time
from .stage import Stage
from .trackers import Trackers, check_trackers

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
            check_whole(folder)
            run.check_checkpoint(folder)
            load_weights(stage.model, read_tensors(folder / MODEL), source=str(folder))
            self.best = read_best(folder)
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
