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
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..shards.errors import DamagedShard, UsageError
from ..shards.files import disk_errors, partial_path, publish, read_json, remove, write_json
from .pretrained import (
    CONFIG,
    PROVENANCE,
    WEIGHTS,
    Pretrained,
    config_json,
    read_tensors,
    save_tensors,
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
