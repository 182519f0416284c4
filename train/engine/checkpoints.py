"""Checkpoints: all that a run needs to go on exactly where it was, and what a new one starts from.

    OUT/checkpoints/step-00001000/model.safetensors, config.json, provenance.json
                                                          a model folder like any other
                                 /optimizer.safetensors   PARAMETER.exp_avg, .exp_avg_sq, .step
                                 /state.json              step, the best step so far, where the
                                                          loader is, what train.json says, and
                                                          size and SHA-256 of the other files
    OUT/checkpoints/damaged-step-00001000                 one that skip_damaged has set aside
    OUT/best.json                 which checkpoint validates best, and its value

Written as a whole folder under a partial name, flushed, then renamed: what has the name is whole.
Of a run on cuda by a thread, from a copy in pinned memory, while the next steps are trained.
Kept are the newest (two, unless keep_checkpoints says otherwise) and the best. Which is the best
stands in every state.json; best.json repeats the newest one's. No random state is in there, since
nothing in training has any (data/order.py).

A checkpoint of an earlier version, without checksums, is read all the same: names, shapes and
dtypes of its tensors are checked, a changed value in it is not found.
"""

import logging
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...shards.errors import CacheMismatch, DamagedShard, UsageError
from ...shards.files import disk_errors, flush, partial_path, publish, remove, write_json
from ...shards.schema import STORED, load, read_json
from ..config import DINOWorldTrainConfig, TokenizerTrainConfig, TrainConfig, WorldTrainConfig
from ..data.order import generator
from .model_folder import (
    CONFIG,
    FILES,
    PROVENANCE,
    STATE,
    WEIGHTS,
    Pretrained,
    check_files,
    compare_tensors,
    config_json,
    file_table,
    load_weights,
    read_tensors,
    save_tensors,
    to_host,
    weights_sha256,
)

MODEL, OPTIMIZER = WEIGHTS, "optimizer.safetensors"
CHECKED = (*FILES, OPTIMIZER)
"""Files of a checkpoint for which its state.json vouches."""
_NAME = re.compile(r"step-(\d{8,})")

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=Pretrained)
SizedT = TypeVar("SizedT", TokenizerTrainConfig, WorldTrainConfig, DINOWorldTrainConfig)

