"""Tokenizer training on a part of the patches: which, what it costs, and when it ends."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deltatok.shards import PatchShards
from deltatok.train.data.order import RankSlice
from deltatok.train.engine.logs import Meter
from deltatok.train.engine.loop import flops_per_sample
from deltatok.train.losses import log_cosh
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.tokenizer import TokenizerObjective

Make = Callable[..., Any]
CPU = torch.device("cpu")
WHOLE = {"use_rope_aug": False}


def objective_of(config: Any) -> TokenizerObjective:
    model = DeltaTok(config.model, generator=torch.Generator().manual_seed(0))
    return TokenizerObjective(model, PatchShards(config.patches), config, RankSlice(), CPU)


def test_the_loss_is_that_of_the_decoded_patches(tokenizer_config: Make) -> None:
    objective = objective_of(
        tokenizer_config(model=WHOLE, encoder_patch_fraction=0.75, decoder_patch_fraction=0.5)
    )
    seen, decoded = objective._patches_at(0, CPU)
    assert seen is not None
    assert decoded is not None
    assert (len(seen), len(decoded)) == (3, 2)
    assert set(decoded.tolist()) < set(seen.tolist())
    batch = objective.read(0)
    losses, _ = objective.losses(
        objective.model, batch, slice(0, 9), step=0, meter=Meter("pairs", CPU)
    )
    row, previous, current = batch.tensors["pairs"].T
    frames = batch.tensors["frames"].float()
    x_prev, x_cur = frames[row, previous], frames[row, current]
    z = objective.model.encode(x_prev, x_cur, grid=(2, 2), patches=seen)
    made = objective.model.decode(z, x_prev, grid=(2, 2), patches=decoded)
    wanted = log_cosh(made, x_cur[:, decoded]).flatten(1).mean(1)
    torch.testing.assert_close(losses, wanted)


def test_every_step_draws_its_own_and_all_patches_have_their_turn(tokenizer_config: Make) -> None:
    objective = objective_of(tokenizer_config(encoder_patch_fraction=0.5))
    drawn = [objective._patches_at(step, CPU) for step in range(40)]
    assert all(decoded is None for _, decoded in drawn)
    found = {tuple(seen.tolist()) for seen, _ in drawn if seen is not None}
    assert found == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}


def test_steps_from_whole_frames_on_are_those_of_a_run_without(tokenizer_config: Make) -> None:
    plain = objective_of(tokenizer_config())
    ending = objective_of(tokenizer_config(encoder_patch_fraction=0.5, whole_frames_from=2))
    for step, same in ((1, False), (2, True), (3, True)):
        one, other = (
            objective.losses(
                objective.model,
                objective.read(step),
                slice(0, 9),
                step=step,
                meter=Meter("pairs", CPU),
            )[0]
            for objective in (plain, ending)
        )
        assert torch.equal(one, other) == same


@pytest.mark.parametrize(
    ("changed", "least", "most"),
    [
        ({"encoder_patch_fraction": 0.5, "decoder_patch_fraction": 0.5}, 0.4, 0.55),
        ({"encoder_patch_fraction": 0.5, "decoder_patch_fraction": 0.25}, 0.3, 0.45),
        ({"decoder_patch_fraction": 0.5}, 0.6, 0.85),
    ],
)
def test_flops_that_the_log_counts_fall_with_the_patches(
    tokenizer_config: Make,
    make_patches: Make,
    tmp_path_factory: pytest.TempPathFactory,
    changed: dict[str, float],
    least: float,
    most: float,
) -> None:
    patches = make_patches(tmp_path_factory.mktemp("caches") / "patches", grid=(8, 8))

    def counted(step: int, **fields: Any) -> float:
        objective = objective_of(tokenizer_config(patches=str(patches), **fields))
        return flops_per_sample(objective, objective.read(step), step=step, device=CPU)

    whole = counted(0)
    assert least < counted(0, **changed) / whole < most
    assert counted(1, **changed, whole_frames_from=1) == whole
