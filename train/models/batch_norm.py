"""BatchNorm whose statistics, while it trains, are those of the batches of all ranks.

torch's SyncBatchNorm does this on CUDA only. On one rank, and in eval mode, this is nn.BatchNorm2d
itself, bit for bit; parameters and buffers are its own.

Letters: B batch of one rank, C channels, h, w patches of a frame.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn


class _SumOverRanks(torch.autograd.Function):
    """Its gradient is the sum of every rank's, since every rank's loss depends on the sum."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(x: Tensor) -> Tensor:
    total = x.detach().clone()
    distributed.all_reduce(total)
    return total


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's tensor, with gradient."""
    total: Tensor = _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return total


class RankBatchNorm2d(nn.BatchNorm2d):
    """Feature maps (B, C, h, w) -> the same normed. B is the same on every rank."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        has_ranks = distributed.is_available() and distributed.is_initialized()
        num_ranks = distributed.get_world_size() if has_ranks else 1
        if not self.training or num_ranks == 1:
            return super().forward(x)
        over_ranks = torch.compiler.disable(self._over_ranks)  # type: ignore[no-untyped-call]
        out: Tensor = over_ranks(x.float(), num_ranks).to(x.dtype)
        return out

    def _over_ranks(self, x: Tensor, num_ranks: int) -> Tensor:
        count = num_ranks * x.numel() // x.shape[1]
        mean = sum_over_ranks(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = sum_over_ranks(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():  # as torch does: the running variance is the unbiased one
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]
