"""World model training from delta-token caches: best-of-many, its noise, its validation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltatok.shards import CacheMismatch, DeltaShards, UsageError
from deltatok.train.data.batches import Batch
from deltatok.train.data.order import RankSlice
from deltatok.train.engine.checkpoints import initialise
from deltatok.train.engine.logs import Meter
from deltatok.train.engine.model_folder import read_provenance, read_tensors
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.selection import selector as selection
from deltatok.train.selection.search import Chunks, Winners
from deltatok.train.selection.selector import NamedWindows
from deltatok.train.world import DeltaWorldObjective, train_world

Make = Callable[..., Any]
CPU = torch.device("cpu")


def objective_of(config: Any, ranks: RankSlice | None = None) -> DeltaWorldObjective:
    model, _ = initialise(DeltaWorldNetwork, config.model, seed=config.seed, start_from=None)
    return DeltaWorldObjective(
        model, DeltaShards(config.deltas), config, ranks or RankSlice(), device=CPU
    )


def windows_of(batch: Batch, step: int) -> NamedWindows:
    names = [("noise", step, int(number)) for number in batch.samples]
    return NamedWindows(batch.tensors["tokens"].float(), batch.tensors["timestamps"], names)


def selected(objective: DeltaWorldObjective, step: int) -> Winners:
    """What a step's selection gives for the objective's batch."""
    batch = objective.read(step)
    return objective.selector.train(windows_of(batch, step), step=step, checks=False)[0]


@pytest.mark.parametrize("use_bom", [True, False])
def test_world_loss_falls_below_the_mean_tokens(
    world_config: Make, log_lines: Make, use_bom: bool
) -> None:
    config = world_config(
        model={"use_bom": use_bom},
        steps=150,
        lr=1e-2,
        warmup_steps=5,
        eval_every=150,
        save_every=150,
        weight_decay=0.0,
    )
    train_world(config)
    losses = [line["loss"] for line in log_lines(config.out, ["train"])]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])
    values = log_lines(config.out, ["validation"])[-1]
    assert values["validation_best_loss"] < values["validation_constant_loss"]
    assert values["validation_best_loss"] <= values["validation_mean_loss"]
    assert (values["validation_best_loss"] < values["validation_mean_loss"]) == use_bom


def test_selection_takes_the_lowest_loss_and_the_step_trains_it(world_config: Make) -> None:
    objective = objective_of(world_config())
    batch = objective.read(3)
    found = selected(objective, 3)
    losses, extras = objective.losses(
        objective.model, batch, slice(None), step=3, meter=Meter("windows", CPU)
    )
    assert torch.allclose(losses, found.best_losses.mean(1), rtol=1e-4)
    mean = found.mean_losses.mean().item()
    assert extras["mean_candidate_loss"].item() == pytest.approx(mean)
    assert losses.requires_grad
    assert found.queries.shape == (8, 4, 1, 16)


@pytest.mark.parametrize("chunks", [Chunks(3, 6), Chunks(1, 2), Chunks(8, 4)])
def test_chunks_change_no_choice(
    world_config: Make, chunks: Chunks, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = world_config()
    whole = selected(objective_of(config), 2)
    monkeypatch.setattr(selection, "default_chunks", lambda *_, **__: chunks)
    parts = selected(objective_of(config), 2)
    assert torch.equal(whole.queries, parts.queries)
    torch.testing.assert_close(whole.best_losses, parts.best_losses)
    torch.testing.assert_close(whole.mean_losses, parts.mean_losses)


def test_ranks_draw_the_noise_of_one_process(world_config: Make) -> None:
    config = world_config()
    whole = selected(objective_of(config), 2)
    parts = [selected(objective_of(config, RankSlice(rank=r, num_ranks=2)), 2) for r in range(2)]
    assert torch.equal(whole.queries, torch.cat([part.queries for part in parts]))


def test_noise_differs_between_steps_and_windows(world_config: Make) -> None:
    objective = objective_of(world_config())
    names: list[tuple[int | str, ...]] = [("noise", 0, 0), ("noise", 0, 1), ("noise", 1, 0)]
    windows = NamedWindows(torch.empty(3, 5, 8), torch.empty(3, 5), names)
    noise = objective.selector.noise(windows).chunk(torch.tensor(0), 6)
    assert noise.shape == (3, 4, 6, 16)
    assert noise.std().item() == pytest.approx(0.02, rel=0.1)
    assert len({tuple(drawn.flatten().tolist()) for drawn in noise}) == 3


def test_validation_noise_is_the_same_every_time(world_config: Make) -> None:
    objective = objective_of(world_config())
    with torch.no_grad():
        assert objective.evaluate() == objective.evaluate()


def test_world_folder_tells_its_story(world_config: Make, deltas: Path) -> None:
    config = world_config(steps=2)
    out = train_world(config)
    assert DeltaWorldNetwork.from_pretrained(out).config == config.model
    assert read_provenance(out)["deltas_fingerprint"] == DeltaShards(deltas).fingerprint


def test_log_tells_the_share_of_selection(world_config: Make) -> None:
    out = train_world(world_config(steps=2))
    line = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert 0 < line["selection_share"] < 1
    assert line["windows_per_s"] > 0


def test_no_validation_clips_no_evaluation(world_config: Make, log_lines: Make) -> None:
    out = train_world(world_config(steps=3, validation_fraction=0))
    assert log_lines(out, ["validation"]) == []


def test_patch_cache_is_refused(world_config: Make, patches: Path) -> None:
    with pytest.raises(CacheMismatch, match="is a deltatok-patches cache, wanted a deltatok-del"):
        train_world(world_config(deltas=str(patches)))


def test_fewer_windows_than_a_batch_are_refused(world_config: Make) -> None:
    with pytest.raises(UsageError, match="one batch takes 64"):
        train_world(world_config(batch_size=64))


def test_bfloat16_gradient_is_that_of_float32(
    world_config: Make, tmp_path: Path, log_lines: Make
) -> None:
    lines = []
    for precision in ("float32", "bfloat16"):
        out = train_world(world_config(precision=precision, out=str(tmp_path / precision)))
        lines.append(log_lines(out, ["train"])[0])
        tensors = read_tensors(out / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert lines[0]["gradient_norm"] == pytest.approx(lines[1]["gradient_norm"], rel=0.1)
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=0.02)
