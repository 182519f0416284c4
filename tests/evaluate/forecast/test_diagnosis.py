"""The diagnosis of a report: each cause where it is true, none where all is well."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deltatok.evaluate.forecast.run import run_forecast
from deltatok.evaluate.report.write import Report
from deltatok.pipeline.commands.evaluate import main
from deltatok.shards.patches.reader import PatchShards
from deltatok.train.engine.model_folder import weights_sha256
from deltatok.train.losses import smooth_l1
from deltatok.train.models.configs import DeltaTokConfig, DeltaWorldConfig, DINOWorldConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.models.heads import SegmentationHead, SegmentationHeadConfig

SIGNS = np.array([1, -1, 1, -1, 1])
STEP = 0.5 * np.random.default_rng(3).normal(size=32)
"""What one frame adds to every token, times the sign of its window."""
TOKENIZER = DeltaTokConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
)


def drifting(signs: NDArray[Any]) -> NDArray[np.float64]:
    """Features (5, 7, 6, 32) that move by STEP a frame, forwards or backwards."""
    first = np.random.default_rng(4).normal(size=(5, 1, 6, 32))
    times = np.arange(7)[None, :, None, None]
    return first + signs[:, None, None, None] * times * STEP


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make: SimpleNamespace) -> Path:
    """A cache of drifting features, with a tokenizer and a world model that have learned them."""
    root = tmp_path_factory.mktemp("diagnosis")
    patches = make.identity("uniform", "aaaa")
    make.write_cache(root / "patches", policy="uniform", backbone="aaaa", tokens=drifting(SIGNS))
    tokenizer = train_tokenizer(PatchShards(root / "patches"))
    tokenizer.save_pretrained(root / "tokenizer", {"patches": patches})
    train_world(PatchShards(root / "patches"), tokenizer, steps=20).save_pretrained(
        root / "world", provenance(tokenizer, patches)
    )
    return root


def train_tokenizer(cache: PatchShards) -> DeltaTok:
    config = dataclasses.replace(TOKENIZER, layer_scale_init=0.5, initializer_range=0.1)
    tokenizer = DeltaTok(config, generator=torch.Generator().manual_seed(0))
    x = torch.tensor(cache.tokens(range(len(cache)))).float()
    before, after = x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)
    fit(tokenizer, 60, lambda: smooth_l1(tokenizer(before, after, grid=cache.grid), after).mean())
    return tokenizer


def train_world(cache: PatchShards, tokenizer: DeltaTok, *, steps: int) -> DeltaWorldNetwork:
    generator = torch.Generator().manual_seed(1)
    config = DeltaWorldConfig(
        hidden_size=32,
        predictor_hidden_size=24,
        predictor_num_hidden_layers=1,
        predictor_num_heads=2,
        rope_axis_sizes=(8,),
        layer_scale_init=1.0,
        initializer_range=0.1,
    )
    world = DeltaWorldNetwork(config, generator=generator)
    x = torch.tensor(cache.tokens(range(len(cache)))).float()
    times = torch.tensor(cache.timestamps_s(range(len(cache))))
    black = torch.tensor(cache.black)
    with torch.no_grad():  # contexts of both horizons begin with black -> their first frame
        clips = [
            (tokenizer.encode_sequence(x[:, start:], black, grid=cache.grid), times[:, start:])
            for start in (0, 2)
        ]

    def loss() -> torch.Tensor:
        losses = []
        for z, t in clips:
            queries = 0.1 * torch.randn(*z[:, 1:, 0].shape, 24, generator=generator)
            losses.append(smooth_l1(world(z, t - t[:, :1], queries), z[:, 1:]).mean())
        return torch.stack(losses).sum()

    fit(world, steps, loss)
    return world


def fit(model: torch.nn.Module, steps: int, loss: Any) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    model.eval()


def provenance(tokenizer: DeltaTok, patches: Any) -> dict[str, Any]:
    made_by = {"config": {}, "weights_sha256": weights_sha256(tokenizer)}
    return {"deltas": {"patches": patches, "tokenizer": made_by}}


def evaluate(tiny: Any, root: Path, out: Path, **changes: Any) -> Report:
    folders = {name: str(root / name) for name in ("patches", "tokenizer", "world")}
    settings = {"discriminative": None, "head": None, "labels": None, "out": str(out)}
    return run_forecast(tiny.config(**folders | settings | changes))


def test_nothing_is_wrong_where_forecasts_are_good(
    shared_evaluation: Any, world: Path, tmp_path: Path
) -> None:
    report = evaluate(shared_evaluation, world, tmp_path)
    assert report.diagnosis == []
    assert json.loads((tmp_path / "report.json").read_text())["diagnosis"] == []


def test_an_untrained_tokenizer_is_named_with_its_ratios_before_the_table(
    shared_evaluation: Any, make: Any, world: Path, tmp_path: Path, capsys: Any
) -> None:
    """As README's first look: the world model's forecasts are bad too, and not to blame."""
    fresh = DeltaTok(TOKENIZER, generator=torch.Generator().manual_seed(0))
    patches = make.identity("uniform", "aaaa")
    fresh.save_pretrained(tmp_path / "fresh", {"patches": patches})
    (tmp_path / "fresh" / "train.json").write_text(json.dumps({"config": {"steps": 30}}))
    model = DeltaWorldNetwork.from_pretrained(world / "world")
    model.save_pretrained(tmp_path / "world", provenance(fresh, patches))
    words = ["--patches", world / "patches", "--tokenizer", tmp_path / "fresh"]
    words += ["--world", tmp_path / "world", "--out", tmp_path / "out", "--num-pictures", 0]
    assert main(["forecast", *map(str, words), "--num-samples", "6", "--device", "cpu"]) == 0
    (fault,) = json.loads((tmp_path / "out" / "report.json").read_text())["diagnosis"]
    assert "no better than copying" in fault["cause"]
    assert fault["measured"]["copy_last_ratio"] == pytest.approx(1, abs=1e-3)
    assert fault["measured"]["z_swap_ratio"] == pytest.approx(1, abs=1e-3)
    assert fault["measured"]["steps"] == 30
    assert "--steps" in fault["next_step"] and "layer_scale_init" in fault["next_step"]
    said = capsys.readouterr().out
    assert said.index(fault["cause"]) < said.index("| row |") < said.index("expected order: ")
    assert said.splitlines()[-1] == f"report: {(tmp_path / 'out' / 'report.html').as_uri()}"


def test_a_tokenizer_that_uses_its_token_badly_is_untrained_not_stuck(
    shared_evaluation: Any, make: Any, world: Path, tmp_path: Path
) -> None:
    spoilt = DeltaTok.from_pretrained(world / "tokenizer")
    with torch.no_grad():
        spoilt.decoder_blocks[0].layer_scale2.lambda1.mul_(-30)
    spoilt.save_pretrained(tmp_path / "spoilt", {"patches": make.identity("uniform", "aaaa")})
    report = evaluate(
        shared_evaluation, world, tmp_path, tokenizer=str(tmp_path / "spoilt"), world=None
    )
    (fault,) = report.diagnosis
    assert fault["cause"].endswith("it is untrained.")
    assert fault["measured"]["copy_last_ratio"] > 1


def test_a_decoder_that_ignores_its_token_is_named(
    shared_evaluation: Any, make: Any, tmp_path: Path
) -> None:
    """All windows drift the same way: a decoder that adds the drift is good without any token."""
    drift = drifting(np.ones(5))
    make.write_cache(tmp_path / "patches", policy="uniform", backbone="aaaa", tokens=drift)
    tokenizer = DeltaTok(TOKENIZER, generator=torch.Generator().manual_seed(0))
    block = tokenizer.decoder_blocks[0]
    with torch.no_grad():
        block.mlp.down_proj.weight.zero_()
        block.mlp.down_proj.bias.copy_(torch.tensor(STEP) / TOKENIZER.layer_scale_init)
    tokenizer.save_pretrained(tmp_path / "tokenizer", {"patches": make.identity("uniform", "aaaa")})
    (fault,) = evaluate(shared_evaluation, tmp_path, tmp_path / "out", world=None).diagnosis
    assert "ignores its delta token" in fault["cause"]
    assert fault["measured"]["copy_last_ratio"] < 0.1
    assert fault["measured"]["z_swap_ratio"] == pytest.approx(1, abs=0.05)
    assert "layer_scale_init=0.1" in fault["next_step"]


def test_frames_that_do_not_move_are_named(
    shared_evaluation: Any, make: Any, world: Path, tmp_path: Path
) -> None:
    still = drifting(np.zeros(5))
    make.write_cache(tmp_path / "patches", policy="uniform", backbone="aaaa", tokens=still)
    report = evaluate(shared_evaluation, world, tmp_path, patches=str(tmp_path / "patches"))
    assert [fault["cause"][:13] for fault in report.diagnosis] == ["Nothing moves"]


def test_an_untrained_world_model_is_named_where_the_tokenizer_is_good(
    shared_evaluation: Any, make: Any, world: Path, tmp_path: Path
) -> None:
    """A DINO-world, whose forecasts do not begin as copies."""
    config = DINOWorldConfig(
        hidden_size=32,
        predictor_hidden_size=32,
        predictor_num_hidden_layers=1,
        predictor_num_heads=2,
        rope_axis_sizes=(4, 4, 4),
        use_bom=True,
    )
    fresh = DINOWorld(config, generator=torch.Generator().manual_seed(3))
    fresh.save_pretrained(tmp_path / "world", {"patches": make.identity("uniform", "aaaa")})
    report = evaluate(shared_evaluation, world, tmp_path, world=str(tmp_path / "world"))
    (fault,) = report.diagnosis
    assert "best sample is no better than copying" in fault["cause"]
    assert fault["measured"]["best_over_copy_last"] >= 1


def test_samples_that_are_all_alike_are_named_unless_asked_for(
    shared_evaluation: Any, world: Path, tmp_path: Path
) -> None:
    cache, tokenizer = PatchShards(world / "patches"), DeltaTok.from_pretrained(world / "tokenizer")
    model = train_world(cache, tokenizer, steps=0)
    model.config = dataclasses.replace(model.config, initializer_range=1e-9)  # its noise
    model.save_pretrained(tmp_path / "world", provenance(tokenizer, cache.info.identity))
    folder = str(tmp_path / "world")
    (fault,) = evaluate(shared_evaluation, world, tmp_path / "a", world=folder).diagnosis
    assert "ignores its noise" in fault["cause"]
    assert fault["measured"]["sample_spread"] < 0.01
    silent = evaluate(shared_evaluation, world, tmp_path / "b", world=folder, noise_scale=0.0)
    assert silent.diagnosis == []


def test_a_head_that_reads_nothing_is_named(
    shared_evaluation: Any, make: Any, world: Path, tmp_path: Path
) -> None:
    config = SegmentationHeadConfig(in_size=32, num_classes=4)
    head = SegmentationHead(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.head.weight.zero_()  # one class everywhere
    head.save_pretrained(tmp_path / "head", {"patches": make.identity("uniform", "aaaa")})
    labels = shared_evaluation.path("labels")
    report = evaluate(
        shared_evaluation, world, tmp_path, head=str(tmp_path / "head"), labels=labels
    )
    (fault,) = report.diagnosis
    assert fault["cause"].startswith("The head reads no more")
    assert fault["measured"]["present_miou"] == fault["measured"]["copy_last_miou"]
