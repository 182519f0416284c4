"""Candidates' noise: a pure function of its numbers, and as normal as noise should be."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltatok.train.data.order import seed_for
from deltatok.train.selection.noise import CounterNoise, GivenNoise, _mix

KEYS = torch.tensor([seed_for("test", number) for number in range(3)])
NOISE = CounterNoise(keys=KEYS, positions=4, channels=10, std=0.02)


def at(number: int) -> Tensor:
    return torch.tensor(number)


def test_the_integers_are_splitmix64():
    """Against numpy's unsigned arithmetic, where products wrap and shifts bring in zeros by
    definition."""
    given_bits = torch.randint(-(2**63), 2**63 - 1, (1000,), generator=torch.Generator())
    x = given_bits.numpy().view(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    assert np.array_equal(_mix(given_bits).numpy().view(np.uint64), x)


def test_splitmix64_is_the_published_one():
    """First outputs for seed 1234567, from the reference implementation."""
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + gamma * step) % 2**64 for step in (1, 2, 3)]
    signed = torch.tensor([state - 2**64 if state >> 63 else state for state in states])
    outputs = [number % 2**64 for number in _mix(signed).tolist()]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 2000), count=st.integers(1, 40), window=st.integers(0, 2))
def test_chunks_windows_and_single_samples_are_parts_of_the_same_noise(first, count, window):
    whole = NOISE.chunk(at(0), first + count)
    chunk = NOISE.chunk(at(first), count)
    assert torch.equal(chunk, whole[:, :, first:])
    one = NOISE.windows(slice(window, window + 1)).chunk(at(first), count)
    assert torch.equal(one, chunk[window : window + 1])
    some = torch.tensor([first + count - 1, first]).expand(3, 4, 2)
    assert torch.equal(NOISE.at(some), chunk[:, :, [-1, 0]])


@pytest.mark.parametrize("sample", [100, 85186])  # this one has a uniform number of only 1e-5
def test_the_noise_is_what_it_was(sample):
    """Written out again in Python's own numbers: a run that goes on with a later version must draw
    what it would have drawn."""
    word, gamma = 2**64, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % word
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % word
        return x ^ (x >> 31)

    window, position = 1, 2
    start = mix(mix((sample + (position << 32)) * gamma % word) ^ KEYS[window].item())
    cosines, sines = [], []
    for step in range(1, 6):
        bits = mix((start + step * gamma) % word)
        radius = 0.02 * math.sqrt(-2 * math.log(((bits >> 40) + 0.5) / 2**24))
        angle = 2 * math.pi * (bits % 2**24) / 2**24
        cosines.append(radius * math.cos(angle))
        sines.append(radius * math.sin(angle))
    drawn = NOISE.chunk(at(sample), 1)[window, position, 0]
    torch.testing.assert_close(drawn, torch.tensor(cosines + sines), atol=1e-8, rtol=1e-5)


def test_windows_positions_samples_and_channels_differ():
    drawn = NOISE.chunk(at(0), 50)
    assert drawn.shape == (3, 4, 50, 10)
    assert len(set(drawn.flatten().tolist())) > 0.999 * drawn.numel()


def test_position_and_sample_are_not_confused():
    """Also where samples are many: position p + 1 does not continue position p."""
    late = NOISE.chunk(at(2**31), 3)
    assert not torch.equal(late[:, 0], NOISE.chunk(at(0), 3)[:, 1])
    assert torch.isfinite(late).all()


def test_an_odd_number_of_channels_is_drawn():
    odd = CounterNoise(keys=KEYS, positions=2, channels=7, std=1.0).chunk(at(0), 2000)
    assert odd.shape == (3, 2, 2000, 7)
    assert odd[..., -1].std().item() == pytest.approx(1, abs=0.03)


def test_noise_is_normal():
    """3.1 million numbers: moments, tails and extremes within 5 standard errors."""
    x = CounterNoise(keys=KEYS, positions=7, channels=768, std=0.02).chunk(at(0), 193).double()
    x = x.flatten() / 0.02
    count = x.numel()
    assert abs(x.mean().item()) < 5 / math.sqrt(count)
    assert abs(x.var().item() - 1) < 5 * math.sqrt(2 / count)
    assert abs((x**3).mean().item()) < 5 * math.sqrt(15 / count)
    assert abs((x**4).mean().item() - 3) < 5 * math.sqrt(96 / count)
    for limit in (0.5, 1.0, 2.0, 3.0, 4.0):
        beyond = math.erfc(limit / math.sqrt(2))
        error = 5 * math.sqrt(beyond / count)
        assert abs((x.abs() > limit).double().mean().item() - beyond) < error, limit
    assert 4.5 < x.abs().max().item() < 5.9


@pytest.mark.parametrize("axis", ["windows", "positions", "samples", "channels", "halves"])
def test_neighbours_are_not_correlated(axis):
    keys = torch.arange(64)  # neighbours as keys, too
    x = CounterNoise(keys=keys, positions=8, channels=64, std=1.0).chunk(at(0), 64).double()
    one, other = {
        "windows": (x[1:], x[:-1]),
        "positions": (x[:, 1:], x[:, :-1]),
        "samples": (x[:, :, 1:], x[:, :, :-1]),
        "channels": (x[..., 1:], x[..., :-1]),
        "halves": (x[..., :32], x[..., 32:]),  # cosine and sine of one angle
    }[axis]
    for power in (1, 2):
        a, b = one**power, other**power
        product = ((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std())
        assert abs(product.item()) < 5 / math.sqrt(one.numel())


def test_given_noise_is_given_back():
    queries = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    noise = GivenNoise(queries)
    assert torch.equal(noise.chunk(at(1), 3), queries[:, :, 1:4])
    assert torch.equal(noise.windows(slice(1, 2)).chunk(at(0), 5), queries[1:])
    assert torch.equal(noise.at(torch.full((2, 3, 1), 4)), queries[:, :, 4:])
