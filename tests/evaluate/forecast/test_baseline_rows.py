"""Rows beside the world model's: DINO-world, the regressor null, the IoU of every class."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltatok.evaluate.forecast import rollout as baselines
from deltatok.evaluate.forecast.rollout import gaussian_like
from deltatok.evaluate.forecast.run import run_forecast
from deltatok.evaluate.forecast.scores import class_counts, class_ious
from deltatok.evaluate.report.rows import find_value
from deltatok.evaluate.report.write import Report
from deltatok.shards.errors import CacheMismatch, UsageError
from deltatok.shards.patches.reader import PatchShards
from deltatok.train.data.order import generator
from deltatok.train.models.configs import DINOWorldConfig
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.models.heads import DepthHead, DepthHeadConfig

STEPS = {"short": 1, "mid": 3}


def write_dinoworld(folder: Path, patches: Any, *, use_bom: bool) -> DINOWorld:
    config = DINOWorldConfig(
        hidden_size=32,
        predictor_hidden_size=32,
        predictor_num_hidden_layers=1,
        predictor_num_heads=2,
        rope_axis_sizes=(4, 4, 4),
        use_bom=use_bom,
        layer_scale_init=1.0,
        initializer_range=0.5,
    )
    world = DINOWorld(config, generator=torch.Generator().manual_seed(3)).eval()
    world.save_pretrained(folder, {"patches": patches})
    return world


def value(report: Report, horizon: str, row: str, metric: str = "feature_loss") -> float:
    found = find_value(report.rows, horizon=horizon, row=row, metric=metric)
    assert found is not None
    return found


def loss(prediction: torch.Tensor, truth: torch.Tensor) -> float:
    away = (prediction - truth).abs().double()
    return torch.where(away < 0.1, away**2 / 0.2, away - 0.05).mean().item()


@torch.no_grad()
def test_dinoworld_rows_equal_teacher_forcing_on_its_own_frames(
    shared_evaluation: Any, make: Any, tmp_path: Path
) -> None:
    """Each step once more as a teacher-forced prediction of what was forecast so far."""
    patches = make.identity("uniform", "aaaa")
    plain = write_dinoworld(tmp_path / "plain", patches, use_bom=False)
    bom = write_dinoworld(tmp_path / "bom", patches, use_bom=True)
    folders = (str(tmp_path / "plain"), str(tmp_path / "bom"))
    report = run_forecast(
        shared_evaluation.config(out=str(tmp_path / "out"), dinoworld=folders, world=None)
    )
    cache = PatchShards(shared_evaluation.path("patches"))

    def roll(world: DINOWorld, x: Any, times: Any, noise: Any) -> torch.Tensor:
        for step in range(len(times) - 4):
            count = len(x) + 1
            queries = None if noise is None else noise[step].expand(1, count - 1, -1)
            padded = torch.cat([x, x[-1:]])[None]
            made = world(padded, times[None, :count], queries, grid=cache.grid)
            x = torch.cat([x, made[0, -1:]])
        return x[-1]

    wanted: dict[str, list[float]] = {"dinoworld": [], "dinoworld_best": [], "dinoworld_mean": []}
    for index in range(len(cache)):
        x = torch.tensor(cache.tokens([index])[0])
        times = torch.tensor(cache.timestamps_s([index])[0])
        times = times - times[0]
        drawn = torch.randn(3, 6, 1, 32, generator=generator("forecast", 0, "mid", index)) * 0.5
        samples = [roll(bom, x[:4], times, drawn[:, s][:, None]) for s in range(6)]
        wanted["dinoworld"].append(loss(roll(plain, x[:4], times, None), x[6]))
        wanted["dinoworld_best"].append(min(loss(sample, x[6]) for sample in samples))
        wanted["dinoworld_mean"].append(loss(torch.stack(samples).mean(0), x[6]))
    for row, losses in wanted.items():
        assert value(report, "mid", row) == pytest.approx(np.mean(losses), rel=1e-4)
    assert report.provenance["dinoworld"]["checked"] is True
    assert report.provenance["dinoworld_best"]["checked"] is True


def test_two_dinoworlds_of_one_kind_are_refused(tiny: Any, make: Any) -> None:
    folder = tiny.root / "dino"
    write_dinoworld(folder, make.identity("uniform", "aaaa"), use_bom=True)
    with pytest.raises(UsageError, match=r"--dinoworld .*a second model with noise queries"):
        run_forecast(tiny.config(dinoworld=(str(folder), str(folder))))


def test_dinoworld_of_another_backbone_is_refused(tiny: Any, make: Any) -> None:
    write_dinoworld(tiny.root / "dino", make.identity("uniform", "bbbb"), use_bom=False)
    with pytest.raises(CacheMismatch, match=r"backbone\.weights_sha256.*dinoworld"):
        run_forecast(tiny.config(dinoworld=(tiny.path("dino"),)))


def test_the_null_has_the_covariance_of_the_samples() -> None:
    rng = torch.Generator().manual_seed(0)
    samples = torch.randn(1, 5, 2, 3, generator=rng) * torch.tensor([1.0, 2.0, 0.1])
    weights = torch.randn(1, 20_000, 5, generator=rng)
    drawn = gaussian_like(samples, weights)
    assert drawn.shape == (1, 20_000, 2, 3)
    wanted = torch.cov(samples[0].flatten(1).T)
    assert torch.allclose(torch.cov(drawn[0].flatten(1).T), wanted, atol=0.1)
    assert drawn.mean(dim=1).abs().max() < 0.1


def test_the_null_of_one_sample_is_the_regressor(shared_evaluation: Any, tmp_path: Path) -> None:
    report = run_forecast(shared_evaluation.config(out=str(tmp_path), num_samples=1))
    for horizon in STEPS:
        assert value(report, horizon, "regressor_null") == pytest.approx(
            value(report, horizon, "discriminative"), rel=1e-6
        )


def test_the_null_draws_afresh_for_every_seed_and_horizon(
    shared_evaluation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int | str, ...]] = []
    generator = baselines.generator

    def note(*name: int | str) -> torch.Generator:
        if name[0] == "regressor null":
            made.append(name)
        return generator(*name)

    monkeypatch.setattr(baselines, "generator", note)
    run_forecast(shared_evaluation.config(out=str(tmp_path), num_seeds=2, num_samples=2))
    assert len(made) == len(set(made)) == 2 * 2 * 5  # seeds, horizons, windows


def test_the_null_can_be_left_out(shared_evaluation: Any, tmp_path: Path) -> None:
    report = run_forecast(shared_evaluation.config(out=str(tmp_path), regressor_null=False))
    assert "regressor_null" not in {row.row for row in report.rows}
    without = shared_evaluation.config(out=str(tmp_path / "b"), discriminative=None)
    assert "regressor_null" not in {row.row for row in run_forecast(without).rows}


def test_class_ious_are_shared_over_union_and_none_where_nothing_is() -> None:
    confusion = torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    assert class_ious(*class_counts(confusion)) == [3 / 6, 4 / 7, None]


def test_per_class_iou_averages_to_miou_and_is_on_the_page(
    shared_evaluation: Any, tmp_path: Path
) -> None:
    config = shared_evaluation.config(out=str(tmp_path), class_names=("sky", "road"))
    report = run_forecast(config)
    stored = json.loads((tmp_path / "report.json").read_text())["per_class_iou"]
    assert stored == report.per_class_iou
    for entry in stored:
        occurring = [iou for iou in entry["iou"] if iou is not None]
        wanted = value(report, entry["horizon"], entry["row"], "miou")
        assert np.mean(occurring) == pytest.approx(wanted, rel=1e-5)
    page = (tmp_path / "report.html").read_text()
    assert "IoU % of each class" in page
    assert "<td>sky</td>" in page
    assert "<td>class 2</td>" in page


def test_a_world_model_is_no_head(tiny: Any) -> None:
    with pytest.raises(UsageError, match=r"--head .*holds a DeltaWorld, wanted a Segment.*Depth"):
        run_forecast(tiny.config(head=tiny.path("world")))


def test_a_depth_head_on_class_labels_is_refused(tiny: Any, make: Any) -> None:
    head = DepthHead(DepthHeadConfig(in_size=32))
    head.save_pretrained(tiny.root / "depth", {"patches": make.identity("uniform", "aaaa")})
    with pytest.raises(UsageError, match=r"a DepthHead, but the labels .* are classes"):
        run_forecast(tiny.config(head=tiny.path("depth")))
