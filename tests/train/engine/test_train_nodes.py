"""Two machines train one model: two launches, here on one machine, from one folder and each from a
mirror of its own. torchrun, which `accelerate launch --multi_gpu` calls: with --cpu that starts one
process only."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deltatok.pipeline.cli import as_plain
from deltatok.shards.stores.push import push
from deltatok.train.engine.model_folder import read_tensors
from deltatok.train.world import train_world

pytestmark = pytest.mark.slow
Make = Callable[..., Any]
NODES = 2


@pytest.fixture
def launched(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """launched(config): trains on two machines; gives the run folder."""

    def launch(fields: dict[str, Any]) -> Path:
        file = tmp_path / f"{Path(fields['out']).name}.yaml"
        file.write_text(yaml.safe_dump(fields))
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        nodes = []
        for rank in range(NODES):
            words = ["--nnodes", NODES, "--nproc_per_node", 1, "--node_rank", rank]
            words += ["--master_addr", "127.0.0.1", "--master_port", port]
            words += ["-m", "deltatok.pipeline.commands.train", "world", "--config", file]
            environment = {
                **os.environ,
                "DELTATOK_CACHE_DIR": str(tmp_path / f"machine-{rank}"),
                "OMP_NUM_THREADS": "1",
            }
            nodes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *map(str, words)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        for node in nodes:
            output, _ = node.communicate(timeout=300)
            assert node.returncode == 0, output.decode()[-3000:]
        return Path(fields["out"])

    return launch


def test_two_machines_train_what_one_process_does(
    world_config: Make, deltas: Path, launched: Make, tmp_path: Path
) -> None:
    pytest.importorskip("obstore", reason="pip install 'deltatok[cloud]'")
    (tmp_path / "store").mkdir()
    url = f"file://{tmp_path / 'store' / 'deltas'}"
    push(deltas, url, progress=lambda _: None)
    alone = read_tensors(
        train_world(world_config(out=str(tmp_path / "alone"))) / "model.safetensors"
    )
    runs = [
        launched(as_plain(world_config(out=str(tmp_path / name), deltas=place)))
        for name, place in (("folder", str(deltas)), ("mirrored", url))
    ]
    assert (runs[0] / "model.safetensors").read_bytes() == (
        runs[1] / "model.safetensors"
    ).read_bytes()
    for name, tensor in read_tensors(runs[0] / "model.safetensors").items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5)
    for rank in range(NODES):  # each machine fetched for itself
        assert list((tmp_path / f"machine-{rank}" / "mirrors").glob("*/shards/000000.tar"))
    lines = (runs[0] / "log.jsonl").read_text().splitlines()
    assert any(json.loads(line)["kind"] == "train" for line in lines)
