"""AdamW's parameter groups and the learning-rate warm-up, by the released rules."""

from typing import TypedDict

from torch import nn


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
