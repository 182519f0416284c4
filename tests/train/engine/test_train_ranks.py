"""Two processes train what one does: the same draws, the same batches, the same model.

Bit for bit on the CPU where one process adds up the gradients of the same portions: a micro-batch
of what each of the two would take (two summands have no order). Else up to rounding.
"""

import dataclasses
import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltatok.shards.files import sha256_file
from deltatok.train.config import WorldTrainConfig
from deltatok.train.engine.model_folder import read_tensors
from deltatok.train.engine.run_folder import LOCK
from deltatok.train.world import train_world

Make = Callable[..., Any]

RANK = """
import dataclasses, json, os, socket, sys
from pathlib import Path
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from deltatok.shards import DeltatokError
from deltatok.train.engine import loop
from deltatok.train.engine.devices import leave_group
from deltatok.train import world
from deltatok.train.config import WorldTrainConfig
from deltatok.train.models.configs import DeltaWorldConfig
from deltatok.train.selection.selector import Selector
from deltatok.train.world import train_world
def config_of(fields):
    fields["model"]["rope_axis_sizes"] = tuple(fields["model"]["rope_axis_sizes"])
    return WorldTrainConfig(**{**fields, "model": DeltaWorldConfig(**fields["model"])})

with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
child = os.fork()
rank = 0 if child else 1
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}  # as torchrun

for fields in json.loads(sys.argv[1]):
    train_world(config_of(fields))
    assert torch.distributed.get_world_size() == 2

config = config_of(fields)
folder = Path(config.out).parent

# What only one rank meets: each of these must end both, with one exit code.
def measured(self, *given, **named):
    return {"selection_agreement": torch.tensor(0.0), "selection_regret": torch.tensor(1.0 * rank)}

def full(*given, **named):
    raise DeltatokError("the disk is full")

endings = {}
for name, patched, attribute, broken in (
    ("regret", Selector, "_measure", measured),
    ("disk", loop, "save_checkpoint", full),
    ("held", None, "", None),
):
    changed = {"selection_dtype": "bfloat16", "selection_max_regret": 0.4, "steps": 2}
    sound = getattr(patched, attribute, None)
    if patched:
        setattr(patched, attribute, broken)
    try:
        train_world(dataclasses.replace(config, out=str(folder / name), **changed))
    except DeltatokError as error:
        endings[name] = (error.exit_code, str(error))
    if patched:
        setattr(patched, attribute, sound)
    torch.distributed.barrier()
(folder / f"endings-{rank}.json").write_text(json.dumps(endings))

# How often gradients are exchanged in steps of several portions.
exchanged, train = [], loop.Trainer.train

def exchange(state, bucket):
    exchanged.append(bucket.index())
    return allreduce_hook(None, bucket)

def counted(self):
    self.forward.register_comm_hook(None, exchange)
    train(self)

loop.Trainer.train = counted
changed = {"steps": 3, "eval_every": 9, "save_every": 9, "micro_batch_size": 1}
train_world(dataclasses.replace(config, out=str(folder / "exchanging"), **changed))
loop.Trainer.train = train
(folder / f"exchanged-{rank}.json").write_text(json.dumps(exchanged))

# Ranks whose evaluations differ, as by rounding: the main one says which is the best.
values = iter([0.5, 0.4, 0.6] if rank == 0 else [0.5, 0.6, 0.4])
world.DeltaWorldObjective.evaluate = lambda self: {"validation_best_loss": next(values)}
changed = {"steps": 3, "eval_every": 1, "save_every": 9}
train_world(dataclasses.replace(config, out=str(folder / "differing"), **changed))
leave_group()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="session")  # a module that two workers share would make it thrice
def runs(tmp_path_factory: pytest.TempPathFactory, deltas: Path, run_program: Make) -> Path:
    """Folder of the runs, 6 steps of batch 8 each: `one` and `two` ranks; `portions`: one rank
    that takes 4 windows at a time; `moved`: 2 steps so on one rank, 2 on two, 2 on one; `paused`:
    two ranks that stop after 3 steps and go on; `two-winners` and `portions-winners`: the same with
    2 winners, from the fourth step on 3; and what else RANK does there."""
    from deltatok.train.models.configs import DeltaWorldConfig

    folder = tmp_path_factory.mktemp("runs")
    model = DeltaWorldConfig(
        hidden_size=8,
        predictor_hidden_size=16,
        predictor_num_hidden_layers=2,
        predictor_num_heads=2,
        rope_axis_sizes=(6,),
        rope_unrotated_size=2,
        num_samples_train=6,
        num_samples_eval=4,
        layer_scale_init=0.1,
    )

    def config(name: str, **changed: Any) -> WorldTrainConfig:
        fields: dict[str, Any] = {
            "deltas": str(deltas),
            "out": str(folder / name),
            "model": model,
            "steps": 6,
            "batch_size": 8,
            "lr": 1e-2,
            "warmup_steps": 2,
            "log_every": 1,
            "eval_every": 3,
            "save_every": 2,
            "validation_fraction": 0.2,
            "device": "cpu",
        }
        return WorldTrainConfig(**{**fields, **changed})

    train_world(config("one"))
    train_world(config("portions", micro_batch_size=4))
    winners = {"num_winners_schedule": ((0, 2), (3, 3))}
    train_world(config("portions-winners", micro_batch_size=4, **winners))
    train_world(config("moved", micro_batch_size=4, steps=2))
    (folder / "held").mkdir()
    with (folder / "held" / LOCK).open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        configs = [
            config("two-winners", **winners),
            config("two"),
            config("moved", steps=4),
            config("paused", steps=3),
            config("paused"),
        ]
        fields = json.dumps([dataclasses.asdict(config) for config in configs])
        (folder / "ranks.py").write_text(RANK)
        ended = run_program(folder / "ranks.py", fields)
        assert ended.returncode == 0, ended.stderr
    train_world(config("moved", micro_batch_size=4))
    return folder


def weights(run: Path) -> str:
    return sha256_file(run / "model.safetensors")


def test_two_ranks_train_the_model_of_one_process(runs: Path, log_lines: Make) -> None:
    one, two = (read_tensors(runs / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)
    for line, other in zip(log_lines(runs / "one"), log_lines(runs / "two"), strict=True):
        assert line.pop("kind") == other.pop("kind")
        assert line == pytest.approx(other, rel=1e-3)


def test_two_ranks_equal_one_that_takes_their_portions_bit_for_bit(runs: Path) -> None:
    assert weights(runs / "two") == weights(runs / "portions")


def test_two_ranks_share_the_gradient_of_several_winners_bit_for_bit(runs: Path) -> None:
    assert weights(runs / "two-winners") == weights(runs / "portions-winners")
    assert weights(runs / "two-winners") != weights(runs / "two")


def test_ranks_may_change_from_one_to_two_to_one_bit_for_bit(runs: Path, log_lines: Make) -> None:
    assert weights(runs / "moved") == weights(runs / "portions")
    moved, whole = (log_lines(runs / name, ["train"]) for name in ("moved", "portions"))
    assert [line["step"] for line in moved] == [1, 2, 3, 4, 5, 6]
    for line, other in zip(moved, whole, strict=True):
        assert line.pop("kind") == other.pop("kind")
        assert line == pytest.approx(other, rel=1e-6)  # means are taken a rank at a time


def test_two_ranks_that_were_stopped_equal_two_that_were_not(runs: Path) -> None:
    assert weights(runs / "paused") == weights(runs / "two")


def test_checkpoints_tell_on_how_many_ranks_they_were_made(runs: Path) -> None:
    told = [
        json.loads((runs / f"moved/checkpoints/step-{step:08d}/state.json").read_text())["loader"]
        for step in (4, 6)
    ]
    assert [loader["ranks"] for loader in told] == [2, 1]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("regret", 1, "step 1: selection in bfloat16 has a regret of 0.5, wanted at most"),
        ("disk", 1, "the disk is full"),
        ("held", 2, "another process is training into it"),
    ],
)
def test_what_stops_one_rank_stops_both_with_the_same_exit_code(
    runs: Path, name: str, code: int, words: str
) -> None:
    endings = [json.loads((runs / f"endings-{rank}.json").read_text())[name] for rank in (0, 1)]
    assert [ending[0] for ending in endings] == [code, code]
    assert words in endings[0][1]
    known = "the main process could not go on" if name != "regret" else words
    assert known in endings[1][1]


def test_the_main_rank_says_which_checkpoint_is_the_best(runs: Path) -> None:
    best = json.loads((runs / "differing/best.json").read_text())
    assert (best["step"], best["value"]) == (2, 0.4)
    steps = sorted(path.name for path in (runs / "differing/checkpoints").iterdir())
    assert steps == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("rank", [0, 1])
def test_gradients_are_exchanged_once_a_step(runs: Path, rank: int) -> None:
    """Not after every one of its four portions; this little model is one bucket."""
    assert json.loads((runs / f"exchanged-{rank}.json").read_text()) == [0, 0, 0]
