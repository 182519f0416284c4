"""The forecast's own probes, against cases that can be worked out by hand."""

from itertools import combinations

import numpy as np
import pytest
import torch

from deltatok.evaluate.forecast.config import ForecastConfig
from deltatok.evaluate.forecast.rollout import HorizonForecast, WindowBatch
from deltatok.evaluate.forecast.scores import (
    Scorer,
    best_of_k,
    mean_square_motion,
    mean_square_spread,
    spread_ratio,
)


def test_best_of_k_is_the_mean_over_all_choices_of_k_samples() -> None:
    losses = np.random.default_rng(0).uniform(size=(3, 5))
    wanted = [
        np.mean([losses[:, choice].min(axis=1) for choice in combinations(range(5), k)])
        for k in range(1, 6)
    ]
    assert best_of_k(losses) == pytest.approx(wanted)


def test_best_of_one_sample_is_its_loss() -> None:
    assert best_of_k(np.array([[2.0], [4.0]])).tolist() == [3.0]


def test_equal_samples_have_no_spread() -> None:
    samples = torch.ones(2, 4, 3, 5)
    assert mean_square_spread(samples).tolist() == [0.0, 0.0]


def test_spread_is_measured_in_units_of_the_motion() -> None:
    """Samples at +-2 around their mean, a truth that moved by 4: ratio one half."""
    samples = torch.tensor([2.0, -2.0])[None, :, None, None].expand(1, 2, 3, 5)
    spread = mean_square_spread(samples).tolist()
    motion = mean_square_motion(torch.full((1, 3, 5), 4.0), torch.zeros(1, 3, 5)).tolist()
    assert spread_ratio(spread, motion) == pytest.approx(0.5)


def test_spread_has_no_unit_where_nothing_moves() -> None:
    assert spread_ratio([1.0], [0.0]) is None


def test_spread_of_a_report_is_held_against_the_motion_up_to_the_target() -> None:
    config = ForecastConfig(patches="", tokenizer="", out="")
    scorer = Scorer(config, head=None, grid=(1, 1), keys=["clip"])
    x = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 4.0]).reshape(1, 7, 1, 1)  # moves by 4
    batch = WindowBatch(indices=(0,), names=((0,),), x=x, times=torch.zeros(1, 7), z=x[..., 0])
    scorer.add_tokens(batch)
    samples = torch.tensor([[9.0, 9.0, 3.0], [0.0, 0.0, 5.0]]).reshape(1, 2, 3, 1, 1)  # 1 from mean
    forecast = HorizonForecast(
        truth=x[:, 4:],
        rows={"copy_last": x[:, 3:4].expand(1, 3, 1, 1)},
        samples=samples,
    )
    scorer.add("mid", forecast, batch)
    assert scorer.probes()["sample_spread"] == {"mid": pytest.approx(1 / 4)}
