"""The three losses: their formulas, their range, their dtype."""

import pytest
import torch

from deltatok.train.losses import log_cosh, mse, smooth_l1

DIFFERENCES = torch.linspace(-8, 8, 161, dtype=torch.float64)


def test_log_cosh_is_the_logarithm_of_the_hyperbolic_cosine():
    got = log_cosh(DIFFERENCES, torch.zeros_like(DIFFERENCES)).double()
    torch.testing.assert_close(got, DIFFERENCES.cosh().log(), atol=1e-6, rtol=1e-6)


def test_log_cosh_of_a_huge_difference_is_finite():
    got = log_cosh(torch.tensor([-1e4, 1e4]), torch.zeros(2))
    torch.testing.assert_close(got, torch.full((2,), 1e4 - 0.6931472))


def test_smooth_l1_is_quadratic_below_beta_and_linear_above():
    got = smooth_l1(torch.tensor([0.05, 0.1, 1.0]), torch.zeros(3), beta=0.1)
    torch.testing.assert_close(got, torch.tensor([0.0125, 0.05, 0.95]))


def test_mse_is_the_square():
    assert mse(torch.tensor([3.0]), torch.tensor([1.0])).tolist() == [4.0]


@pytest.mark.parametrize("loss", [mse, log_cosh, smooth_l1])
def test_losses_are_float32_even_of_bfloat16(loss):
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(torch.ones(2, dtype=torch.bfloat16), torch.zeros(2))
    assert got.dtype == torch.float32
