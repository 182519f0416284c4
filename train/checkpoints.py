"""Checkpoints: everything a run needs to go on exactly where it was. Used by loop.py.

    OUT/checkpoints/step-00001000/model.safetensors       the weights, as in a model folder
                                 /optimizer.safetensors   PARAMETER.exp_avg, .exp_avg_sq, .step
                                 /state.json              step, and what train.json says

Written as a whole folder under a partial name, flushed, then renamed: what has the name is whole.
No random state is in there, since nothing in training has any (draws.py).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..shards.errors import DamagedShard
from ..shards.files import partial_path, publish, read_json, remove, write_json
from .pretrained import read_tensors

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8,})")


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the whole checkpoints in OUT/checkpoints, oldest first."""
    children = folder.iterdir() if folder.is_dir() else ()
    found = [(int(m[1]), path) for path in children if (m := _NAME.fullmatch(path.name))]
    return sorted(found)


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    description: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint after `step` steps and remove all but the `keep` newest."""
    final = folder / f"step-{step:08d}"
    if not final.exists():
        partial = partial_path(final)
        partial.mkdir()
        try:
            save_file(_on_cpu(model.state_dict()), partial / MODEL)
            save_file(_on_cpu(_optimizer_tensors(model, optimizer)), partial / OPTIMIZER)
            write_json(partial / STATE, {**description, "step": step})
            publish(partial, final)
        finally:
            remove(partial)
    for _, old in find_checkpoints(folder)[:-keep]:
        aside = partial_path(old)  # so that a kill leaves no half checkpoint under a whole name
        old.rename(aside)
        remove(aside)
    return final


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
