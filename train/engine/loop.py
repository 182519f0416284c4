"""The training loop that all commands share: `train_objective`, and the `Trainer` it runs.

What is computed is in the objective; when it is read, logged, evaluated and saved is here, as are
AdamW's parameter groups and the warm-up by the released rules. FLOPs are counted from the step
itself, at the first one and where the work of a step changes (the number of candidates may follow a
schedule): 2 per multiply-add, products only, backward as it runs; of best-of-many, the selection
too.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...shards.deltas.reader import DeltaShards
from ...shards.errors import DamagedShard, DeltatokError, Stopped, UsageError
from ...shards.files import disk_errors
from ...shards.patches.reader import PatchShards
from ...shards.running.devices import memory_errors
from ...shards.running.interrupts import StopRequest
from ..config import TrainConfig
from ..data.batches import Batch, Prefetcher
from ..data.order import RankSlice
from ..data.residency import resolve_residency
from .checkpoints import (
    Best,
    CheckpointWriter,
    check_checkpoint,
    checkpoint_path,
    find_checkpoints,
    initialise,
    load_checkpoint,
    read_best,
    read_optimizer,
    save_checkpoint,
    set_aside,
    set_optimizer,
    start_folder,
    write_best,
)
from .devices import Accelerator, check_compiler, from_main, make_accelerator, on_main
from .logs import Meter, RunLog, check_trackers, is_time, open_trackers
from .model_folder import Pretrained
from .objective import Objective, data_name
from .run_folder import TrainingRun, locked


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The decayed and the other trainable parameters, each in the module's order, as groups of
    torch.optim, with the names of their parameters.

    Decayed are the weights of linear and convolution layers only; embeddings, norms, layer scales
    and biases are not.
    """
    decayed: set[str] = set()
    for path, part in model.named_modules():
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            decayed.add(f"{path}.weight" if path else "weight")
    groups: list[dict[str, Any]] = [
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


COUNTED_SAMPLES = 2
"""Samples of the pass that is counted: FLOPs grow in proportion, and BatchNorm needs two."""


def flops_per_sample(
    objective: Objective, batch: Batch, *, step: int, device: torch.device
) -> float:
    """FLOPs that one sample of a step takes, forward and backward.

    The pass runs on a second model of zeros, so that neither weights, gradients, running
    statistics nor a compiled or distributed wrapper see it; no random state is drawn from.
    """
    with torch.device("meta"):
        twin = type(objective.model)(objective.model.config)
    twin = twin.to_empty(device=device).train()
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    count = min(COUNTED_SAMPLES, len(batch.samples))
    meter = Meter(objective.unit, device)
    meter.is_counting = True
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        losses, _ = objective.losses(twin, batch, slice(0, count), step=step, meter=meter)
        losses.sum().backward()  # type: ignore[no-untyped-call]
    total: int = counter.get_total_flops()
    return total / count


logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=TrainConfig)
ModelT = TypeVar("ModelT", bound=Pretrained)
ShardsT = TypeVar("ShardsT", PatchShards, DeltaShards)


class Update(NamedTuple):
    """What one step is about to change the weights by; the same on every rank."""

    loss: float
    gradient_norm: float
    stopping: bool
    """Some rank was asked to stop."""
    extras: dict[str, float]


