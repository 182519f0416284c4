"""Two training processes cannot write into one folder."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltatok.shards import UsageError
from deltatok.train.engine.run_folder import LOCK
from deltatok.train.world import train_world

Make = Callable[..., Any]

HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "wb")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_one_ended(
    world_config: Make, tmp_path: Path
) -> None:
    config = world_config(steps=1)
    out = Path(config.out)
    out.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out / LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another process is training into it"):
            train_world(config)
        assert sorted(path.name for path in out.iterdir()) == [LOCK]
        holder.kill()
    train_world(config)
    assert (out / "model.safetensors").is_file()