NOT_IN_THE_WEIGHTS = frozenset(
    {
        *("layer_scale_init", "initializer_range"),  # fresh weights only
        *("use_rope_aug", "pos_embed_rescale"),  # training draws only
        *("num_samples_train", "num_samples_eval"),
    }
)
"""Fields of a model's config that may differ from those of the weights a run starts from."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies; folder: OUT/checkpoints."""
    return folder / f"step-{step:08d}"


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the whole checkpoints in OUT/checkpoints, oldest first."""
    children = folder.iterdir() if folder.is_dir() else ()
    found = [(int(m[1]), path) for path in children if (m := _NAME.fullmatch(path.name))]
    return sorted(found)


@dataclass(frozen=True, kw_only=True)
class Best:
    """The evaluation with the lowest value so far."""

    step: int
    by: str
    """Name of the value in log.jsonl."""
    value: float


class Snapshot(NamedTuple):
    """What a checkpoint will hold, on the CPU."""

    config: dict[str, Any]
    """config.json."""
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    copied: torch.cuda.Event | None
    """The tensors are copies, and there after this; None: they are those that the next step
    changes, or were copied with a wait."""


def snapshot(model: Pretrained, optimizer: torch.optim.Optimizer) -> Snapshot:
    """Of a model and its AdamW as they are now; the host waits for nothing on cuda."""
    weights, copied = to_host(model.state_dict())
    state, copied_too = to_host(
        {
            f"{name}.{key}": value
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
    )
    return Snapshot(config_json(model), weights, state, copied_too or copied)


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Snapshot,
    *,
    provenance: Mapping[str, Any],
    state: Mapping[str, Any],
    keep: int,
    best: Best | None,
) -> Path:
    """Write the checkpoint after `step` steps; remove all but the `keep` newest and the best.

    DeltatokError, with the older checkpoints untouched, if the disk refuses.
    """
    final = checkpoint_path(folder, step)
    if tensors.copied is not None:
        tensors.copied.synchronize()
    with disk_errors(final):
        if not final.exists():
            partial = partial_path(final)
            partial.mkdir()
            try:
                save_tensors(tensors.model, partial / MODEL)
                save_tensors(tensors.optimizer, partial / OPTIMIZER)
                write_json(partial / CONFIG, tensors.config)
                write_json(partial / PROVENANCE, dict(provenance))
                written = {
                    "step": step,
                    "best": None if best is None else asdict(best),
                    "files": file_table(partial, CHECKED),
                }
                write_json(partial / STATE, {**state, **written})
                publish(partial, final)
            finally:
                remove(partial)
        write_best(folder, best)
    for number, old in find_checkpoints(folder)[:-keep]:
        if best is None or number != best.step:
            aside = partial_path(old)  # so that a kill leaves no half checkpoint of a whole name
            old.rename(aside)
            flush(folder)  # nor a power loss
            remove(aside)
    return final


class CheckpointWriter:
    """Writes the checkpoints of a run, each when the one before is there. What fails is raised by
    the next call of `save` or `wait`, whichever comes first.

    As a context manager it lets the last one be written to its end, however the run ends.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[Path] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is not None and self.has_failed and self._last is not None:
            logger.error("%s", self._last.exception())  # beside the error that ends the run

    @property
    def has_failed(self) -> bool:
        """Whether the last one is known to have failed."""
        return self._last is not None and self._last.done() and bool(self._last.exception())

    def save(
        self,
        model: Pretrained,
        optimizer: torch.optim.Optimizer,
        write: Callable[[Snapshot], Path],
    ) -> None:
        """Call `write` with what they are now: from cuda by the thread, elsewhere at once."""
        self.wait()  # before another copy takes as much memory again
        tensors = snapshot(model, optimizer)
        if tensors.copied is None:
            write(tensors)
        else:
            self._last = self._thread.submit(write, tensors)

    def wait(self) -> None:
        """Until the last one is there."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


def check_checkpoint(checkpoint: Path) -> None:
    """DamagedShard, naming the file, unless all files are there, and as they were written."""
    for name in (MODEL, OPTIMIZER):
        file = checkpoint / name
        try:
            if not file.is_file():  # opening a pipe would wait for somebody to write to it
                raise FileNotFoundError("no regular file")
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise DamagedShard(f"{file}: not readable ({error})") from error
    file = checkpoint / STATE
    try:
        step = load(_State, read_json(file), where=str(file), how=STORED).step
    except DamagedShard as error:
        raise DamagedShard(f"{file}: not readable ({error})") from error
    if checkpoint.name != checkpoint_path(checkpoint.parent, step).name:
        raise DamagedShard(f"{file}: of step {step}, not of {checkpoint.name}")
    if not check_files(checkpoint, CHECKED):
        logger.warning("%s has no checksums: an earlier version wrote it", checkpoint)


@dataclass(frozen=True, kw_only=True)
class _State:
    """What state.json says of the checkpoint itself."""

    step: int


def set_aside(checkpoint: Path) -> None:
    """Takes a damaged checkpoint's name from it, so that its step can be trained and saved again;
    one that was set aside before at that step goes."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    remove(aside)
    checkpoint.rename(aside)


def write_best(folder: Path, best: Best | None) -> None:
    """OUT/best.json beside OUT/checkpoints, `folder`; none as long as nothing was evaluated."""
    if best is not None:
        name = f"{folder.name}/{checkpoint_path(folder, best.step).name}"
        file = folder.parent / "best.json"
        with disk_errors(file):
            write_json(file, {**asdict(best), "model": name})


def read_best(checkpoint: Path) -> Best | None:
    """The best evaluation up to a checkpoint, if what was saved then is still there."""
    file = checkpoint / STATE
    stored = read_json(file).get("best")
    if stored is None:
        return None
    best = load(Best, stored, where=f"{file}: best", how=STORED)
    return best if checkpoint_path(checkpoint.parent, best.step).is_dir() else None


def _folder_with_optimizer(folder: Path) -> Path:
    """`folder` if it is a checkpoint, the newest checkpoint in it if it is a run folder."""
    if (folder / OPTIMIZER).is_file():
        return folder
    if checkpoints := find_checkpoints(folder / "checkpoints"):
        return checkpoints[-1][1]
    raise UsageError(
        f"start_from {folder}: no {OPTIMIZER} and no checkpoints/ there, and start_optimizer asks "
        "for the optimizer's state: give a checkpoint or a run folder, or set start_optimizer false"
    )


