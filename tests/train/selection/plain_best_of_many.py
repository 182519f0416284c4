"""Best-of-many in its obvious form: what every engineered variant must equal.

Every query is rotated, keys and values are those of the model, a dense mask over all queries says
what each may see, and all losses of all candidates are kept.
"""

import torch
from torch import Tensor

from deltatok.train.losses import smooth_l1
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.dinoworld import DINOWorld


def plain_select(
    world: DeltaWorldNetwork, z: Tensor, timestamps: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Indices int64 (B, P) of the best samples and all losses float32 (B, P, S), all at once.

    z (B, T, D), timestamps (B, T) seconds, noise (B, P, S, Dp), already scaled.
    """
    predicted = world.candidates(world.memory(z, timestamps), timestamps, noise)
    losses = smooth_l1(predicted, z[:, 1:, None].expand_as(predicted)).mean(dim=3)
    return losses.argmin(dim=2), losses


@torch.no_grad()
def plain_select_one_by_one(
    world: DeltaWorldNetwork, z: Tensor, timestamps: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The same by one teacher-forced pass, the training step's own, a sample."""
    losses = []
    for sample in range(noise.shape[2]):
        prediction = world(z, timestamps, noise[:, :, sample])
        losses.append(smooth_l1(prediction, z[:, 1:]).mean(dim=2))
    stacked = torch.stack(losses, dim=2)
    return stacked.argmin(dim=2), stacked


@torch.no_grad()
def plain_select_patches(
    world: DINOWorld, x: Tensor, timestamps: Tensor, noise: Tensor, *, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The same for DINO-world, x (B, T, N, D): one teacher-forced pass a sample."""
    losses = []
    for sample in range(noise.shape[2]):
        prediction = world(x, timestamps, noise[:, :, sample], grid=grid)
        losses.append(smooth_l1(prediction, x[:, 1:]).mean(dim=(2, 3)))
    stacked = torch.stack(losses, dim=2)
    return stacked.argmin(dim=2), stacked
