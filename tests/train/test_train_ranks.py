"""Two processes train what one does: the same draws, the same batches, the same model."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltatok.train.pretrained import read_tensors
from deltatok.train.world import train_world

Make = Callable[..., Any]

RANK = """
import json, sys
import torch
torch.set_num_threads(1)
from deltatok.train.config import WorldTrainConfig
from deltatok.train.models.deltaworld import DeltaWorldConfig
from deltatok.train.world import train_world
fields = json.loads(sys.argv[1])
fields["model"]["rope_axis_sizes"] = tuple(fields["model"]["rope_axis_sizes"])
train_world(WorldTrainConfig(**{**fields, "model": DeltaWorldConfig(**fields["model"])}))
assert torch.distributed.get_world_size() == 2
torch.distributed.destroy_process_group()
"""


def test_two_ranks_train_the_model_of_one_process(
    world_config: Make, tmp_path: Path, log_lines: Make
) -> None:
    config = world_config(steps=5, lr=1e-2)
    train_world(dataclasses.replace(config, out=str(tmp_path / "one")))
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launched = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script), json.dumps(dataclasses.asdict(config))),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert launched.wait(timeout=100) == 0
    finally:
        launched.terminate()  # it ends its ranks; killed, it would leave them
        launched.wait()
    one, two = (read_tensors(tmp_path / name / "model.safetensors") for name in ("one", "run"))
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)
    for line, other in zip(log_lines(tmp_path / "one"), log_lines(tmp_path / "run"), strict=True):
        assert line.pop("kind") == other.pop("kind")
        assert line == pytest.approx(other, rel=1e-3)
