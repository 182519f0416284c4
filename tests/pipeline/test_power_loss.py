"""The power fails at any write of a run: what says done is whole, and the run goes on.

tests/faults/power_loss.py does it for every command that writes a cache, its JSON tells what was
found; here for an extraction alone.
"""

import ctypes
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FAULTS = Path(__file__).parents[1] / "faults"
PROGRAM = """
import ctypes, os, shutil, sys
from pathlib import Path
recorder, top = ctypes.CDLL(None), Path(sys.argv[1])
recorder.record_start(bytes(top), sys.argv[2].encode(), b"")
folder = top / "folder"
folder.mkdir()
(folder / "a").write_bytes(b"one" * 5000)
with (folder / "a").open("r+b") as file:
    file.seek(7)
    file.write(b"two")
    file.truncate(9000)
    os.pwrite(file.fileno(), b"three", 9998)
    os.writev(file.fileno(), [b"fo", b"ur"])
with (folder / "a").open("ab") as file:
    file.write(b"five")
os.link(folder / "a", folder / "b")
os.replace(folder / "b", top / "b")
shutil.copyfile(folder / "a", folder / "c")
os.chdir(folder)
os.rename("c", "d")
shutil.copytree(folder, top / "gone")
shutil.rmtree(top / "gone")
(folder / "d").write_bytes(b"")
recorder.record_stop()
(folder / "later").write_bytes(b"not recorded")
"""


@pytest.fixture(scope="module")
def disk() -> ModuleType:
    """tests/faults/disk.py."""
    spec = importlib.util.spec_from_file_location("disk", FAULTS / "disk.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["disk"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cc() -> str:
    """A C compiler."""
    found = shutil.which("cc")
    if found is None or sys.platform != "linux" or ctypes.sizeof(ctypes.c_long) != 8:
        pytest.skip("no C compiler here, or no 64-bit Linux to preload into")
    return found


def test_a_log_replayed_gives_the_folder(disk: ModuleType, tmp_path: Path, cc: str) -> None:
    library, top, log = tmp_path / "record.so", tmp_path / "top", tmp_path / "log"
    source = FAULTS / "record_writes.c"
    command = [cc, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, source]
    subprocess.run([*command, "-lpthread"], check=True)
    top.mkdir()
    (top / "old").write_bytes(b"old")
    before, inodes = disk.get_tree(top), disk.get_inodes(top)
    subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, top, log],
        env={"LD_PRELOAD": str(library)},
        check=True,
    )
    (top / "folder/later").unlink()
    replayed = disk.Disk(before, inodes)
    for write in disk.read_log(log, top):
        replayed.apply(write)
    assert replayed.tree() == disk.get_tree(top)
    # Nothing was flushed, so all of it may be gone.
    assert any(tree == before for _, tree in replayed.states())


def states(
    disk: ModuleType, *operations: tuple[str, str, str, int, bytes]
) -> list[dict[str, bytes]]:
    """Trees that may be found after these writes; inode 1 is the folder, which holds x: b"old"."""
    replayed = disk.Disk({"x": b"old"}, {".": 1, "x": 2})
    for name, path, other, inode, data in operations:
        replayed.apply(disk.Write(disk.Operation[name], path, other, inode, 0, data))
    return [tree for _, tree in replayed.states()]


CREATE = ("CREATE", "p", "", 3, b"")
WRITE = ("WRITE", "p", "", 3, b"newer")
SYNC_FILE = ("SYNC", "p", "", 3, b"")
RENAME = ("RENAME", "p", "x", 0, b"")
SYNC_FOLDER = ("SYNC", ".", "", 1, b"")


@pytest.mark.parametrize(
    ("operations", "found"),
    [
        # Written in place of the old one without any flush: it may be empty, zeros, a part.
        ((CREATE, WRITE, RENAME), {b"old", b"", b"newer", bytes(5), b"ne\0\0\0"}),
        ((CREATE, WRITE, RENAME, SYNC_FOLDER), {b"", b"newer", bytes(5), b"ne\0\0\0"}),
        ((CREATE, WRITE, SYNC_FILE, RENAME), {b"old", b"newer"}),
        ((CREATE, WRITE, SYNC_FILE, RENAME, SYNC_FOLDER), {b"newer"}),
    ],
)
def test_only_what_was_flushed_is_safe(
    disk: ModuleType, operations: tuple[tuple[str, str, str, int, bytes], ...], found: set[bytes]
) -> None:
    assert {tree["x"] for tree in states(disk, *operations)} == found


def test_names_given_since_a_flush_may_be_there_in_any_order(disk: ModuleType) -> None:
    more = [("CREATE", name, "", inode, b"") for name, inode in (("data", 3), ("record", 4))]
    found = {frozenset(tree) - {"x"} for tree in states(disk, *more)}
    assert found == {frozenset(names) for names in ((), ("data",), ("record",), ("data", "record"))}


@pytest.mark.slow
def test_an_extraction_survives_a_power_loss_at_any_write(tmp_path: Path, cc: str) -> None:
    result = tmp_path / "found.json"
    words = ["--quick", "--only", "extract", "--folder", tmp_path / "runs", "--json", result]
    subprocess.run(
        [sys.executable, FAULTS / "power_loss.py", *words], check=True, capture_output=True
    )
    found = json.loads(result.read_text())["extract"]
    assert found["problems"] == []
    assert found["cut_points"] > 100
    assert found["complete"] == 1
    # Without one of its flushes it does not: but for names that are flushed again in time.
    assert found["mutants_found"] > 10
    assert all(" after " in missed for missed in found["mutants_missed"])
