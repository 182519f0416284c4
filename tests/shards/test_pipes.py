"""Pipes, sockets and devices in place of files: refused at once, never waited for."""

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from deltatok.shards import DeltaShards, DeltatokError, PatchShards
from deltatok.shards.files import open_append, open_regular, read_text, sha256_file
from deltatok.shards.npy import map_npy
from deltatok.shards.records import append_timing
from deltatok.shards.schema import read_json
from deltatok.shards.tools.info import describe_cache
from deltatok.shards.tools.verify import verify_cache

SECONDS = 20


@contextmanager
def no_waiting() -> Iterator[None]:
    """What takes longer than SECONDS within fails."""

    def late(_number: int, _frame: FrameType | None) -> None:
        pytest.fail(f"waited {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def make_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


MAKERS = [os.mkfifo, make_socket, make_zeros]


def read_everything(folder: Path, *, kind: str) -> None:
    """All that a reader gives; needs nothing but the files that are read by name."""
    if kind == "deltas":
        deltas = DeltaShards(folder, verify="size")
        deltas.load()
        deltas.table()
        _ = deltas.labels, deltas.read_block(0)
        return
    patches = PatchShards(folder)
    patches.load()
    patches.table()
    _ = patches.labels, patches.black
    if patches.dtype == "int8":
        _ = patches.channel_scale


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("kind", ["patches", "int8", "deltas"])
def test_no_file_of_a_cache_is_waited_for(
    little: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    many: bool,
) -> None:
    if many:
        monkeypatch.setattr("deltatok.shards.reader.EAGER_SHARDS", 0)
    if kind == "deltas":
        whole = little.make_deltas(tmp_path / "whole").folder
    else:
        dtype = "int8" if kind == "int8" else "float16"
        whole = little.make_patches(tmp_path / "whole", dtype=dtype).folder
    names = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    unread = {"NOTICE.txt", "quarantine.jsonl", "shards/000000.json", "shards/000001.json"}
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with no_waiting():
            if str(name) not in unread:
                with pytest.raises(DeltatokError):
                    read_everything(folder, kind=kind)
            with suppress(DeltatokError):
                assert verify_cache(folder, deep=True).problems, name
                describe_cache(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("read", [open_regular, open_append, sha256_file, read_text, map_npy])
def test_what_opens_by_name_takes_regular_files_alone(
    tmp_path: Path, make: Callable[[Path], None], read: Callable[[Path], object]
) -> None:
    make(tmp_path / "file")
    with no_waiting(), pytest.raises(OSError):
        read(tmp_path / "file")
    with no_waiting(), pytest.raises(DeltatokError):
        read_json(tmp_path / "file")


def test_a_line_of_timings_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "timings.jsonl")
    with no_waiting(), pytest.raises(OSError):
        append_timing(tmp_path, {"shard": 0})


def test_regular_files_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    (tmp_path / "link.npy").symlink_to("a.npy")
    assert map_npy(tmp_path / "link.npy").tolist() == [0, 1, 2]
    (tmp_path / "text").write_text("é", encoding="utf-8")
    assert read_text(tmp_path / "text") == "é"
