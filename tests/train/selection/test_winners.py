"""Several winners of best-of-many share the gradient: against autograd over all candidates, exactly
resumed, refused where there are fewer candidates; one winner is what it was."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatok.pipeline.commands.train import COMMANDS
from deltatok.shards import DeltaShards, DeltatokError, PatchShards, Stopped, UsageError
from deltatok.shards.files import sha256_file
from deltatok.train.config import DINOWorldTrainConfig, WorldTrainConfig
from deltatok.train.data.batches import Batch
from deltatok.train.data.order import RankSlice
from deltatok.train.dinoworld import DINOWorldObjective, train_dinoworld
from deltatok.train.engine import loop
from deltatok.train.engine.checkpoints import initialise
from deltatok.train.engine.logs import Meter
from deltatok.train.engine.loop import flops_per_sample
from deltatok.train.engine.model_folder import read_tensors
from deltatok.train.losses import smooth_l1
from deltatok.train.models.configs import DeltaWorldConfig, DINOWorldConfig
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.selection.selector import NamedWindows, WorldObjective
from deltatok.train.world import DeltaWorldObjective, train_world

Make = Callable[..., Any]
CPU = torch.device("cpu")
WIDE = {"layer_scale_init": 1.0, "initializer_range": 0.3}
"""So that candidates differ: at the first values of training all are alike."""


@pytest.fixture(params=["world", "dinoworld"])
def make_config(request: pytest.FixtureRequest) -> Make:
    """world_config or dinoworld_config."""
    make: Make = request.getfixturevalue(f"{request.param}_config")
    return make


def train(config: Any) -> Path:
    return train_world(config) if isinstance(config, WorldTrainConfig) else train_dinoworld(config)


def objective_of(config: Any) -> WorldObjective:
    if isinstance(config, WorldTrainConfig):
        world, _ = initialise(DeltaWorldNetwork, config.model, seed=0, start_from=None)
        shards = DeltaShards(config.deltas)
        return DeltaWorldObjective(world, shards, config, RankSlice(), device=CPU)
    dino, _ = initialise(DINOWorld, config.model, seed=0, start_from=None)
    shards_of_patches = PatchShards(config.patches)
    return DINOWorldObjective(dino, shards_of_patches, config, RankSlice(), device=CPU)


def inputs(objective: WorldObjective, batch: Batch, step: int) -> NamedWindows:
    names = [("noise", step, int(number)) for number in batch.samples]
    return NamedWindows(batch.tensors["tokens"].float(), batch.tensors["timestamps"], names)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("num_winners", [1, 2, 4])
def test_gradients_are_those_of_the_lowest_of_all_candidates(
    make_config: Make, num_winners: int
) -> None:
    """By autograd through every candidate, of which the loss takes the lowest."""
    config = make_config(num_winners=num_winners, model=WIDE)
    objective = objective_of(config)
    batch = objective.read(1)
    meter = Meter("windows", CPU)
    losses, _ = objective.losses(objective.model, batch, slice(None), step=1, meter=meter)
    losses.sum().backward()
    got = gradients(objective.model)
    objective.model.zero_grad()

    windows = inputs(objective, batch, 1)
    noise = objective.selector.noise(windows)
    queries = noise.chunk(torch.tensor(0), config.model.num_samples_train)
    each = torch.stack(
        [
            smooth_l1(
                objective.model(
                    windows.tokens, windows.timestamps, queries[:, :, sample], **objective._grid
                ),
                windows.tokens[:, 1:],
            )
            .flatten(2)
            .mean(2)
            for sample in range(queries.shape[2])
        ],
        dim=2,
    )
    wanted = each.topk(num_winners, dim=2, largest=False).values.flatten(1).mean(1)
    torch.testing.assert_close(losses, wanted, atol=1e-6, rtol=1e-5)
    wanted.sum().backward()
    for name, gradient in gradients(objective.model).items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def before(
    self: WorldObjective, forward: nn.Module, batch: Batch, samples: slice, **known: Any
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The losses of one winner as they were before there were several."""
    tokens = batch.tensors["tokens"][samples].float()
    timestamps = batch.tensors["timestamps"][samples]
    names = [("noise", known["step"], int(number)) for number in batch.samples[samples]]
    found, extras = self.selector.train(
        NamedWindows(tokens, timestamps, names), step=known["step"], checks=False
    )
    prediction = forward(tokens, timestamps, found.queries[:, :, 0], **self._grid)
    return smooth_l1(prediction, tokens[:, 1:]).flatten(1).mean(1), extras


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products whose rounding does not depend on how many threads a busy machine gives them."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.mark.usefixtures("one_thread")
def test_one_winner_trains_the_weights_that_it_did(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = train(make_config(lr=1e-2))
    monkeypatch.setattr(WorldObjective, "losses", before)
    then = train(make_config(lr=1e-2, out=str(tmp_path / "then")))
    files = [sha256_file(run / "model.safetensors") for run in (now, then)]
    assert files[0] == files[1]


def test_several_winners_train_other_weights(make_config: Make, tmp_path: Path) -> None:
    runs = [
        train(make_config(num_winners=count, model=WIDE, out=str(tmp_path / str(count))))
        for count in (1, 3)
    ]
    assert sha256_file(runs[0] / "model.safetensors") != sha256_file(runs[1] / "model.safetensors")


def test_portions_train_the_same(make_config: Make, tmp_path: Path) -> None:
    whole = train(make_config(num_winners=3, out=str(tmp_path / "whole")))
    parts = train(make_config(num_winners=3, micro_batch_size=2))
    one, other = (read_tensors(run / "model.safetensors") for run in (whole, parts))
    assert all(torch.allclose(one[name], other[name], atol=2e-5) for name in one)


SCHEDULES: dict[str, Any] = {
    "num_samples_schedule": ((0, 2), (1, 6)),
    "num_winners_schedule": ((0, 1), (2, 4)),
    "steps": 4,
}


def test_a_schedule_gives_each_step_its_winners() -> None:
    config = WorldTrainConfig(deltas="d", out="o", **SCHEDULES)
    assert [config.num_winners_at(step) for step in range(4)] == [1, 1, 4, 4]
    plain = WorldTrainConfig(deltas="d", out="o", num_winners=3)
    assert [plain.num_winners_at(step) for step in (0, 9)] == [3, 3]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_schedules_are_resumed_exactly(
    make_config: Make,
    tmp_path: Path,
    log_lines: Make,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    config = make_config(**SCHEDULES, out=str(tmp_path / "whole"))
    whole = train(config)
    cut = dataclasses.replace(config, out=str(tmp_path / "cut"))
    read, left = loop.Trainer._read_numbers, [step]

    def stopping(self: loop.Trainer, *given: Any, **known: Any) -> loop.Update:
        left[0] -= 1
        return read(self, *given, **known)._replace(stopping=left[0] == 0)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_read_numbers", stopping)
        with pytest.raises(Stopped):
            train(cut)
    again = train(cut)
    files = [sha256_file(run / "model.safetensors") for run in (whole, again)]
    assert files[0] == files[1]
    assert log_lines(again) == log_lines(whole)


@pytest.mark.parametrize(
    "changed", [{"num_winners": 2}, {"num_winners_schedule": ((0, 1), (2, 2))}]
)
def test_other_winners_are_another_run(world_config: Make, changed: dict[str, Any]) -> None:
    config = world_config(steps=2)
    train_world(config)
    (name,) = changed
    with pytest.raises(DeltatokError, match=f"config {name} is"):
        train_world(dataclasses.replace(config, steps=3, **changed))


def test_flops_are_counted_anew_where_the_winners_change(
    world_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[int, float]] = []

    def counting(*given: Any, step: int, **named: Any) -> float:
        counted.append((step, flops_per_sample(*given, step=step, **named)))
        return counted[-1][1]

    monkeypatch.setattr(loop, "flops_per_sample", counting)
    train_world(world_config(num_winners_schedule=((0, 1), (3, 5))))
    assert [step for step, _ in counted] == [0, 3]
    layers, positions, mlp = 2, 4, 2 * 2 * 16 * 64
    more = counted[1][1] - counted[0][1]
    # Forward and backward; attention and head beside the MLP.
    assert 3 < more / (4 * positions * layers * mlp) < 5


def test_finalists_give_the_winners_of_the_precision_of_training(world_config: Make) -> None:
    low = {"selection_dtype": "bfloat16", "selection_finalists": 12}
    many = {**WIDE, "num_samples_train": 32}
    found = []
    for fields in (low, {}):
        objective = objective_of(world_config(num_winners=4, model=many, **fields))
        windows = inputs(objective, objective.read(1), 1)
        found.append(objective.selector.train(windows, step=0, checks=True))
    (decided, values), (exact, _) = found
    assert torch.equal(decided.indices, exact.indices)
    torch.testing.assert_close(decided.best_losses, exact.best_losses)
    assert values["selection_agreement"] == 1
    assert values["selection_regret"] < 1e-6


def test_the_regret_of_several_winners_is_that_of_all_of_them(world_config: Make) -> None:
    fields = {"selection_dtype": "bfloat16", "selection_check_windows": 8, "log_every": 1}
    objective = objective_of(
        world_config(num_winners=16, model={**WIDE, "num_samples_train": 256}, **fields)
    )
    windows = inputs(objective, objective.read(1), 1)
    picked, values = objective.selector.train(windows, step=0, checks=True)
    exact = objective_of(world_config(num_winners=16, model={**WIDE, "num_samples_train": 256}))
    best, _ = exact.selector.train(windows, step=0, checks=False)
    sets = zip(picked.indices.flatten(0, 1), best.indices.flatten(0, 1), strict=True)
    shared = [len({*one.tolist()} & {*other.tolist()}) / 16 for one, other in sets]
    mean = sum(shared) / len(shared)
    assert 0.5 < mean < 1  # of 256 candidates some are within bfloat16's rounding
    assert values["selection_agreement"].item() == pytest.approx(mean)
    assert 0 < values["selection_regret"].item() < 0.01


K4 = {"num_samples_train": 4}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_winners": 0}, "num_winners 0: wanted at least 1"),
        ({"num_winners": 5}, "num_winners 5 at step 0: wanted at most its candidates, 4; set"),
        ({"num_winners_schedule": ((1, 2),)}, r"num_winners_schedule begins at the steps \[1\]: w"),
        ({"num_winners_schedule": ((0, 0),)}, "num_winners_schedule 0: wanted at least 1"),
        ({"num_winners_schedule": ((0, 1), (9, 8))}, "num_winners 8 at step 9: wanted at most it"),
        (
            {"num_winners": 3, "num_samples_schedule": ((0, 8), (7, 2))},
            "num_winners 3 at step 7: wanted at most its candidates, 2",
        ),
        (
            {"num_winners": 3, "selection_dtype": "bfloat16", "selection_finalists": 2},
            "selection_finalists 2: wanted at least num_winners, 3 at step 0",
        ),
        (
            {
                "num_winners_schedule": ((0, 2), (5, 4)),
                "selection_dtype": "bfloat16",
                "selection_finalists": 3,
            },
            "selection_finalists 3: wanted at least num_winners, 4 at step 5",
        ),
        ({"num_winners": 2, "use_bom": False}, "num_winners: wanted 1 and no num_winners_schedule"),
        (
            {"num_winners_schedule": ((0, 1),), "use_bom": False},
            "num_winners: wanted 1 and no num_winners_schedule",
        ),
    ],
)
def test_winners_that_cannot_be_are_refused(fields: dict[str, Any], words: str) -> None:
    model: dict[str, Any] = {**K4, "use_bom": fields.get("use_bom", True)}
    given = {name: value for name, value in fields.items() if name != "use_bom"}
    with pytest.raises(UsageError, match=words):
        WorldTrainConfig(deltas="d", out="o", model=DeltaWorldConfig(**model), **given)
    with pytest.raises(UsageError, match=words):
        DINOWorldTrainConfig(patches="p", out="o", model=DINOWorldConfig(**model), **given)


def test_winners_that_can_be_are_taken() -> None:
    few: dict[str, Any] = {"deltas": "d", "out": "o", "model": DeltaWorldConfig(**K4)}
    WorldTrainConfig(**few, num_winners=4)
    # One finalist is none: nothing is compared again.
    WorldTrainConfig(**few, num_winners=4, selection_dtype="bfloat16")
    # A schedule says it for every step, whatever num_winners is.
    WorldTrainConfig(**few, num_winners=9, num_winners_schedule=((0, 2),))


def test_the_flag_is_short_and_the_long_one_works_too() -> None:
    words = ["--deltas", "d", "--out", "o"]
    for flag in ("--winners", "--num-winners"):
        config = COMMANDS["world"].parse("deltatok-train world", [*words, flag, "3"])
        assert config.num_winners == 3
    schedule = ["--set", "num_winners_schedule=[[0,1],[750,4]]"]
    config = COMMANDS["world"].parse("deltatok-train world", [*words, *schedule])
    assert config.num_winners_schedule == ((0, 1), (750, 4))
