"""What the fault drivers share: little caches, reading all of one, and children that may die.

    python tests/faults/reading.py --make FOLDER      one little cache of each kind, with its truth

Made by a process of its own, so that the drivers stay small: writing imports torch and zarr, and a
driver forks thousands of children.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import deltatok.shards.reader
from deltatok.shards import DeltaShards, DeltatokError, PatchShards
from deltatok.shards.tools.verify import verify_cache

HERE = Path(__file__).resolve()
KINDS = ("float16", "bfloat16", "int8", "zstd", "delta")
FOUND, SAME, REFUSED, WRONG = "found", "same", "refused", "wrong"


@dataclass(frozen=True)
class Outcome:
    """How a child ended."""

    result: Any
    """What its function gave, a JSON value; None if it did not end well."""
    fault: str | None
    """What it died of: an exception that is none of ours, a signal, the time limit."""


def make_caches(folder: Path) -> None:
    """A little cache of every kind in FOLDER/KIND, and FOLDER/KIND.json: a digest of its values."""
    command = [sys.executable, str(HERE), "--make", str(folder)]
    subprocess.run(command, check=True, timeout=300)


def read_all(folder: Path, kind: str, *, verify: str, many: bool = False) -> dict[str, str]:
    """Everything a reader gives, as a digest for each column. `many` shards: the files are not
    looked at when the cache is opened."""
    opening: Any = deltatok.shards.reader
    before = opening.EAGER_SHARDS
    opening.EAGER_SHARDS = 0 if many else before
    try:
        return _read_all(folder, kind, verify=verify)
    finally:
        opening.EAGER_SHARDS = before


def _read_all(folder: Path, kind: str, *, verify: str) -> dict[str, str]:
    cls: Any = DeltaShards if kind == "delta" else PatchShards
    reader = cls(folder, verify=verify)
    windows = np.arange(reader.num_windows)
    names = [reader.keys[clip] for clip in reader.clip_index.tolist()]
    columns: dict[str, Any] = {
        "tokens": reader.tokens(windows).tobytes(),
        "timestamps_s": reader.timestamps_s(windows).tobytes(),
        "clips": json.dumps(names).encode(),
        "labels": json.dumps([reader.labels, reader.splits]).encode(),
    }
    if kind == "delta":
        columns["windows"] = json.dumps([reader.window(i) for i in windows.tolist()]).encode()
    else:
        columns["frame_index"] = reader.frame_index(windows).tobytes()
        columns["crop"] = reader.crop.tobytes()
        columns["flipped"] = reader.flipped.tobytes()
        columns["black"] = reader.black.tobytes()
    return {name: hashlib.sha256(data).hexdigest() for name, data in columns.items()}


def read_outcome(folder: Path, kind: str, truth: dict[str, str], **how: Any) -> str:
    """SAME as `truth`, REFUSED by one of our errors, or WRONG."""
    try:
        return SAME if read_all(folder, kind, **how) == truth else WRONG
    except DeltatokError:
        return REFUSED


def verify_outcome(folder: Path, *, deep: bool) -> str:
    """FOUND if verify names a problem, SAME if it does not."""
    try:
        return FOUND if verify_cache(folder, deep=deep).problems else SAME
    except DeltatokError:
        return FOUND


def in_child(function: Callable[[], Any], *, seconds: float, extra_bytes: int) -> Outcome:
    """Runs `function` in a forked child that may take so long and so much more memory."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os._exit(_child(function, writing, extra_bytes))
    os.close(writing)
    data, deadline = b"", time.monotonic() + seconds
    try:
        while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
            more = os.read(reading, 1 << 16)
            if not more:
                break
            data += more
        else:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        fault = f"no end within {seconds:g} s" if number == signal.SIGKILL else f"signal {number}"
        return Outcome(None, fault)
    answer = json.loads(data) if data else {"fault": f"exit {os.waitstatus_to_exitcode(status)}"}
    return Outcome(answer.get("result"), answer.get("fault"))


def _child(function: Callable[[], Any], writing: int, extra_bytes: int) -> int:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + extra_bytes, size + extra_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        answer = {"result": function()}
    except BaseException as error:  # what is no DeltatokError is what is looked for
        trace = error.__traceback__
        place = ""
        while trace is not None:
            code = trace.tb_frame.f_code
            if "shards" in code.co_filename:
                place = f"{Path(code.co_filename).name}:{trace.tb_lineno}"
            trace = trace.tb_next
        answer = {"fault": f"{type(error).__name__} at {place}: {str(error)[:200]}"}
    with contextlib.suppress(BrokenPipeError):
        os.write(writing, json.dumps(answer).encode())
    return 0


def cache_files(folder: Path) -> list[Path]:
    """All files of a cache, in a fixed order."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _make(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("little", HERE.parents[1] / "shards/conftest.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError("tests/shards/conftest.py")
    little = importlib.util.module_from_spec(spec)
    sys.modules["little"] = little
    spec.loader.exec_module(little)
    for kind in KINDS:
        if kind == "delta":
            little.make_deltas(folder / kind)
        elif kind == "zstd":
            little.make_patches(folder / kind, compression="zstd")
        else:
            little.make_patches(folder / kind, dtype=kind)
        truth = read_all(folder / kind, kind, verify="sha256")
        (folder / f"{kind}.json").write_text(json.dumps(truth))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--make", type=Path, required=True, metavar="FOLDER")
    _make(parser.parse_args().make)
