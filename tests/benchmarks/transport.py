"""How fast decoded frames get from a decoding process to the pool, beside a copy within a process.

    python tests/benchmarks/transport.py --json FILE

A process that decodes nothing sends a clip of random frames again and again, through the pool's
own code: in memory files, and in temporary files as on systems without them. This side copies every
clip once, as cropping does. Beside it, in the same run: a clip that is sent by a socket, and one
that lies in this process already; copied likewise.

JSON: clip_bytes; of each way (memory, file, socket, copy) bytes_per_s, the median over the clips,
and what counts where many processes share one pool: cpu_s_per_gb, the CPU seconds that a GB costs
this process; and of the first three over the copy: bytes/s, and the copy's CPU seconds over theirs.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from deltatok.extract.config import ExtractConfig
from deltatok.extract.decoding.clip import DecodedClip
from deltatok.extract.decoding.pool import DecodePool
from deltatok.extract.sources.clip import Clip

Frame = NDArray[np.uint8]

WORKER = """
import sys
import numpy as np
from deltatok.extract.decoding.clip import DecodedClip
from deltatok.extract.decoding import worker
from deltatok.shards.sampling import WindowDraw

num_frames, height, width = map(int, sys.argv[1:4])
pixels = np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), np.uint8)
frames = dict(enumerate(pixels))
draw = WindowDraw(tuple(frames), tuple(map(float, frames)), (0, 0, height, width), False)

def decode(request, starting):
    return DecodedClip(request.clip.key, "pyav", [draw], frames)

worker.main(sys.argv[4:], decode=decode)
"""


def main() -> None:
    """Runs the benchmark; prints the result and writes it to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--clips", type=int, default=10, help="clips each way in a round [10]")
    parser.add_argument("--rounds", type=int, default=4, help="[4]")
    parser.add_argument("--frames", type=int, default=32, help="frames in a clip [32]")
    parser.add_argument("--size", type=int, nargs=2, default=(720, 1280), help="[720 1280]")
    arguments = parser.parse_args()
    size = (arguments.frames, *arguments.size)
    space = np.ones((*size, 3), np.uint8)  # its memory is there before anything is timed
    with TemporaryDirectory() as folder:
        script = Path(folder) / "worker.py"
        script.write_text(WORKER)
        command = [sys.executable, "-P", str(script), *map(str, size)]
        own = list(np.ones_like(space))
        ways: dict[str, Callable[[], Iterable[Iterable[Frame]]]] = {
            "memory": lambda: _from_pool(command, arguments.clips),
            "file": lambda: _from_pool_without_memory_files(command, arguments.clips),
            "socket": lambda: _from_socket(arguments.clips, space),
            "copy": lambda: repeat(own, arguments.clips + 1),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):  # in turns: what else the machine does slows all alike
            for name, clips in ways.items():
                _measure(clips(), space, seconds[name], cpu_seconds[name])
    result: dict[str, Any] = {"clip_bytes": space.nbytes}
    rates = {name: space.nbytes / float(np.median(times)) for name, times in seconds.items()}
    costs = {name: float(np.mean(t)) / space.nbytes * 1e9 for name, t in cpu_seconds.items()}
    for name in ways:
        result[name] = {"bytes_per_s": rates[name], "cpu_s_per_gb": costs[name]}
    for name in ("memory", "file", "socket"):
        ratios = {"rate": rates[name] / rates["copy"], "cpu": costs["copy"] / costs[name]}
        result[f"{name}_over_copy"] = ratios
    text = json.dumps(result, indent=1)
    arguments.json.write_text(f"{text}\n")
    print(text)


def _measure(
    clips: Iterable[Iterable[Frame]], space: Frame, seconds: list[float], cpu_seconds: list[float]
) -> None:
    """Copies the frames of every clip to `space`, uint8 (T, H, W, 3); appends the time and the CPU
    time of this process that each takes, from the second on."""
    before: tuple[float, float] | None = None
    for clip in clips:
        for copy, frame in zip(space, clip, strict=True):
            copy[...] = frame
        now = time.perf_counter(), time.process_time()
        if before is not None:
            seconds.append(now[0] - before[0])
            cpu_seconds.append(now[1] - before[1])
        before = now


def _from_pool(command: list[str], num_clips: int) -> Iterator[Iterable[Frame]]:
    policy = ExtractConfig(videos=("unused",), out="unused").sampling_policy()
    clips = [Clip(str(number), Path("unused"), 1) for number in range(num_clips + 1)]
    with DecodePool(policy, num_workers=1, timeout_s=60, worker_command=command) as pool:
        for clip in pool.decode(clips):
            if not isinstance(clip, DecodedClip):
                raise SystemExit(f"the decoding process failed: {clip.reason}")
            yield clip.frames.values()


def _from_pool_without_memory_files(
    command: list[str], num_clips: int
) -> Iterator[Iterable[Frame]]:
    with patch.object(os, "memfd_create", side_effect=OSError, create=True):
        yield from _from_pool(command, num_clips)


def _from_socket(num_clips: int, space: Frame) -> Iterator[Iterable[Frame]]:
    ours, theirs = socket.socketpair()
    sender = get_context("fork").Process(target=_send, args=(theirs, num_clips, space.nbytes))
    sender.start()
    received = np.empty_like(space)
    for _ in range(num_clips + 1):
        ours.recv_into(received.data.cast("B"), 0, socket.MSG_WAITALL)
        yield received
    sender.join()


def _send(connection: socket.socket, num_clips: int, num_bytes: int) -> None:
    data = np.ones(num_bytes, np.uint8)
    for _ in range(num_clips + 1):
        connection.sendall(data.data)


if __name__ == "__main__":
    main()
