"""One bad clip costs one clip, whatever its decoder does, and no process outlives its pool.

The processes here are real and their mishaps too: a busy loop, a signal, garbage on the pipe. Only
the decoding is pretended, so that a clip takes no time: the key of a clip says what it does.
"""

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from deltatok.extract.decoding import pool as pool_module
from deltatok.extract.decoding.clip import DecodedClip
from deltatok.extract.decoding.pool import TICK_S, DecodePool
from deltatok.extract.sources.clip import Clip
from deltatok.extract.sources.find import find_clips
from deltatok.shards.errors import DeltatokError
from deltatok.shards.records import Quarantined
from deltatok.shards.sampling import SamplingPolicy

TIMEOUT_S = 2.0

WORKER = """
import ctypes, os, signal, sys
import numpy as np
from deltatok.extract.decoding.clip import DecodedClip
from deltatok.extract.decoding import worker
from deltatok.shards.sampling import WindowDraw
from deltatok.shards.errors import ClipError

def decode(request, starting):
    key, again = request.clip.key, request.decoder == "pyav"
    with open(request.clip.path.parent / "pids", "a") as file:
        file.write(f"{os.getpid()}\\n")
    starting("pyav" if again else "decord")
    if "hang" in key and ("always" in key or not again):
        while True:
            ctypes.PyDLL(None).pause()  # native code that keeps the GIL
    if "segfault" in key:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "exit" in key:
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(3)
    if "raise" in key:
        raise KeyError("a bug")
    if "talk" in key:
        for _ in range(2000):
            print("x" * 1000)
        sys.stdout.flush()
    if "fat" in key:
        hog = np.ones(2**29, np.uint8)
        while True:
            pass
    if "unusable" in key:
        raise ClipError("too short to be a clip", stage="sample")
    draw = WindowDraw((0, 1), (0.0, 0.04), (0, 0, 64, 64), False)
    other = WindowDraw((1, 0), (0.04, 0.0), (0, 0, 64, 64), True)
    level = int(key.split()[-1]) if "number" in key else 1
    size = (64, 64 + 32 * (level * 5 % 7), 3)  # larger and smaller ones in turn
    size = size if "number" in key else (64, 64, 3)
    frames = {index: np.full(size, level * index, np.uint8) for index in (0, 1)}
    return DecodedClip(key, "pyav" if again else "decord", [draw, other], frames)

worker.main(sys.argv[1:], decode=decode)
"""

Run = Callable[..., list[DecodedClip | Quarantined]]
MakePolicy = Callable[..., SamplingPolicy]


@pytest.fixture
def open_pool(make_policy: MakePolicy, tmp_path: Path) -> Callable[..., DecodePool]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def make(**changes: Any) -> DecodePool:
        options: dict[str, Any] = {
            "num_workers": 2,
            "timeout_s": TIMEOUT_S,
            "worker_command": [sys.executable, "-P", str(script)],
        }
        return DecodePool(make_policy(), **(options | changes))

    return make


@pytest.fixture
def clips(tmp_path: Path) -> Callable[..., list[Clip]]:
    return lambda *keys: [Clip(key, tmp_path / key, 1) for key in keys]


