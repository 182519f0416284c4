"""Rotary positions: of patches on a grid (tokenizer), and of seconds, x, y (predictor).

Both are tables of cosines and sines in float32, made where they are used: they hold no state, so
any grid and any times work.

Letters: B batch, A heads, L tokens, E channels of a head, N patches = h * w.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rope(NamedTuple):
    """Cosines and sines, float32 (L, E), of every channel of a head (2-D patch positions)."""

    cos: Tensor
    sin: Tensor


class AxisRope(NamedTuple):
    """Cosines and sines of the position axes: one float32 (B, 1, L, size / 2) each."""

    cos: tuple[Tensor, ...]
    sin: tuple[Tensor, ...]


def patch_rope(
    grid: tuple[int, int],
    *,
    head_dim: int,
    theta: float,
    rescale: Tensor | float | None = None,
    device: torch.device | None = None,
) -> Rope:
    """The DINOv3 positions of an (h, w) patch grid, row-major: tables (h * w, head_dim).

    Patch centres lie in (-1, 1) on both axes; the angle is 2 pi * coordinate * theta^(-4 i / E),
    first for y, then for x, then both repeated. rescale multiplies all coordinates (augmentation).
    """
    height, width = grid
    y = torch.arange(0.5, height, dtype=torch.float32, device=device) / height
    x = torch.arange(0.5, width, dtype=torch.float32, device=device) / width
    coordinates = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1) * 2 - 1
    if rescale is not None:
        coordinates = coordinates * rescale
    # The exponents are rounded once, from float64: the same on every device.
    exponents = torch.arange(head_dim // 4, dtype=torch.float64, device=device) * (4 / head_dim)
    frequencies = 1 / theta ** exponents.to(torch.float32)
    angles = (2 * math.pi * coordinates[:, :, None] * frequencies).flatten(1).tile(2)
    return Rope(angles.cos(), angles.sin())


def with_prefix(rope: Rope, *, num_frames: int = 1) -> Rope:
    """The table of a sequence [one token without position, num_frames frames with the same grid].

    (1 + num_frames * N, E). The prefix row is angle zero, which leaves a token exactly as it is.
    """
    still = torch.zeros_like(rope.cos[:1])
    return Rope(
        torch.cat([still + 1] + [rope.cos] * num_frames),
        torch.cat([still] + [rope.sin] * num_frames),
    )


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x (B, A, L, E) rotated: channel i and i + E/2 are the two components of one plane."""
    first, second = x.chunk(2, dim=-1)
    return x * rope.cos + torch.cat([-second, first], dim=-1) * rope.sin


def axis_rope(positions: Tensor, axis_sizes: tuple[int, ...]) -> AxisRope:
    """The predictor's positions: float (B, L, axes) in seconds (and x, y in [-1, 1]) -> tables.

    An axis of `size` channels has size / 2 frequencies 10^2 .. 10^-2, log-spaced, both ends
    included; the angle is 2 pi * position * frequency.
    """
    positions = positions if positions.dtype == torch.float64 else positions.float()
    cos, sin = [], []
    for axis, size in enumerate(axis_sizes):
        exponents = torch.linspace(-2, 2, size // 2, dtype=positions.dtype, device=positions.device)
        frequencies = 1 / 10**exponents
        angles = 2 * math.pi * positions[:, None, :, axis, None] * frequencies
        cos.append(angles.cos())
        sin.append(angles.sin())
    return AxisRope(tuple(cos), tuple(sin))


def rotate_axes(x: Tensor, rope: AxisRope) -> Tensor:
    """x (B, A, L, E) rotated axis by axis; the channels after the last axis stay as they are.

    In the block of one axis, channel i and i + size/2 are the two components of one plane.
    """
    parts = []
    start = 0
    for cos, sin in zip(rope.cos, rope.sin, strict=True):
        half = cos.shape[-1]
        first = x[..., start : start + half]
        second = x[..., start + half : start + 2 * half]
        parts += [first * cos - second * sin, second * cos + first * sin]
        start += 2 * half
    parts.append(x[..., start:].to(parts[0].dtype))
    return torch.cat(parts, dim=-1)