class SentStep(NamedTuple):
    """A step whose numbers are on their way from the device; `read` waits for them."""

    step: int
    batch: Batch
    """Without its tensors: to name its windows."""
    losses: Tensor
    """(B,), on the device."""
    names: list[str]
    """Of the extras."""
    numbers: Tensor
    """float32 (3 + extras,), on the CPU: loss, whether to stop, the extras, gradient norm."""
    copied: torch.cuda.Event | None

    def read(self) -> Update:
        """The numbers."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, stopping, *extras, norm = self.numbers.tolist()
        named = dict(zip(self.names, extras, strict=True))
        return Update(loss=loss, gradient_norm=norm, stopping=stopping > 0, extras=named)


NOTHING_KNOWN = Update(loss=math.nan, gradient_norm=math.nan, stopping=False, extras={})
"""Of the first step, whose numbers may be read at the second."""


class Trainer:
    """One run on one rank: the wrapped model, its optimizer, and where to go on."""

    def __init__(self, objective: Objective, run: TrainingRun, accelerator: Accelerator) -> None:
        self.objective, self.run, self.accelerator = objective, run, accelerator
        self.config = run.config
        self.meter = Meter(
            objective.unit, accelerator.device, tokens_per_sample=objective.tokens_per_sample
        )
        if not len(objective.validation):
            logger.warning(
                "no validation windows: nothing is evaluated and no best checkpoint kept; for "
                "that, set validation_fraction above 0, or extract more clips"
            )
        check_trackers(self.config.trackers)
        if self.config.compile:
            check_compiler(accelerator.device)
        on_main(accelerator, run.begin)
        self.best: Best | None = None
        self.start = 0
        on_main(accelerator, self._find_start)
        self.start = int(from_main({"step": self.start})["step"])
        optimizer_state: dict[str, Tensor] = {}
        if self.start:
            folder = checkpoint_path(run.checkpoints, self.start)
            load_checkpoint(folder, objective.model)
            optimizer_state = read_optimizer(folder, objective.model)
            self.best = read_best(folder)
            on_main(accelerator, partial(write_best, run.checkpoints, self.best))
            logger.info("going on after step %d, from %s", self.start, folder)
        elif self.config.start_optimizer and (source := start_folder(self.config)) is not None:
            try:
                check_checkpoint(source)
                optimizer_state = read_optimizer(source, objective.model)
            except DamagedShard as error:
                raise DamagedShard(f"{error}: start from another checkpoint") from error
        groups = parameter_groups(objective.model, self.config.weight_decay)
        optimizer = torch.optim.AdamW(
            groups,
            lr=self.config.lr,
            fused=accelerator.device.type in ("cpu", "cuda"),  # one kernel, not one a parameter
        )
        if self.config.compile:
            objective.model.compile(mode=self.config.compile_mode)
        self.forward: nn.Module
        self.forward, self.optimizer = accelerator.prepare(objective.model, optimizer)
        set_optimizer(optimizer_state, model=objective.model, optimizer=optimizer)
        self.raw_optimizer = optimizer
        self._unread: SentStep | None = None
        objective.model.train()

    def _find_start(self) -> None:
        """The step of the newest checkpoint, 0 without any; with skip_damaged of the newest that is
        whole, and those that are not are set aside.

        DamagedShard naming the file, and what to do; CacheMismatch for one of another run.
        """
        run = self.run
        damaged: list[tuple[Path, DamagedShard]] = []
        for step, folder in reversed(find_checkpoints(run.checkpoints)):
            try:
                check_checkpoint(folder)
                run.check_checkpoint(folder)
                load_checkpoint(folder, self.objective.model)
                read_optimizer(folder, self.objective.model)
                read_best(folder)
            except DamagedShard as error:
                damaged.append((folder, error))
                continue
            self.start = step
            break
        if damaged and not (self.config.skip_damaged and self.start):
            newest, problem = damaged[0]
            advice = (
                f"remove the folder {newest} and run again: there is none before it that is whole"
            )
            if self.start:
                advice = (
                    f"give --skip-damaged to go on from the checkpoint before, after step "
                    f"{self.start}; or remove the folder {newest}"
                )
            raise DamagedShard(f"{problem}: {advice}") from problem
        for folder, problem in damaged:
            logger.warning(
                "%s: the checkpoint is set aside as damaged-%s; going on after step %d, whose "
                "checkpoint is whole",
                problem,
                folder.name,
                self.start,
            )
            set_aside(folder)
        if self.start > self.config.steps:
            raise UsageError(
                f"{run.folder}: {self.start} steps are trained, steps asks for "
                f"{self.config.steps}: set steps higher, or another out"
            )

    def train(self) -> None:
        """Train to the end and write the model.

        Raises Stopped after SIGTERM or Ctrl-C (a checkpoint was written), DeltatokError for a loss
        or gradient that is not finite, before it reaches the weights, and for what the objective
        judges hopeless.
        """
        config, objective, last = self.config, self.objective, self.config.steps
        with (
            Prefetcher(self._read, start=self.start, stop=last) as batches,
            contextlib.closing(self._open_log()) as log,
            CheckpointWriter() as writer,
            StopRequest() as stop,
        ):
            for step in range(self.start, last):
                batch = self._fetch(batches)
                if step == self.start or objective.work_at(step) != objective.work_at(step - 1):
                    self._count_flops(batch, step)
                learning_rate = self._set_learning_rate(step)
                losses, extras = self._forward_backward(batch, step)
                norm = self._clip()
                done = step + 1
                is_logged = is_time(done, every=config.log_every, last=last)
                is_due = is_time(done, every=config.save_every, last=last)
                has_evaluation = len(objective.validation) > 0
                has_evaluation &= is_time(done, every=config.eval_every, last=last)
                stops = stop.asked or writer.has_failed
                sent = self._send(step, batch, losses, norm, stops, extras if is_logged else {})
                update = self._read_numbers(sent, now=is_logged or is_due or has_evaluation)
                if is_logged:
                    numbers = {
                        "loss": update.loss,
                        "gradient_norm": update.gradient_norm,
                        "learning_rate": learning_rate,
                        **update.extras,
                    }
                    objective.check(numbers, step=done)
                self.optimizer.step()
                self.optimizer.zero_grad()

                log.advance()
                if is_logged:
                    speed = self.meter.report(samples_left=(last - done) * config.batch_size)
                    values = {**numbers, **speed}
                    on_main(self.accelerator, partial(log.write, "train", done, values))
                found_best = False
                if has_evaluation:
                    values = self._evaluate()
                    on_main(self.accelerator, partial(log.write, "validation", done, values))
                    objective.judge(values, step=done)
                    found_best = self._is_best(values, step=done)
                if is_due or found_best or update.stopping:
                    on_main(self.accelerator, partial(self._save, done, log, writer))
                if update.stopping and done < last:
                    on_main(self.accelerator, writer.wait)
                    raise Stopped(f"stopped after step {done} of {last}: run again to go on")
            on_main(self.accelerator, writer.wait)
        on_main(self.accelerator, self._finish)

    def _open_log(self) -> RunLog:
        run, is_main = self.run, self.accelerator.is_main_process
        trackers = open_trackers(
            self.config.trackers if is_main else (),
            folder=run.folder,
            config=run.describe()["config"],
            start=self.start,
        )
        return RunLog(
            run.log_file,
            start=self.start,
            stop=self.config.steps,
            enabled=is_main,
            trackers=trackers,
        )

    def _count_flops(self, batch: Batch, step: int) -> None:
        device = self.accelerator.device
        with self.accelerator.autocast(), self.meter.waiting("counting"):
            self.meter.flop_per_sample = flops_per_sample(
                self.objective, batch, step=step, device=device
            )

    def _read(self, step: int) -> Batch:
        batch = self.objective.read(step)
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
                    loss, more = self.objective.losses(
                        self.forward, batch, part, step=step, meter=self.meter
                    )
                self.accelerator.backward(loss.sum() / count)
            losses.append(loss.detach())
            for name, value in more.items():
                extras[name] = extras.get(name, 0) + value.detach() * (len(loss) / count)
        self.meter.count(count * self.accelerator.num_processes)
        return torch.cat(losses), extras

    def _clip(self) -> Tensor:
        norm: Tensor = self.accelerator.clip_grad_norm_(
            self.objective.model.parameters(), self.config.clip_grad_norm or math.inf
        )
        return norm.detach()

    def _send(
        self,
        step: int,
        batch: Batch,
        losses: Tensor,
        norm: Tensor,
        stop_requested: bool,
        extras: Mapping[str, Tensor],
    ) -> SentStep:
        """The step's numbers over all ranks, asked for from the device.

        On cuda the update is told to leave the weights as they are where they are not finite: the
        host may know that only after it.
        """
        device, names = losses.device, sorted(extras)
        stop = torch.full((), float(stop_requested), device=device)
        mine = torch.stack([losses.mean(), stop, *(extras[name].float() for name in names)])
        # Gradients, and so their norm, are already the mean over the ranks.
        mean = self.accelerator.reduce(mine, reduction="mean")
        numbers = torch.cat([mean, norm.reshape(1)])
        copied = None
        if device.type == "cuda":
            is_bad = ~(numbers[0] + numbers[-1]).isfinite()
            self.raw_optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
        numbers = numbers.to("cpu", non_blocking=True)
        if device.type == "cuda":
            copied = torch.cuda.current_stream(device).record_event()
        return SentStep(step, replace(batch, tensors={}), losses, names, numbers, copied)

    def _read_numbers(self, sent: SentStep, *, now: bool) -> Update:
        """The newest numbers that are known, once they are known to be finite.

        On cuda, unless `now`, those of the step before: the device has work meanwhile.
        """
        update = NOTHING_KNOWN
        if self._unread is not None:
            update = self._check_finite(self._unread)
        self._unread = sent
        if now or update.stopping or sent.copied is None:
            update = self._check_finite(sent)
            self._unread = None
        return update

    def _check_finite(self, sent: SentStep) -> Update:
        update = sent.read()
        if not (math.isfinite(update.loss) and math.isfinite(update.gradient_norm)):
            rank = self.accelerator.process_index
            raise DeltatokError(
                f"step {sent.step + 1}: loss {update.loss}, gradient norm {update.gradient_norm}; "
                f"the weights were not changed. In the batch of rank {rank} "
                f"{self.objective.nan_report(sent.losses, sent.batch)}. Check these clips, "
                "or set a lower lr, a longer warm-up or precision float32; run again to go on "
                "from the last checkpoint"
            )
        return update

    def _evaluate(self) -> dict[str, float]:
        self.objective.model.eval()
        with torch.no_grad(), self.accelerator.autocast(), self.meter.waiting("evaluation"):
            values = from_main(self.objective.evaluate())
        self.objective.model.train()
        return values

    def _is_best(self, values: Mapping[str, float], *, step: int) -> bool:
        """Whether no earlier evaluation gave a lower or an equal value."""
        value = values[self.objective.best_by]
        if not value < (math.inf if self.best is None else self.best.value):  # NaN is not
            return False
        self.best = Best(step=step, by=self.objective.best_by, value=value)
        return True

    def _save(self, step: int, log: RunLog, writer: CheckpointWriter) -> None:
        log.sync()
        with self.meter.waiting("saving"):
            write = partial(
                save_checkpoint,
                self.run.checkpoints,
                step,
                provenance=self.objective.provenance(),
                state={**self.run.describe(), "loader": self._position(step)},
                keep=self.config.keep_checkpoints,
                best=self.best,
            )
            writer.save(self.objective.model, self.raw_optimizer, write)

    def _position(self, step: int) -> dict[str, int]:
        """Where the loader is after `step` steps, for people: the step alone decides it."""
        per_epoch = self.objective.order.steps_per_epoch
        epoch, batch = divmod(step, per_epoch)
        return {
            "epoch": epoch,
            "batch": batch,
            "batches_per_epoch": per_epoch,
            "ranks": self.accelerator.num_processes,
        }

    def _finish(self) -> None:
        with disk_errors(self.run.folder):
            self.objective.model.save_pretrained(self.run.folder, self.objective.provenance())
            self.run.finish()
        logger.info("trained %d steps: the model is in %s", self.config.steps, self.run.folder)


def train_objective(
    command: str,
    config: ConfigT,
    shards: ShardsT,
    fresh: tuple[type[ModelT], Any],
    make: Callable[[ModelT, ShardsT, ConfigT, RankSlice, torch.device], Objective],
) -> Path:
    """Train, or go on, or find it done; gives OUT, by then a model folder.

    fresh: class and config of the model. make: the objective of it, with the residency decided, for
    a rank and its device. Raises what Trainer.train does, UsageError for a launch or a cache that
    cannot train this, CacheMismatch for an OUT that another run or another cache made.
    """
    model, started_from = initialise(*fresh, seed=config.seed, start_from=start_folder(config))
    accelerator = make_accelerator(config.device, config.precision)
    config = resolve_residency(config, shards, accelerator)
    name = data_name(shards)
    data = {
        name: shards.info.identity,
        "start_from": started_from,
        "windows": shards.arrangement,  # a run cannot go on with them under other numbers
        "order": "shuffled windows",  # nor in another order
    }
    if config.residency == "stream" and config.ORDER_FOLLOWS_RESIDENCY:
        data["order"] = "shuffled blocks"
    run = TrainingRun(
        command=command,
        config=config,
        data=data,
        fingerprints={name: shards.info.fingerprint},
    )
    if run.is_finished():
        logger.info("%s: already trained for %d steps", config.out, config.steps)
        return run.folder
    ranks = RankSlice(rank=accelerator.process_index, num_ranks=accelerator.num_processes)
    doing, num_ranks = f"training, batch_size {config.batch_size}", accelerator.num_processes
    with memory_errors(doing, lambda: " or ".join(config.memory_settings(num_ranks))):
        objective = make(model, shards, config, ranks, accelerator.device)
        with locked(run.folder, accelerator):
            Trainer(objective, run, accelerator).train()
    return run.folder