def load_checkpoint(checkpoint: Path, model: Pretrained) -> None:
    """Put the checkpoint's weights in place; DamagedShard unless names, shapes and dtypes fit."""
    tensors, wanted = read_tensors(checkpoint / MODEL), model.state_dict()
    if problems := compare_tensors(wanted, tensors, dtypes=True):
        raise DamagedShard(f"{checkpoint / MODEL}: {'; '.join(problems)}")
    model.load_state_dict(tensors, assign=True)


def read_optimizer(checkpoint: Path, model: nn.Module) -> dict[str, Tensor]:
    """The checkpoint's optimizer state: PARAMETER.exp_avg, .exp_avg_sq, .step.

    DamagedShard unless every parameter that has a state has AdamW's whole one, of its own shape.
    """
    tensors = read_tensors(checkpoint / OPTIMIZER)
    # A parameter that no gradient reached (a learned query that nothing asked) has no state.
    with_state = {name.rpartition(".")[0] for name in tensors}
    wanted = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        if name in with_state
        for key, value in _wanted_state(parameter).items()
    }
    if problems := compare_tensors(wanted, tensors, dtypes=True):
        raise DamagedShard(f"{checkpoint / OPTIMIZER}: {'; '.join(problems)}")
    return tensors


def set_optimizer(
    tensors: Mapping[str, Tensor], *, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put what read_optimizer gave in place, beside the model's parameters."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        of, _, key = name.rpartition(".")
        # A fused AdamW counts its steps on the device, any other on the CPU.
        on_cpu = key == "step" and not optimizer.defaults.get("fused")
        device = "cpu" if on_cpu else parameters[of].device
        optimizer.state[parameters[of]][key] = tensor.to(device)


def _wanted_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """What AdamW keeps of a parameter: names, shapes and dtypes, no values."""
    like = torch.empty_like(parameter, device="meta")
    return {
        "exp_avg": like,
        "exp_avg_sq": like,
        "step": torch.empty((), dtype=torch.float32, device="meta"),
    }


def with_size_of_cache(config: SizedT, hidden_size: int, *, cache: str) -> SizedT:
    """The config with a model of the cache's hidden_size; CacheMismatch if another one was set by
    hand."""
    asked, default = config.model.hidden_size, type(config.model)().hidden_size
    if asked not in (hidden_size, default):
        raise CacheMismatch(
            f"model.hidden_size is {asked}, the tokens in {cache} have {hidden_size} "
            "channels: leave model.hidden_size away, or give another cache"
        )
    return replace(config, model=replace(config.model, hidden_size=hidden_size))


def start_folder(config: TrainConfig) -> Path | None:
    """The folder whose weights, and with start_optimizer whose optimizer, a run begins with.

    UsageError if the optimizer's state is asked for and there is none.
    """
    if config.start_from is None:
        return None
    folder = Path(config.start_from)
    return _folder_with_optimizer(folder) if config.start_optimizer else folder


def initialise(
    model_class: type[ModelT], config: Any, *, seed: int, start_from: Path | None
) -> tuple[ModelT, str | None]:
    """The model, on the CPU, and the sha256 of the weights it starts from (None: fresh ones).

    Fresh weights depend on the seed and the config alone. CacheMismatch naming the field if the
    weights of `start_from` belong to another config.
    """
    model = model_class(config, generator=generator(seed, "first weights"))  # type: ignore[call-arg]
    if start_from is None:
        return model, None
    if not (start_from / CONFIG).exists():
        raise UsageError(
            f"start_from {start_from}: no model there, wanted {CONFIG} and {WEIGHTS}: "
            "give a run that has ended, or a checkpoint, RUN/checkpoints/step-NNNNNNNN"
        )
    source = model_class.from_pretrained(start_from)
    wanted = asdict(config)
    for name, value in asdict(source.config).items():
        if name not in NOT_IN_THE_WEIGHTS and value != wanted[name]:
            raise CacheMismatch(
                f"start_from {start_from}: {name} is {value}, this run's model has {wanted[name]}: "
                f"set model.{name} to {value}, or start from other weights"
            )
    load_weights(model, source.state_dict(), source=str(start_from))
    logger.info("starting from the weights in %s", start_from)
    return model, weights_sha256(source)
