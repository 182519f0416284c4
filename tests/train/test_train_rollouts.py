"""World models trained as in a rollout: their own predictions in place of true tokens."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltatok.shards import DeltaShards, PatchShards, UsageError
from deltatok.shards.files import sha256_file
from deltatok.train.data.order import RankSlice
from deltatok.train.dinoworld import DINOWorldObjective, train_dinoworld
from deltatok.train.engine.checkpoints import initialise
from deltatok.train.engine.logs import Meter
from deltatok.train.losses import smooth_l1
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.selection.selector import NamedWindows
from deltatok.train.world import DeltaWorldObjective, train_world

Make = Callable[..., Any]
CPU = torch.device("cpu")


def objective_of(config: Any, ranks: RankSlice | None = None) -> DeltaWorldObjective:
    model, _ = initialise(DeltaWorldNetwork, config.model, seed=config.seed, start_from=None)
    shards = DeltaShards(config.deltas)
    return DeltaWorldObjective(model, shards, config, ranks or RankSlice(), device=CPU)


def losses_of(objective: Any, step: int) -> torch.Tensor:
    batch, meter = objective.read(step), Meter("windows", CPU)
    losses: torch.Tensor
    losses, _ = objective.losses(objective.model, batch, slice(None), step=step, meter=meter)
    return losses


@pytest.mark.parametrize("use_bom", [True, False])
def test_contexts_are_rollouts_from_a_drawn_token_on(world_config: Make, use_bom: bool) -> None:
    objective = objective_of(world_config(model={"use_bom": use_bom}, rollout_probability=1.0))
    batch = objective.read(3)
    z, times = batch.tensors["tokens"].float(), batch.tensors["timestamps"]
    queries = None
    if use_bom:
        names: list[tuple[int | str, ...]] = [("noise", 3, int(n)) for n in batch.samples]
        windows = NamedWindows(z, times, names)
        queries = objective.selector.train(windows, step=3, checks=False)[0].queries
    context = objective._with_own(z, times, queries, numbers=batch.samples, step=3)
    found = set()
    for row in range(len(z)):
        same = [torch.equal(context[row, at], z[row, at]) for at in range(5)]
        first = same.index(False)
        found.add(first)
        assert same == [True] * first + [False] * (4 - first) + [True]  # the last is no context
        noise = None
        if queries is not None:
            noise = queries[row, first - 1 : 3, 0][:, None, None, None]
        own = objective.model.rollout(
            z[row : row + 1, :first],
            times[row : row + 1, :4],
            horizon=4 - first,
            num_samples=1,
            noise=noise,
        )
        torch.testing.assert_close(context[row, first:4], own[0, 0])
    assert found == {1, 2, 3}
    losses = losses_of(objective, 3)
    predicted = objective.model(context, times, queries)
    target = z[:, 1:] if queries is None else z[:, 1:, None]
    wanted = smooth_l1(predicted, target.expand_as(predicted)).flatten(1).mean(1)
    torch.testing.assert_close(losses, wanted)


def test_the_asked_share_of_windows_is_rolled_out_anew_every_step(world_config: Make) -> None:
    plain = objective_of(world_config())
    rolled = objective_of(world_config(rollout_probability=0.25))
    changed = torch.stack([losses_of(plain, step) != losses_of(rolled, step) for step in range(40)])
    assert 0.2 < changed.float().mean().item() < 0.3
    assert len({tuple(row.tolist()) for row in changed}) > 10


def test_ranks_roll_out_what_one_process_does(world_config: Make) -> None:
    config = world_config(rollout_probability=0.5)
    parts = [
        losses_of(objective_of(config, RankSlice(rank=rank, num_ranks=2)), 2) for rank in range(2)
    ]
    torch.testing.assert_close(torch.cat(parts), losses_of(objective_of(config), 2))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_weight_has_a_gradient_after_the_passes_without(
    world_config: Make, precision: str
) -> None:
    objective = objective_of(world_config(rollout_probability=1.0, precision=precision))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        losses_of(objective, 0).sum().backward()  # type: ignore[no-untyped-call]
    assert all(value.grad is not None for value in objective.model.parameters())


def test_dinoworld_is_rolled_out_too(dinoworld_config: Make) -> None:
    wide = {"initializer_range": 0.3}  # so that what a frame sees tells on what it predicts
    config = dinoworld_config(model=wide, rollout_probability=1.0)
    model, _ = initialise(DINOWorld, config.model, seed=0, start_from=None)
    shards = PatchShards(config.patches)
    plain, rolled = (
        DINOWorldObjective(model, shards, changed, RankSlice(), device=CPU)
        for changed in (dinoworld_config(model=wide), config)
    )
    assert not torch.isclose(losses_of(plain, 0), losses_of(rolled, 0), rtol=1e-4).any()
    train_dinoworld(dataclasses.replace(config, steps=2))


def test_run_resumed_in_the_middle_equals_uninterrupted(world_config: Make, tmp_path: Path) -> None:
    config = world_config(rollout_probability=0.5)
    whole = train_world(dataclasses.replace(config, out=str(tmp_path / "whole")))
    for steps in (1, 4, 6):
        train_world(dataclasses.replace(config, steps=steps))
    files = [folder / "model.safetensors" for folder in (Path(config.out), whole)]
    assert sha256_file(files[0]) == sha256_file(files[1])


def test_windows_of_two_frames_are_refused(
    world_config: Make, make_deltas: Make, tmp_path: Path
) -> None:
    short = make_deltas(tmp_path / "deltas", num_frames=2)
    with pytest.raises(UsageError, match=r"2 frames a window, wanted 3 .*rollout_probability abov"):
        train_world(world_config(deltas=str(short), rollout_probability=0.1))


def test_a_probability_beyond_one_is_refused(world_config: Make) -> None:
    with pytest.raises(UsageError, match=r"rollout_probability 1\.5: wanted a share between"):
        world_config(rollout_probability=1.5)
