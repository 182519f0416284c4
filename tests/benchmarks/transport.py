"""How fast decoded frames get from a decoding process to the pool, beside a copy within a process.

    python tests/benchmarks/transport.py --json FILE

A process that decodes nothing sends a clip of random frames again and again, through the pool's
own code: in memory files, and in temporary files as on systems without them. The pool's side copies
every clip once, as cropping does. Beside it: the same copy of a clip that lies in this process
already, and the same clip through a socket.

JSON: bytes/s, medians over the clips: memory, file, socket, copy; the ratios of the first three to
the last; clip_bytes; and what counts where many processes share one pool: CPU seconds that a GB
costs this process, its copy included: memory_cpu_s_per_gb, file_cpu_s_per_gb.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from deltatok.extract.config import ExtractConfig
from deltatok.extract.decoding.clip import DecodedClip
from deltatok.extract.decoding.pool import DecodePool
from deltatok.extract.sources.clip import Clip

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
    parser.add_argument("--clips", type=int, default=20, help="clips each way [20]")
    parser.add_argument("--frames", type=int, default=32, help="frames in a clip [32]")
    parser.add_argument("--size", type=int, nargs=2, default=(720, 1280), help="[720 1280]")
    arguments = parser.parse_args()
    size = (arguments.frames, *arguments.size)
    space = np.ones((*size, 3), np.uint8)  # its memory is there before anything is timed
    with TemporaryDirectory() as folder:
        script = Path(folder) / "worker.py"
        script.write_text(WORKER)
        command = [sys.executable, "-P", str(script), *map(str, size)]
        rates = {"memory": _rate(command, arguments.clips, space)}
        if hasattr(os, "memfd_create"):
            del os.memfd_create
        rates["file"] = _rate(command, arguments.clips, space)
    socket_rate = _socket_rate(arguments.clips, space)
    frames = list(np.ones_like(space))
    times_s = [time.perf_counter()]
    for _ in range(arguments.clips):
        _copy(frames, space)
        times_s.append(time.perf_counter())
    copy_rate = space.nbytes / float(np.median(np.diff(times_s)))
    result = {
        "memory_bytes_per_s": rates["memory"][0],
        "file_bytes_per_s": rates["file"][0],
        "socket_bytes_per_s": socket_rate,
        "copy_bytes_per_s": copy_rate,
        "memory_over_copy": rates["memory"][0] / copy_rate,
        "file_over_copy": rates["file"][0] / copy_rate,
        "socket_over_copy": socket_rate / copy_rate,
        "memory_cpu_s_per_gb": rates["memory"][1],
        "file_cpu_s_per_gb": rates["file"][1],
        "clip_bytes": space.nbytes,
    }
    text = json.dumps(result, indent=1)
    arguments.json.write_text(f"{text}\n")
    print(text)


def _rate(command: list[str], num_clips: int, space: NDArray[np.uint8]) -> tuple[float, float]:
    """Bytes/s (median) and CPU seconds a GB of this process, from the second clip on; every clip
    is copied to `space`."""
    policy = ExtractConfig(videos=("unused",), out="unused").sampling_policy()
    clips = [Clip(str(number), Path("unused"), 1) for number in range(num_clips + 1)]
    with DecodePool(policy, num_workers=1, timeout_s=60, worker_command=command) as pool:
        decoded = pool.decode(clips)
        next(decoded)
        times_s, cpu_s = [time.perf_counter()], time.process_time()
        for clip in decoded:
            if not isinstance(clip, DecodedClip):
                raise SystemExit(f"the decoding process failed: {clip.reason}")
            _copy(clip.frames.values(), space)
            times_s.append(time.perf_counter())
        cpu_s_per_gb = (time.process_time() - cpu_s) / (num_clips * space.nbytes / 1e9)
        return space.nbytes / float(np.median(np.diff(times_s))), cpu_s_per_gb


def _socket_rate(num_clips: int, space: NDArray[np.uint8]) -> float:
    """Bytes/s (median) of clips that another process sends; each is copied to `space` as well."""
    ours, theirs = socket.socketpair()
    sender = get_context("fork").Process(target=_send, args=(theirs, num_clips, space.nbytes))
    sender.start()
    received = np.empty_like(space)
    times_s = []
    for _ in range(num_clips + 1):
        ours.recv_into(received.data.cast("B"), 0, socket.MSG_WAITALL)
        _copy(received, space)
        times_s.append(time.perf_counter())
    sender.join()
    return space.nbytes / float(np.median(np.diff(times_s)))


def _send(connection: socket.socket, num_clips: int, num_bytes: int) -> None:
    data = np.ones(num_bytes, np.uint8)
    for _ in range(num_clips + 1):
        connection.sendall(data.data)


def _copy(frames: Iterable[NDArray[np.uint8]], space: NDArray[np.uint8]) -> None:
    for copy, frame in zip(space, frames, strict=True):
        copy[...] = frame


if __name__ == "__main__":
    main()
