"""Checkpoints: everything a run needs to go on exactly where it was. Used by loop.py.

    OUT/checkpoints/step-00001000/model.safetensors, config.json, provenance.json
                                                          a model folder like any other
                                 /optimizer.safetensors   PARAMETER.exp_avg, .exp_avg_sq, .step
                                 /state.json              step, the best step so far, where the
                                                          loader is, and what train.json says
    OUT/best.json                 which checkpoint validates best, and its value

Written as a whole folder under a partial name, flushed, then renamed: what has the name is whole.
Kept are the newest and the best. Which is the best stands in every state.json; best.json repeats
the newest one's. No random state is in there, since nothing in training has any (draws.py).

The model a run begins with: fresh, or the weights of another run. Used by tokenizer.py,
world.py and head.py.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...shards.errors import CacheMismatch, DamagedShard, UsageError
from ...shards.files import disk_errors, partial_path, publish, remove, write_json
from ...shards.schema import read_json
from ..config import TrainConfig
from ..data.order import generator
from ..models.configs import DeltaTokConfig, DeltaWorldConfig, DINOWorldConfig
from .model_folder import (
    CONFIG,
    PROVENANCE,
    WEIGHTS,
    Pretrained,
    config_json,
    load_weights,
    read_tensors,
    save_tensors,
    weights_sha256,
)

MODEL, OPTIMIZER, STATE = WEIGHTS, "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8,})")


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


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: Pretrained,
    optimizer: torch.optim.Optimizer,
    provenance: Mapping[str, Any],
    state: Mapping[str, Any],
    keep: int,
    best: Best | None,
) -> Path:
    """Write the checkpoint after `step` steps; remove all but the `keep` newest and the best.

    DeltatokError, with the older checkpoints untouched, if the disk refuses.
    """
    final = folder / f"step-{step:08d}"
    with disk_errors(final):
        if not final.exists():
            partial = partial_path(final)
            partial.mkdir()
            try:
                save_tensors(_on_cpu(model.state_dict()), partial / MODEL)
                save_tensors(_on_cpu(_optimizer_tensors(model, optimizer)), partial / OPTIMIZER)
                write_json(partial / CONFIG, config_json(model))
                write_json(partial / PROVENANCE, dict(provenance))
                told = {"step": step, "best": None if best is None else asdict(best)}
                write_json(partial / STATE, {**state, **told})
                publish(partial, final)
            finally:
                remove(partial)
        write_best(folder, best)
    for number, old in find_checkpoints(folder)[:-keep]:
        if best is None or number != best.step:
            aside = partial_path(old)  # so that a kill leaves no half checkpoint of a whole name
            old.rename(aside)
            remove(aside)
    return final


def check_whole(checkpoint: Path) -> None:
    """DamagedShard, saying what to do, unless all that a run goes on from can be read."""
    for file in (checkpoint / MODEL, checkpoint / OPTIMIZER, checkpoint / STATE):
        try:
            if file.name == STATE:
                json.loads(file.read_bytes())
            else:
                with safe_open(file, framework="pt"):
                    pass
        except (OSError, ValueError, SafetensorError) as error:
            raise DamagedShard(
                f"{file}: not readable ({error}): remove the folder {checkpoint} and run again, "
                "to go on from the checkpoint before, or from the beginning if there is none"
            ) from error


def write_best(folder: Path, best: Best | None) -> None:
    """OUT/best.json beside OUT/checkpoints, `folder`; none as long as nothing was evaluated."""
    if best is not None:
        name, file = f"{folder.name}/step-{best.step:08d}", folder.parent / "best.json"
        with disk_errors(file):
            write_json(file, {**asdict(best), "model": name})


def read_best(checkpoint: Path) -> Best | None:
    """The best evaluation up to a checkpoint, if what was saved then is still there."""
    told = read_state(checkpoint).get("best")
    if told is None:
        return None
    try:
        best = Best(step=int(told["step"]), by=str(told["by"]), value=float(told["value"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedShard(
            f"{checkpoint / STATE}: best is {told!r}, wanted step, by and value: remove this "
            "checkpoint, the one before is used"
        ) from error
    return best if (checkpoint.parent / f"step-{best.step:08d}").is_dir() else None


def folder_with_optimizer(folder: Path) -> Path:
    """`folder` if it is a checkpoint, the newest checkpoint in it if it is a run folder."""
    if (folder / OPTIMIZER).is_file():
        return folder
    if checkpoints := find_checkpoints(folder / "checkpoints"):
        return checkpoints[-1][1]
    raise UsageError(
        f"start_from {folder}: no {OPTIMIZER} and no checkpoints/ there, and start_optimizer asks "
        "for the optimizer's state: give a checkpoint or a run folder, or set start_optimizer false"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    state = read_json(checkpoint / STATE)
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise DamagedShard(
            f"{checkpoint / STATE}: names no step: remove this checkpoint, the one before is used"
        )
    return state


def load_optimizer(checkpoint: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the checkpoint's optimizer state in place, beside the model's parameters."""
    parameters = dict(model.named_parameters())
    for name, tensor in read_tensors(checkpoint / OPTIMIZER).items():
        parameter_name, key = name.rsplit(".", 1)
        if parameter_name not in parameters:
            raise DamagedShard(
                f"{checkpoint / OPTIMIZER}: a state for {parameter_name!r}, which the model does "
                "not have: remove this checkpoint, the one before is used"
            )
        parameter = parameters[parameter_name]
        # A fused AdamW counts its steps on the device, any other on the CPU.
        on_cpu = key == "step" and not optimizer.defaults.get("fused")
        optimizer.state[parameter][key] = tensor.to("cpu" if on_cpu else parameter.device)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=Pretrained)
SizedT = TypeVar("SizedT", DeltaTokConfig, DeltaWorldConfig, DINOWorldConfig)

NOT_IN_THE_WEIGHTS = frozenset(
    {
        *("layer_scale_init", "initializer_range"),  # fresh weights only
        *("use_rope_aug", "pos_embed_rescale"),  # training draws only
        *("num_samples_train", "num_samples_eval"),
    }
)
"""Fields of a model's config that may differ from those of the weights a run starts from."""


def with_size_of_cache(config: SizedT, hidden_size: int, *, cache: str) -> SizedT:
    """The config with the cache's hidden_size; CacheMismatch if another one was set by hand."""
    default = type(config)().hidden_size
    if config.hidden_size not in (hidden_size, default):
        raise CacheMismatch(
            f"model.hidden_size is {config.hidden_size}, the tokens in {cache} have {hidden_size} "
            "channels: leave model.hidden_size away, or give another cache"
        )
    return replace(config, hidden_size=hidden_size)


def start_folder(config: TrainConfig) -> Path | None:
    """The folder whose weights, and with start_optimizer whose optimizer, a run begins with.

    UsageError if the optimizer's state is asked for and there is none.
    """
    if config.start_from is None:
        return None
    folder = Path(config.start_from)
    return folder_with_optimizer(folder) if config.start_optimizer else folder


def make_model(
    model_class: type[ModelT], config: Any, *, seed: int, start_from: Path | None
) -> tuple[ModelT, str | None]:
    """The model, on the CPU, and the sha256 of the weights it starts from (None: fresh ones).

    Fresh weights depend on the seed and the config alone. CacheMismatch naming the field if the
    weights of `start_from` belong to another config.
    """
    model = model_class(config, generator=generator(seed, "first weights"))  # type: ignore[call-arg]
    if start_from is None:
        return model, None
    if not (start_from / CONFIG).is_file():
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
