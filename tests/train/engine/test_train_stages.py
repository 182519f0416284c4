"""A run that begins with another's weights, with or without its optimizer; bigger frames; T 16."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltatok.shards import UsageError
from deltatok.train.engine.model_folder import read_tensors
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.tokenizer import train_tokenizer
from deltatok.train.world import train_world

Make = Callable[..., Any]


def optimizer_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return read_tensors(run / f"checkpoints/step-{step:08d}/optimizer.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture
def first_stage(world_config: Make, tmp_path: Path) -> Path:
    return train_world(world_config(steps=4, save_every=4, out=str(tmp_path / "first")))


def test_cooldown_with_the_optimizer_is_the_first_run_going_on(
    world_config: Make, tmp_path: Path
) -> None:
    """At the rate and the batches of the first run, its last step again gives its last weights."""
    fields = {"warmup_steps": 0, "save_every": 1, "keep_checkpoints": 9, "validation_fraction": 0}
    model = {"use_bom": False}  # no noise, which is drawn for the step's number
    fields |= {"batch_size": 40}  # the whole cache, so that every step's gradient is the same
    whole = train_world(world_config(model=model, steps=4, out=str(tmp_path / "whole"), **fields))
    start = str(whole / "checkpoints/step-00000003")
    last = train_world(
        world_config(model=model, steps=1, start_from=start, start_optimizer=True, **fields)
    )
    one, other = (read_tensors(run / "model.safetensors") for run in (whole, last))
    for name, tensor in one.items():  # the windows come in another order
        torch.testing.assert_close(tensor, other[name], atol=1e-6, rtol=1e-5)
    without = train_world(
        world_config(model=model, steps=1, start_from=start, out=str(tmp_path / "b"), **fields)
    )
    fresh = read_tensors(without / "model.safetensors")
    assert not all(torch.allclose(one[n], fresh[n], atol=1e-6, rtol=1e-5) for n in one)


def test_optimizer_comes_from_the_newest_checkpoint_of_a_run_folder(
    world_config: Make, first_stage: Path
) -> None:
    config = world_config(steps=1, start_from=str(first_stage), start_optimizer=True)
    counts = optimizer_of(train_world(config), 1)
    assert {counts[name].item() for name in counts if name.endswith(".step")} == {5.0}


def test_without_start_optimizer_its_state_is_fresh(world_config: Make, first_stage: Path) -> None:
    counts = optimizer_of(train_world(world_config(steps=1, start_from=str(first_stage))), 1)
    assert {counts[name].item() for name in counts if name.endswith(".step")} == {1.0}


def test_cooldown_that_was_stopped_goes_on_with_its_own_optimizer(
    world_config: Make, first_stage: Path, tmp_path: Path
) -> None:
    fields = {"start_from": str(first_stage), "start_optimizer": True, "lr": 1e-5}
    whole = train_world(world_config(steps=4, out=str(tmp_path / "whole"), **fields))
    train_world(world_config(steps=2, **fields))
    cut = train_world(world_config(steps=4, **fields))
    assert same(optimizer_of(whole, 4), optimizer_of(cut, 4))


def test_optimizer_without_a_start_is_refused(world_config: Make) -> None:
    with pytest.raises(UsageError, match="start_optimizer: wanted start_from as well"):
        world_config(start_optimizer=True)


def test_model_folder_without_checkpoints_has_no_optimizer(
    world_config: Make, first_stage: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    DeltaWorldNetwork.from_pretrained(first_stage).save_pretrained(bare, {})
    train_world(world_config(steps=1, start_from=str(bare)))
    with pytest.raises(UsageError, match=r"bare: no optimizer.safetensors and no checkpoints/"):
        train_world(world_config(start_from=str(bare), start_optimizer=True))


def test_tokenizer_goes_on_at_twice_the_frame_size(
    tokenizer_config: Make, make_patches: Make, tmp_path: Path, log_lines: Make
) -> None:
    small = train_tokenizer(tokenizer_config(steps=4, out=str(tmp_path / "small")))
    large = make_patches(tmp_path / "patches", grid=(4, 4))
    config = tokenizer_config(patches=str(large), start_from=str(small), steps=1)
    out = train_tokenizer(config)  # its only update has learning rate 0
    assert same(*(read_tensors(run / "model.safetensors") for run in (small, out)))
    config = tokenizer_config(patches=str(large), start_from=str(small), steps=5)
    losses = [line["loss"] for line in log_lines(train_tokenizer(config), ["train"])]
    assert losses[-1] < losses[0]
    frames = torch.zeros(1, 16, 16)
    model = DeltaTok.from_pretrained(out)
    assert model(frames, frames, grid=(4, 4)).shape == (1, 16, 16)


def test_tokenizer_draws_another_rope_scale_every_step(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float | None] = []
    forward = DeltaTok.forward

    def watched(self: DeltaTok, *arguments: Any, rescale: Any, **named: Any) -> Any:
        seen.append(None if rescale is None else rescale.item())
        return forward(self, *arguments, rescale=rescale, **named)

    monkeypatch.setattr(DeltaTok, "forward", watched)
    train_tokenizer(tokenizer_config(steps=5, validation_fraction=0))
    drawn = seen[1:]  # the first pass counts FLOPs
    assert len(set(drawn)) == 5
    assert all(scale is not None and 0.5 <= scale <= 2 for scale in drawn)


@pytest.mark.parametrize("use_bom", [True, False])
def test_world_trains_on_sixteen_frames(
    world_config: Make, make_deltas: Make, tmp_path: Path, log_lines: Make, use_bom: bool
) -> None:
    long = make_deltas(tmp_path / "long", num_frames=16)
    config = world_config(
        deltas=str(long),
        model={"use_bom": use_bom},
        steps=60,
        lr=1e-2,
        eval_every=60,
        weight_decay=0.0,
    )
    out = train_world(config)
    losses = [line["loss"] for line in log_lines(out, ["train"])]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    world = DeltaWorldNetwork.from_pretrained(out)
    forecast = world.rollout(
        torch.zeros(1, 15, 8),
        torch.arange(16)[None] * 0.2,
        horizon=1,
        num_samples=2,
        generator=torch.Generator() if use_bom else None,
    )
    assert forecast.shape == (1, 2 if use_bom else 1, 1, 8)