@pytest.fixture
def pids(tmp_path: Path) -> Callable[[], list[int]]:
    """Ids of the processes that took a clip, in order."""
    path = tmp_path / "pids"
    return lambda: [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.fixture
def run(open_pool: Callable[..., DecodePool], clips: Callable[..., list[Clip]]) -> Run:
    def call(*keys: str, **changes: Any) -> list[DecodedClip | Quarantined]:
        with open_pool(**changes) as pool:
            return list(pool.decode(clips(*keys)))

    return call


def _names(results: list[DecodedClip | Quarantined]) -> list[str]:
    return [r.key if isinstance(r, DecodedClip) else f"({r.clip})" for r in results]


def _num_memory_files() -> int:
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            if "deltatok-frames" in str(link.readlink()):
                found.add(link.stat().st_ino)
    return len(found)


def _check_gone(pids: list[int]) -> None:
    """Every process ends within seconds; a zombie counts as ended."""
    alive = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except psutil.NoSuchProcess:
            continue
    assert not psutil.wait_procs(alive, timeout=10)[1]


def test_results_come_in_the_order_of_the_clips(run: Run) -> None:
    keys = ["hang", *(f"clip{i}" for i in range(12))]
    results = run(*keys, num_workers=3)
    assert _names(results) == keys


@pytest.mark.parametrize("memory", ["memory file", "temporary file"])
def test_windows_and_pixels_arrive(run: Run, monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    if memory == "temporary file":  # macOS
        monkeypatch.delattr(os, "memfd_create", raising=False)
    (clip,) = run("clip")
    assert isinstance(clip, DecodedClip)
    first, second = clip.windows
    for frame in clip.frames_of(first):
        assert (frame.shape, frame.dtype) == ((64, 64, 3), np.uint8)
        assert not frame.flags.writeable
    assert [int(frame.mean()) for frame in clip.frames_of(first)] == [0, 1]
    assert [int(frame.mean()) for frame in clip.frames_of(second)] == [1, 0]
    assert second.flipped


def test_limit_on_the_size_of_files_is_not_for_frames(run: Run) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        (clip,) = run("clip")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(clip, DecodedClip)


def test_hanging_decord_is_killed_and_pyav_takes_the_clip(run: Run) -> None:
    before, clip, after = run("a", "hang", "b")
    assert isinstance(clip, DecodedClip)
    assert clip.decoder == "pyav"
    assert _names([before, after]) == ["a", "b"]


BAD = [
    ("hang always", r"decord hung for 2 s \(killed\); second try: PyAV hung for 2 s \(killed\)"),
    ("segfault", r"decord crashed: signal 11 \(SIGSEGV\); second try: PyAV crashed: signal 11 .*"),
    ("exit", r"decord exited with status 3 \(out of luck\); second try: PyAV exited with .*"),
    ("raise", r"decord exited with status 1 \(KeyError: 'a bug'\); second try: .*"),
]


@pytest.mark.parametrize(("key", "reason"), BAD)
def test_bad_clip_costs_one_clip(run: Run, key: str, reason: str) -> None:
    results = run("a", key, "b", "c", "d")
    assert _names(results) == ["a", f"({key})", "b", "c", "d"]
    bad = results[1]
    assert isinstance(bad, Quarantined)
    assert (bad.stage, bad.attempts) == ("decode", 2)
    assert re.fullmatch(reason, bad.reason)


def test_own_pause_is_not_blamed_on_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 10 s this process is stopped for an hour; the worker has 60 s all the same."""
    clock = SimpleNamespace(now_s=1000.0, turns=0)

    def wait(_sources: object, timeout_s: float) -> list[object]:
        clock.turns += 1
        clock.now_s += 3600.0 if clock.turns == 10 / TICK_S else timeout_s
        return []

    worker = pool_module._Worker(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        max_memory_bytes=2**30,
        max_kept_bytes=0,
        closing=threading.Event(),
    )
    monkeypatch.setattr(pool_module, "wait", wait)
    monkeypatch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    with pytest.raises(pool_module._WorkerFailed, match="hung for 60 s"):
        worker._receive(60.0)
    worker.kill()
    assert clock.turns == 60 / TICK_S + 1


def test_refusal_is_not_tried_again(run: Run) -> None:
    (result,) = run("unusable")
    wanted = Quarantined(
        clip="unusable", stage="sample", reason="too short to be a clip", attempts=1
    )
    assert result == wanted


def test_chatty_decoder_is_no_obstacle(run: Run) -> None:
    assert _names(run("talk", "talk again")) == ["talk", "talk again"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_decoder_that_eats_memory_is_killed(run: Run) -> None:
    limits = {"max_worker_rss": 2**28, "max_clip_bytes": 2**20, "timeout_s": 60}
    bad, good = run("fat", "a", **limits)
    assert isinstance(bad, Quarantined)
    assert re.match(r"decord took 0\.\d GB .*; second try: PyAV took 0\.\d GB", bad.reason)
    assert _names([good]) == ["a"]


def test_no_clips_start_no_process(run: Run, pids: Callable[[], list[int]]) -> None:
    assert run() == []
    assert pids() == []


def test_processes_are_kept_from_one_call_to_the_next(
    open_pool: Callable[..., DecodePool],
    clips: Callable[..., list[Clip]],
    pids: Callable[[], list[int]],
) -> None:
    with open_pool(num_workers=1) as pool:
        for _ in range(3):
            assert len(list(pool.decode(clips("a", "b")))) == 2
    assert len(set(pids())) == 1


def test_process_is_replaced_after_its_share_of_clips(
    run: Run, pids: Callable[[], list[int]]
) -> None:
    run(*"abcdef", num_workers=1, max_clips_per_worker=2)
    assert len(set(pids())) == 3


def test_frames_outlive_the_process_they_came_from(run: Run, pids: Callable[[], list[int]]) -> None:
    (clip,) = run("clip", max_clips_per_worker=1)
    _check_gone(pids())
    assert isinstance(clip, DecodedClip)
    assert [int(clip.frames[index].max()) for index in (0, 1)] == [0, 1]


def test_only_so_many_clips_are_read_ahead(
    open_pool: Callable[..., DecodePool], clips: Callable[..., list[Clip]]
) -> None:
    taken = []

    def source() -> Iterator[Clip]:
        for clip in clips(*(f"clip{i}" for i in range(20))):
            taken.append(clip)
            yield clip

    with open_pool(look_ahead=3) as pool:
        results = pool.decode(source())
        next(results)
        assert len(taken) == 4


def test_little_memory_for_waiting_clips_still_gives_all(run: Run) -> None:
    keys = [f"clip{i}" for i in range(8)]
    assert _names(run(*keys, max_waiting_bytes=1, num_workers=3)) == keys


def test_no_clip_is_begun_while_enough_wait(
    open_pool: Callable[..., DecodePool],
    clips: Callable[..., list[Clip]],
    pids: Callable[[], list[int]],
) -> None:
    keys = [f"clip{i}" for i in range(12)]
    with open_pool(max_waiting_bytes=1, look_ahead=8) as pool:
        for number, _ in enumerate(pool.decode(clips(*keys))):
            assert len(pids()) <= number + 1 + 2  # two at work; then a decoded one waits


@pytest.mark.skipif(sys.platform != "linux", reason="open files are read from /proc")
def test_memory_is_used_again_when_its_frames_are_gone(
    open_pool: Callable[..., DecodePool], clips: Callable[..., list[Clip]]
) -> None:
    with open_pool(num_workers=1) as pool:
        results = pool.decode(clips(*(f"clip{i}" for i in range(20))))
        while next(results, None) is not None:
            assert _num_memory_files() <= 3  # of the one just given, and two decoded ahead
    assert _num_memory_files() == 0


def test_frames_in_use_are_not_written_over(
    open_pool: Callable[..., DecodePool], clips: Callable[..., list[Clip]]
) -> None:
    with open_pool(num_workers=1) as pool:
        kept = []
        for number, clip in enumerate(pool.decode(clips(*(f"number {i}" for i in range(12))))):
            assert isinstance(clip, DecodedClip)
            if number % 3 == 0:
                kept.append((number, clip.frames[1]))
        assert [int(frames.max()) for _, frames in kept] == [number for number, _ in kept]
        assert [int(frames.min()) for _, frames in kept] == [number for number, _ in kept]


@pytest.mark.parametrize("how", ["break", "error", "interrupt"])
def test_leaving_the_loop_early_kills_all_processes(
    open_pool: Callable[..., DecodePool],
    clips: Callable[..., list[Clip]],
    pids: Callable[[], list[int]],
    how: str,
) -> None:
    errors = {"error": ValueError, "interrupt": KeyboardInterrupt}

    def leave_early(pool: DecodePool) -> None:
        for _ in pool.decode(clips("a", "hang always", "b", "c")):
            if how in errors:
                raise errors[how]
            break

    with open_pool() as pool:
        if how in errors:
            with pytest.raises(errors[how]):
                leave_early(pool)
        else:
            leave_early(pool)
        _check_gone(pids())
        assert _names(list(pool.decode(clips("d")))) == ["d"]
    _check_gone(pids())


@pytest.mark.parametrize("how", ["-c", "stdin"])
def test_pool_needs_no_main_module_of_its_user(videos: Any, tmp_path: Path, how: str) -> None:
    """As in a notebook: nothing there that a decoding process could import."""
    video = videos.write("main.mp4").rename(tmp_path / "main.mp4")
    code = (
        "from deltatok.extract.config import ExtractConfig\n"
        "from deltatok.extract.decoding.pool import DecodedClip, DecodePool\n"
        "from deltatok.extract.sources.find import find_clips\n"
        f"clips = find_clips([{str(video)!r}])\n"
        "policy = ExtractConfig(videos=('v',), out='o').sampling_policy()\n"
        "with DecodePool(policy, num_workers=1, timeout_s=60) as pool:\n"
        "    (clip,) = pool.decode(clips)\n"
        "assert isinstance(clip, DecodedClip)\n"
    )
    command = [sys.executable, "-P", *(["-c", code] if how == "-c" else [])]
    ended = subprocess.run(command, input=code, text=True, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel kills orphans only on Linux")
def test_processes_die_with_a_killed_parent(
    tmp_path: Path, open_pool: Callable[..., DecodePool], pids: Callable[[], list[int]]
) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from deltatok.extract.decoding.pool import DecodePool\n"
        "from deltatok.shards.sampling import SamplingPolicy\n"
        "from deltatok.extract.sources.clip import Clip\n"
        "from deltatok.extract.config import ExtractConfig\n"
        "here = Path(sys.argv[1])\n"
        "policy = ExtractConfig(videos=('v',), out='o').sampling_policy()\n"
        "command = [sys.executable, '-P', str(here / 'worker.py')]\n"
        "clips = [Clip(key, here / key, 1) for key in ('a', 'hang always')]\n"
        "with DecodePool(policy, num_workers=1, timeout_s=600, worker_command=command) as pool:\n"
        "    for _ in pool.decode(clips):\n"
        "        while len((here / 'pids').read_text().split()) < 2:\n"
        "            pass\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-P", str(script), str(tmp_path)], timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert len(pids()) == 2
    _check_gone(pids())


def test_signals_for_the_parent_do_not_end_a_process(
    open_pool: Callable[..., DecodePool],
    clips: Callable[..., list[Clip]],
    pids: Callable[[], list[int]],
) -> None:
    with open_pool(num_workers=1) as pool:
        list(pool.decode(clips("a")))
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pids()[0], number)
        assert _names(list(pool.decode(clips("b")))) == ["b"]
    assert len(set(pids())) == 1


def test_processes_that_cannot_start_stop_the_run(
    open_pool: Callable[..., DecodePool], clips: Callable[..., list[Clip]]
) -> None:
    command = [sys.executable, "-c", "import no_such_module"]
    words = r"no decoding process can be started: decoder exited with status 1 \(ModuleNotFoundErr"
    with open_pool(worker_command=command) as pool, pytest.raises(DeltatokError, match=words):
        list(pool.decode(clips("a")))


def test_decode_outside_the_pool_is_refused(
    open_pool: Callable[..., DecodePool], clips: Callable[..., list[Clip]]
) -> None:
    with pytest.raises(RuntimeError, match="inside `with DecodePool"):
        next(open_pool().decode(clips("a")))


def test_corrupt_file_among_good_ones_costs_one(videos: Any, make_policy: MakePolicy) -> None:
    for name in ("a.mp4", "b.mp4", "d.mp4"):
        videos.write(name)
    (videos.folder / "c.mp4").write_bytes((videos.folder / "a.mp4").read_bytes()[:500])
    with DecodePool(make_policy(), num_workers=2, timeout_s=60) as pool:
        results = list(pool.decode(find_clips([videos.folder])))
    assert _names(results) == ["a.mp4", "b.mp4", "(c.mp4)", "d.mp4"]
    for clip in results:
        if isinstance(clip, DecodedClip):
            for window in clip.windows:
                numbers = [videos.number(frame) for frame in clip.frames_of(window)]
                assert numbers == list(window.frame_index)


def test_worker_imports_neither_torch_nor_decord() -> None:
    code = (
        "import sys, deltatok.extract.decoding.worker; "
        "sys.exit(' '.join({'torch', 'decord', 'zarr', 'webdataset'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert ended.stderr.strip() == ""
