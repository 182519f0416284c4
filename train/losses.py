"""The three losses, in float32 whatever the predictions' dtype.

Each gives the elementwise loss unless reduced: mean over the dimensions that a caller names.
"""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

SMOOTH_L1_BETA = 0.1  # paper: best-of-many and the world models' training


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Elementwise d^2, d = prediction - target: the paper's tokenizer loss."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none")


def log_cosh(prediction: Tensor, target: Tensor) -> Tensor:
    """Elementwise log(cosh(d)), d = prediction - target: the released tokenizer loss.

    Written as d + softplus(-2 d) - log 2, which no difference overflows.
    """
    difference = prediction.float() - target.float()
    return difference + F.softplus(-2 * difference) - math.log(2)


def smooth_l1(prediction: Tensor, target: Tensor, *, beta: float = SMOOTH_L1_BETA) -> Tensor:
    """Elementwise d^2 / (2 beta) below beta, |d| - beta / 2 above: the world models' loss."""
    return F.smooth_l1_loss(prediction.float(), target.float(), reduction="none", beta=beta)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "log_cosh": log_cosh}
"""The tokenizer's, by the names that its config takes."""
