"""Run as a program by test_resume.py: an extraction that kills itself at a given moment.

    python interrupted_run.py CONFIG.json MOMENT

Moments: `batch` (between two batches of the second shard), `scales` (int8: cache.json is there, the
channel scales it names are not), `partial` (the second shard's folder is
written but not yet in place), `record` (in place, its done-record is not), `terminate` (SIGTERM to
itself in the second shard).
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deltatok.extract import features, run
from deltatok.extract import int8_calibration as calibration
from deltatok.extract.config import ExtractConfig
from deltatok.shards import DeltatokError, Stopped
from deltatok.shards import records as publishing


def at_call(module: Any, name: str, number: int, signal_number: int) -> None:
    """Sends the signal to this process just before the `number`-th call of module.name."""
    original: Callable[..., Any] = getattr(module, name)
    calls = iter(range(1, 10**6))

    def wrapped(*args: Any, **settings: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal_number)
        return original(*args, **settings)

    setattr(module, name, wrapped)


MOMENTS: dict[str, tuple[Any, str, int, int]] = {
    "batch": (features.WindowFeatures, "_run", 4, signal.SIGKILL),
    "scales": (calibration, "agree_on_channel_scale", 1, signal.SIGKILL),
    "agreed": (run, "open_cache", 1, signal.SIGKILL),
    "partial": (publishing, "publish", 2, signal.SIGKILL),
    "record": (publishing, "write_done", 2, signal.SIGKILL),
    "terminate": (features.WindowFeatures, "_run", 4, signal.SIGTERM),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    at_call(*MOMENTS[sys.argv[2]])
    try:
        run.run_extraction(ExtractConfig(**json.loads(Path(sys.argv[1]).read_text())))
    except (DeltatokError, Stopped) as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
