"""DINO-world, the baseline, trains from patch shards like the others: both modes, resume, draws."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltatok.shards import PatchShards, Stopped, UsageError
from deltatok.shards.files import sha256_file
from deltatok.train.config import DINOWorldTrainConfig
from deltatok.train.data.order import RankSlice
from deltatok.train.dinoworld import DINOWorldObjective, train_dinoworld
from deltatok.train.engine import loop
from deltatok.train.engine.checkpoints import initialise
from deltatok.train.engine.logs import Meter
from deltatok.train.engine.model_folder import read_provenance
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.selection import selector as selection
from deltatok.train.selection.search import Chunks
from deltatok.train.selection.selector import NamedWindows

Make = Callable[..., Any]
CPU = torch.device("cpu")


def objective_of(
    config: DINOWorldTrainConfig, ranks: RankSlice | None = None
) -> DINOWorldObjective:
    model, _ = initialise(DINOWorld, config.model, seed=config.seed, start_from=None)
    shards = PatchShards(config.patches)
    return DINOWorldObjective(model, shards, config, ranks or RankSlice(), device=CPU)


def losses_of(objective: DINOWorldObjective) -> torch.Tensor:
    batch = objective.read(1)
    meter = Meter("windows", CPU)
    return objective.losses(objective.model, batch, slice(None), step=1, meter=meter)[0]


@pytest.mark.parametrize("use_bom", [True, False])
def test_dino_world_learns_what_carries_over_to_other_clips(
    dinoworld_config: Make, make_patches: Make, tmp_path: Path, log_lines: Make, use_bom: bool
) -> None:
    patches = make_patches(tmp_path / "patches", num_clips=40)
    config = dinoworld_config(
        patches=str(patches),
        model={"use_bom": use_bom, "predictor_hidden_size": 32, "predictor_num_heads": 2},
        steps=60,
        lr=1e-2,
        eval_every=5,
        save_every=60,
        weight_decay=0.0,
    )
    train_dinoworld(config)
    losses = [line["loss"] for line in log_lines(config.out, ["train"])]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    first, *_, values = log_lines(config.out, ["validation"])
    assert values["validation_best_loss"] < first["validation_best_loss"]
    assert values["validation_copy_last_loss"] == first["validation_copy_last_loss"] > 0
    assert (values["validation_best_loss"] < values["validation_mean_loss"]) == use_bom


@pytest.mark.parametrize("use_bom", [True, False])
def test_dino_world_resumed_at_every_step_equals_uninterrupted(
    dinoworld_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_lines: Make,
    use_bom: bool,
) -> None:
    config = dinoworld_config(model={"use_bom": use_bom}, steps=3)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train_dinoworld(whole)
    read = loop.Trainer._read_numbers
    for step in (1, 2):
        cut = dataclasses.replace(config, out=str(tmp_path / f"cut{step}"))
        left = [step]

        def stopping(
            self: loop.Trainer, *given: Any, left: list[int] = left, **known: Any
        ) -> loop.Update:
            left[0] -= 1
            return read(self, *given, **known)._replace(stopping=left[0] == 0)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Trainer, "_read_numbers", stopping)
            with pytest.raises(Stopped):
                train_dinoworld(cut)
        train_dinoworld(cut)
        files = [Path(run.out) / "model.safetensors" for run in (cut, whole)]
        assert sha256_file(files[0]) == sha256_file(files[1])
        assert log_lines(cut.out) == log_lines(whole.out)


def test_dino_world_folder_tells_its_story(dinoworld_config: Make, patches: Path) -> None:
    config = dinoworld_config(steps=2)
    out = train_dinoworld(config)
    assert DINOWorld.from_pretrained(out).config == config.model
    shards = PatchShards(patches)
    assert read_provenance(out) == {
        "patches": shards.info.identity,
        "patches_fingerprint": shards.fingerprint,
    }
    assert json.loads((out / "train.json").read_text())["command"] == "dinoworld"


@pytest.mark.parametrize("chunks", [Chunks(1, 4), Chunks(4, 1), Chunks(2, 3)])
def test_portions_of_windows_and_samples_change_no_choice(
    dinoworld_config: Make, chunks: Chunks, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dinoworld_config()
    whole = losses_of(objective_of(config))
    monkeypatch.setattr(selection, "default_chunks", lambda *_, **__: chunks)
    torch.testing.assert_close(losses_of(objective_of(config)), whole, atol=1e-6, rtol=1e-5)


def test_ranks_compute_the_windows_of_one_process(dinoworld_config: Make) -> None:
    config = dinoworld_config()
    objectives = [objective_of(config, RankSlice(rank=rank, num_ranks=2)) for rank in range(2)]
    parts = torch.cat([losses_of(objective) for objective in objectives])
    torch.testing.assert_close(parts, losses_of(objective_of(config)), atol=1e-6, rtol=1e-5)
    numbers = [number for objective in objectives for number in objective.read(1).samples]
    assert numbers == list(range(6))  # each draws noise of its own


def test_selection_takes_the_lowest_loss_and_the_step_trains_it(dinoworld_config: Make) -> None:
    objective = objective_of(dinoworld_config())
    batch = objective.read(1)
    names = [("noise", 1, int(number)) for number in batch.samples]
    x, times = batch.tensors["tokens"].float(), batch.tensors["timestamps"]
    found, _ = objective.selector.train(NamedWindows(x, times, names), step=1, checks=False)
    assert found.best_losses.shape == (6, 3)
    assert torch.all(found.best_losses < found.mean_losses)
    torch.testing.assert_close(losses_of(objective), found.best_losses.mean(1))


def test_dino_world_config_refuses_no_memory_for_selection() -> None:
    with pytest.raises(UsageError, match="selection_memory_mb 0"):
        DINOWorldTrainConfig(patches="p", out="o", selection_memory_mb=0)


def test_dino_world_selects_in_bfloat16_and_tells_its_regret(
    dinoworld_config: Make, log_lines: Make
) -> None:
    config = dinoworld_config(
        steps=2, selection_dtype="bfloat16", selection_finalists=2, num_samples_schedule=((0, 6),)
    )
    train_dinoworld(config)
    for line in log_lines(config.out, ["train"]):
        assert 0 <= line["selection_regret"] < 0.01
        assert 0.5 < line["selection_agreement"] <= 1


def test_dino_world_has_no_float8(dinoworld_config: Make) -> None:
    with pytest.raises(UsageError, match="float8: got DINO-world, wanted DeltaWorld"):
        objective_of(dinoworld_config(selection_dtype="float8"))


def test_a_discriminative_model_selects_nothing(dinoworld_config: Make, log_lines: Make) -> None:
    """So nothing of the selection's settings is looked at."""
    config = dinoworld_config(model={"use_bom": False}, steps=2, selection_dtype="float8")
    train_dinoworld(config)
    assert "selection_regret" not in log_lines(config.out, ["train"])[0]
