"""The noise of best-of-many candidates: a pure function of (key of the window, position, sample).

Nothing is stored: any chunk of candidates, or one winner by its index, is drawn again from its
numbers alone, so neither ranks, portions nor chunks change it.

A candidate's channels are a SplitMix64 stream (Steele, Lea, Flood 2014) that starts at a hash of
key, position and sample; 48 bits of each 64-bit output make two normals (Box-Muller). The integers
are the same bit for bit on every device; logarithm, cosine and sine differ by float32 rounding.

Letters: B windows, P target positions, S samples, Dp channels of a query.
"""

import math
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the bits of a 64-bit constant."""
    return value - (1 << 64) if value >> 63 else value


GAMMA = _signed(0x9E3779B97F4A7C15)
FIRST = _signed(0xBF58476D1CE4E5B9)
SECOND = _signed(0x94D049BB133111EB)
"""SplitMix64's increment and the multipliers of its finalizer."""
STEPS = 1 << 24
"""Steps of a uniform number: what float32 holds exactly. The largest normal is thus 5.9."""


class Noise(Protocol):
    """Where candidates come from."""

    def windows(self, part: slice) -> Self:
        """The noise of some of the windows."""

    def chunk(self, first: Tensor, count: int) -> Tensor:
        """Queries (B, P, count, Dp) of samples first, first + 1, ...; first: int64 () on the
        device, so that a compiled or captured caller need not know it."""

    def at(self, indices: Tensor) -> Tensor:
        """Queries (B, P, s, Dp) of some samples of each position, by int64 (B, P, s)."""


class CounterNoise(NamedTuple):
    """Normal noise times `std`, float32, of any number of samples."""

    keys: Tensor
    """int64 (B,): one 63-bit number a window (order.seed_for), on the device that draws."""
    positions: int
    channels: int
    std: float

    def windows(self, part: slice) -> Self:
        return self._replace(keys=self.keys[part])

    def chunk(self, first: Tensor, count: int) -> Tensor:
        samples = first + torch.arange(count, device=self.keys.device)
        return self.at(samples.expand(len(self.keys), self.positions, count))

    def at(self, indices: Tensor) -> Tensor:
        device = self.keys.device
        position = torch.arange(self.positions, device=device)[:, None] << 32
        start = _mix(_mix((indices + position) * GAMMA) ^ self.keys[:, None, None])
        step = torch.arange(1, (self.channels + 1) // 2 + 1, device=device) * GAMMA
        bits = _mix(start[..., None] + step)
        # In place where it can be: a third of the time goes into making room for copies.
        uniform = (bits >> 40).bitwise_and_(STEPS - 1).float().add_(0.5).mul_(1 / STEPS)  # (0, 1]
        radius = uniform.log_().mul_(-2 * self.std**2).sqrt_()
        angle = bits.bitwise_and_(STEPS - 1).float().mul_(2 * math.pi / STEPS)
        drawn = torch.cat([angle.cos().mul_(radius), angle.sin().mul_(radius)], dim=-1)
        return drawn[..., : self.channels]


class GivenNoise(NamedTuple):
    """Noise that is already there."""

    queries: Tensor
    """(B, P, S, Dp), scaled."""

    def windows(self, part: slice) -> Self:
        return self._replace(queries=self.queries[part])

    def chunk(self, first: Tensor, count: int) -> Tensor:
        samples = first + torch.arange(count, device=self.queries.device)
        # What fills up the last chunk is never looked at.
        return self.queries.index_select(2, samples.clamp(max=self.queries.shape[2] - 1))

    def at(self, indices: Tensor) -> Tensor:
        index = indices[..., None].expand(-1, -1, -1, self.queries.shape[3])
        return self.queries.gather(2, index)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer of int64, whose products wrap and whose shifts bring in zeros."""
    x = (x ^ _shifted(x, 30)).mul_(FIRST)
    x.bitwise_xor_(_shifted(x, 27)).mul_(SECOND)
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
