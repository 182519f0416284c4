"""Which of many samples to show: those that differ most."""

import torch
from torch import Tensor


def most_different(samples: Tensor, count: int) -> list[int]:
    """Numbers of up to `count` of the samples (S, ...): first the one nearest to their mean, then
    each time the one farthest from all that were taken; equal samples are taken once."""
    if not len(samples) or count < 1:
        return []
    flat = samples.flatten(1).float()
    distance = (flat - flat.mean(dim=0)).square().sum(dim=1)
    taken = [int(distance.argmin())]
    nearest = (flat - flat[taken[0]]).square().sum(dim=1)
    while len(taken) < count and float(nearest.max()) > 0:
        taken.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (flat - flat[taken[-1]]).square().sum(dim=1))
    return taken
