"""Tokenizer training in a closed loop: chains of pairs, each from the reconstruction before it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deltatok.shards import PatchShards, UsageError
from deltatok.shards.files import sha256_file
from deltatok.train.data.batches import places_in_chain
from deltatok.train.data.order import RankSlice
from deltatok.train.engine.logs import Meter
from deltatok.train.losses import log_cosh
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.tokenizer import TokenizerObjective, train_tokenizer

Make = Callable[..., Any]
CPU = torch.device("cpu")
FRAMES = 4
"""Of a window: three pairs."""


def objective_of(config: Any) -> TokenizerObjective:
    model = DeltaTok(config.model, generator=torch.Generator().manual_seed(0))
    return TokenizerObjective(model, PatchShards(config.patches), config, RankSlice(), CPU)


def losses_of(objective: TokenizerObjective) -> tuple[Tensor, Tensor]:
    """Of step 0: the losses (B,), and the gradient of their sum, flat."""
    objective.model.zero_grad()
    batch, meter = objective.read(0), Meter("pairs", CPU)
    losses, _ = objective.losses(objective.model, batch, slice(0, 9), step=0, meter=meter)
    losses.sum().backward()
    gradients = [value.grad.flatten() for value in objective.model.parameters()]
    return losses.detach(), torch.cat(gradients)


def by_hand(objective: TokenizerObjective, *, closed: str, gradient: str) -> tuple[Tensor, Tensor]:
    """The same, window by window, each one chain of its three pairs."""
    model, grid = objective.model, (2, 2)
    model.zero_grad()
    losses = []
    for window in objective.read(0).tensors["frames"].float():
        last = window[:1]
        for true, current in zip(window[:-1, None], window[1:, None], strict=True):
            z = model.encode(last if closed == "both" else true, current, grid=grid)
            made = model.decode(z, last, grid=grid)
            losses.append(log_cosh(made, current).mean())
            last = made.detach() if gradient == "stopped" else made
    torch.stack(losses).sum().backward()
    gradients = [value.grad.flatten() for value in model.parameters()]
    return torch.stack(losses).detach(), torch.cat(gradients)


@pytest.mark.parametrize("gradient", ["through", "stopped"])
@pytest.mark.parametrize("closed", ["both", "decoder"])
def test_losses_and_gradients_are_those_of_the_loop_written_out(
    tokenizer_config: Make, closed: str, gradient: str
) -> None:
    objective = objective_of(
        tokenizer_config(
            model={"use_rope_aug": False},
            closed_loop_steps=3,
            closed_loop=closed,
            closed_loop_gradient=gradient,
        )
    )
    for found, wanted in zip(
        losses_of(objective), by_hand(objective, closed=closed, gradient=gradient), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_each_of_the_options_gives_gradients_of_its_own(tokenizer_config: Make) -> None:
    options = [{}]
    options += [
        {"closed_loop_steps": 3, "closed_loop": closed, "closed_loop_gradient": gradient}
        for closed in ("both", "decoder")
        for gradient in ("through", "stopped")
    ]
    found = [losses_of(objective_of(tokenizer_config(**changed)))[1] for changed in options]
    for number, one in enumerate(found):
        assert not any(torch.allclose(one, other, rtol=1e-3) for other in found[:number])


@pytest.mark.parametrize(("pairs", "chain"), [(3, 1), (7, 2), (7, 4), (4, 4), (5, 3)])
def test_chains_stay_in_their_window_and_no_slice_of_whole_chains_cuts_one(
    pairs: int, chain: int
) -> None:
    numbers = np.arange(6 * pairs * chain)
    places = places_in_chain(numbers, pairs_per_window=pairs, chain=chain)
    assert places.max() == chain - 1
    for number, place in enumerate(places):
        begins = number % pairs == 0 or number % chain == 0
        assert place == (0 if begins else places[number - 1] + 1)


def test_portions_change_no_step(tokenizer_config: Make, tmp_path: Path, log_lines: Make) -> None:
    config = tokenizer_config(steps=4, batch_size=12, closed_loop_steps=2)
    whole = train_tokenizer(dataclasses.replace(config, out=str(tmp_path / "whole")))
    parts = train_tokenizer(dataclasses.replace(config, micro_batch_size=4))
    for one, other in zip(log_lines(whole), log_lines(parts), strict=True):
        assert one.pop("kind") == other.pop("kind")
        assert one == pytest.approx(other, rel=1e-4)


RANKS = """
import json, os, socket, sys
from deltatok.train.config import TokenizerTrainConfig
from deltatok.train.engine.devices import leave_group
from deltatok.train.models.configs import DeltaTokConfig
from deltatok.train.tokenizer import train_tokenizer

with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
child = os.fork()
rank = 0 if child else 1
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}  # as torchrun
fields = json.loads(sys.argv[1])
train_tokenizer(TokenizerTrainConfig(**{**fields, "model": DeltaTokConfig(**fields["model"])}))
leave_group()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_two_ranks_equal_one_that_takes_their_portions_bit_for_bit(
    tokenizer_config: Make, tmp_path: Path, run_program: Make
) -> None:
    config = tokenizer_config(steps=3, batch_size=12, closed_loop_steps=2)
    one = train_tokenizer(
        dataclasses.replace(config, out=str(tmp_path / "one"), micro_batch_size=6)
    )
    (tmp_path / "ranks.py").write_text(RANKS)
    ended = run_program(tmp_path / "ranks.py", json.dumps(dataclasses.asdict(config)))
    assert ended.returncode == 0, ended.stderr
    assert sha256_file(one / "model.safetensors") == sha256_file(
        Path(config.out) / "model.safetensors"
    )


def test_windows_that_are_too_short_are_refused(tokenizer_config: Make) -> None:
    with pytest.raises(UsageError, match=r"4 frames a window, wanted 5 .*for closed_loop_steps 4"):
        train_tokenizer(tokenizer_config(batch_size=8, closed_loop_steps=FRAMES))


def test_ranks_whose_share_cuts_a_chain_are_refused(tokenizer_config: Make) -> None:
    config = tokenizer_config(batch_size=6, closed_loop_steps=2)
    model = DeltaTok(config.model)
    with pytest.raises(UsageError, match="3 pairs on each of 2 processes, wanted a multiple of"):
        TokenizerObjective(
            model, PatchShards(config.patches), config, RankSlice(rank=0, num_ranks=2), CPU
        )
