"""Clips in, windows of pixels out, in order; decoded ahead by processes that may hang or crash.

decord can spin for ever holding the GIL, crash, or leak, so no clip is decoded in this process.
One bad clip costs one clip: its decoder is killed after a wall-clock deadline and replaced, the
clip is tried once more (with PyAV), and then quarantined with what happened.

A thread of the pool sees a clip through from request to result: it takes an idle process or starts
one, and waits for its answer. Frames come through memory files that both sides keep and use again,
because fresh memory costs more than the copy.
"""

import contextlib
import logging
import mmap
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from itertools import count
from multiprocessing.connection import Pipe, wait
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ...shards.errors import DeltatokError
from ...shards.records import Quarantined
from ...shards.running.devices import launched, num_cores
from ..config import DecoderChoice, ExtractConfig, RunConfig
from ..datasets.windows import Policy
from ..sources.clip import Clip
from .backends import frames_used
from .clip import DecodedClip
from .worker import DecodeRequest

logger = logging.getLogger(__name__)

SERVE = "import sys; from deltatok.extract.decoding.worker import main; main(sys.argv[1:])"
WORKER_COMMAND = (sys.executable, "-P", "-c", SERVE)
"""-P: the current folder is no place to import from. No -m: pickle must find the classes of the
messages where it finds them in the worker, which is not in __main__."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""A decoding process multiplies no matrices: it needs none of the thread pools of numpy."""

START_TIMEOUT_S = 120.0
"""For a process to import what it needs; minutes happen on a network disk (a guess)."""

END_TIMEOUT_S = 5.0
"""For a process that has closed its connection to end (a guess)."""

MAX_STARTS = 3
"""Processes that end in a row before they are ready: then none will start (a guess)."""

TICK_S = 0.25
"""How often deadlines, memory and the end of the pool are looked at while a process is busy."""

OUTPUT_BYTES = 4096
"""How much of the end of what a process prints is kept, to say why it died."""

LOOK_AHEAD = 2
"""Clips for every process that are decoded ahead of the one asked for."""

KEPT_SHARE = 8
"""Memory that waits for the next clip is at most about 1/8 of that for decoded clips: it pays for
small clips, of which there are many (8 MB are 32 frames of 256x340)."""

DOWNLOAD_TIMEOUT_S = 600.0
"""Without a byte: longer than a store's requests are repeated (a guess)."""

DECODER_NAMES = {
    "decord": "decord",
    "torchcodec": "torchcodec",
    "pyav": "PyAV",
    "frames": "Pillow",
    "download": "download",
}


@dataclass(eq=False)
class DecodePool:
    """Decoding processes, kept from one `decode` to the next; a context manager."""

    policy: Policy
    _: KW_ONLY
    num_workers: int
    """Decoding processes, started when there is work for them."""
    timeout_s: float
    """Wall-clock seconds a clip may take in one try."""
    max_clips_per_worker: int = 200
    """A process is replaced after this many clips (decord leaks)."""
    max_worker_rss: int = 2 * 2**30
    """Bytes; a process that keeps more than this is replaced, one that takes this and
    `max_clip_bytes` together while it decodes is killed (Linux)."""
    max_clip_bytes: int = 4 * 2**30
    """Bytes of RGB a clip's windows may have; more goes to quarantine."""
    max_waiting_bytes: int = 2 * 2**30
    """Bytes of decoded clips to keep ahead; no more clips are begun above it."""
    look_ahead: int = 0
    """Clips decoded ahead of the one asked for; 0: LOOK_AHEAD for every process."""
    decode_threads: int = 1
    """Threads in a process."""
    decoder: DecoderChoice = "auto"
    """Who tries a video first."""
    worker_command: Sequence[str] = WORKER_COMMAND
    """What to start; a descriptor and this process's id are appended."""

    def __post_init__(self) -> None:
        self.look_ahead = self.look_ahead or LOOK_AHEAD * self.num_workers
        self._threads: ThreadPoolExecutor | None = None
        self._closing = threading.Event()
        self._idle: list[_Worker] = []
        self._decoding = False
        self._room = threading.Condition()
        """Held for the two below; notified when they change."""
        self._wanted = -1
        """The number of the clip that `decode` waits for, or gave last."""
        self._waiting_bytes = 0
        """Of decoded clips that `decode` has not given yet."""

    @classmethod
    def from_config(cls, config: ExtractConfig, policy: Policy) -> Self:
        """As `config` says, for windows by `policy`."""
        return cls(
            policy,
            num_workers=choose_num_workers(config),
            timeout_s=config.decode_timeout_s,
            decode_threads=config.decode_threads,
            decoder=config.decoder,
        )

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> None:
        self._closing.clear()
        self._threads = ThreadPoolExecutor(self.num_workers, thread_name_prefix="decode")

    def close(self) -> None:
        """Kills all processes; a second call does nothing."""
        threads, self._threads = self._threads, None
        if threads is None:
            return
        with self._room:
            self._closing.set()
            self._room.notify_all()
        threads.shutdown(cancel_futures=True)  # each kills the process it waits for
        while self._idle:
            self._idle.pop().kill()

    def decode(self, clips: Iterable[Clip | None]) -> Iterator[DecodedClip | Quarantined]:
        """One result for every clip, in the order of `clips`, which is read only as far as needed.

        clips: None where the next one is not known yet; it is asked for again with every result,
        and all is over once every known clip has been given. Closing
        the iterator early, or any exception in the loop around it, kills all processes.

        Raises:
            DeltatokError: no decoding process can be started, or a clip cannot be had from its
                store for a reason that would hold for all.
        """
        threads = self._threads
        if threads is None or self._decoding:
            raise RuntimeError("decode() runs inside `with DecodePool(...)`, one call at a time")
        source, numbers = iter(clips), count()
        ahead: deque[Future[DecodedClip | Quarantined]] = deque()

        def begin() -> None:
            while len(ahead) < self.look_ahead and (clip := next(source, None)) is not None:
                ahead.append(threads.submit(self._decode, next(numbers), clip))

        self._decoding, self._wanted, self._waiting_bytes, finished = True, -1, 0, False
        try:
            begin()
            while ahead:
                result = self._take(ahead.popleft())
                begin()
                yield result
                del result  # the memory of its frames may be used again
            finished = True
        finally:
            self._decoding = False
            if not finished and self._threads is threads:
                self.close()
                self._open()

    def _take(self, future: "Future[DecodedClip | Quarantined]") -> DecodedClip | Quarantined:
        with self._room:
            self._wanted += 1
            self._room.notify_all()
        result = future.result()
        with self._room:
            self._waiting_bytes -= _num_bytes(result)
            self._room.notify_all()
        return result

    # In the threads of the pool. On Linux a process dies with the thread that started it: these
    # live as long as the pool is open.

    def _decode(self, number: int, clip: Clip) -> DecodedClip | Quarantined:
        with self._room:
            self._room.wait_for(lambda: self._may_begin(number))
        try:
            result = self._try_decoders(clip)
        except OSError as error:  # no fault of the clip's
            raise DeltatokError(
                f"cannot run decoding processes ({error}): "
                "use fewer workers, or raise the limit of open files (ulimit -n)"
            ) from error
        with self._room:
            self._waiting_bytes += _num_bytes(result)
        return result

    def _may_begin(self, number: int) -> bool:
        room = self._waiting_bytes < self.max_waiting_bytes
        return room or number <= self._wanted or self._closing.is_set()

    def _try_decoders(self, clip: Clip) -> DecodedClip | Quarantined:
        failures: list[str] = []
        tries: tuple[DecoderChoice, ...] = (self.decoder, "pyav")  # decord is the one that hangs
        for decoder in tries:
            worker = self._borrow_worker()
            request = DecodeRequest(
                clip=clip,
                policy=self.policy,
                decoder=decoder,
                threads=self.decode_threads,
                max_bytes=self.max_clip_bytes,
            )
            try:
                answer = worker.decode(request, timeout_s=self.timeout_s)
            except _WorkerFailed as failure:
                logger.info("%s: %s", clip.key, failure)
                failures.append(str(failure))
                continue
            self._give_back(worker)
            if isinstance(answer, DecodedClip):
                return answer
            return _quarantined(clip, answer.stage, [*failures, answer.reason])
        return _quarantined(clip, "decode", failures)

    def _borrow_worker(self) -> "_Worker":
        """One that waits for work, or a new one; DeltatokError if none can be started."""
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        reason = ""
        for _ in range(MAX_STARTS):
            worker = _Worker(
                self.worker_command,
                max_memory_bytes=self.max_worker_rss + self.max_clip_bytes,
                max_kept_bytes=self.max_waiting_bytes // KEPT_SHARE // self.look_ahead,
                closing=self._closing,
            )
            try:
                worker.wait_until_ready()
                return worker
            except _WorkerFailed as failure:
                reason = str(failure)
        raise DeltatokError(
            f"no decoding process can be started: {reason}: "
            f"run `{shlex.join(self.worker_command)}` by hand to see why"
        )

    def _give_back(self, worker: "_Worker") -> None:
        old = worker.num_clips >= self.max_clips_per_worker
        if old or worker.memory_bytes() > self.max_worker_rss:
            worker.kill()
        else:
            self._idle.append(worker)


class _WorkerFailed(Exception):
    """The process is dead or of no use any more; the text says why."""


class _Worker:
    """A decoding process, and what leads to it; one thread at a time has it. Any exception in
    `wait_until_ready` and `decode` kills it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        max_memory_bytes: int,
        max_kept_bytes: int,
        closing: threading.Event,
    ) -> None:
        self._max_memory_bytes = max_memory_bytes
        self._max_kept_bytes = max_kept_bytes
        self._closing = closing
        self._connection, theirs = Pipe()
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                pass_fds=(theirs.fileno(),),
                env=os.environ | ONE_THREAD,
                process_group=0,  # Ctrl-C is for the parent
            )
        except BaseException:
            self._connection.close()
            raise
        finally:
            theirs.close()
        assert self._process.stdout is not None
        self._output = self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._printed = b""
        self._decoder = "decoder"
        """Which one it last said it was starting."""
        self._memory_numbers = count()
        self._free_memory: list[_FrameMemory] = []
        self._killed = False
        self.num_clips = 0

    def wait_until_ready(self) -> None:
        """_WorkerFailed if it does not get there."""
        with self._killed_on_error():
            self._receive(START_TIMEOUT_S)

    def decode(self, request: DecodeRequest, *, timeout_s: float) -> DecodedClip | Quarantined:
        """The windows of a clip; _WorkerFailed where the process does not survive it."""
        self._printed, self._decoder = b"", "decoder"
        self.num_clips += 1
        with self._killed_on_error():
            memory = self._send(request)
            answer = self._receive(timeout_s)
            if isinstance(answer, DeltatokError):
                raise answer
        if isinstance(answer, Quarantined):
            self._release(memory)
            return answer
        clip: DecodedClip
        clip, height, width = answer
        used = frames_used(clip.windows)
        pixels = memory.read(len(used) * height * width * 3)
        weakref.finalize(pixels, self._release, memory)
        rows = pixels.reshape(-1, height, width, 3)
        return replace(clip, frames=dict(zip(used, rows, strict=True)))

    def memory_bytes(self) -> int:
        """Resident memory, without what it shares: libraries, and the memory of the frames; 0 where
        it cannot be told (other than Linux, or the process is gone)."""
        try:
            _, pages, shared, *_ = Path(f"/proc/{self._process.pid}/statm").read_text().split()
        except (OSError, ValueError):
            return 0
        return (int(pages) - int(shared)) * resource.getpagesize()

    def kill(self) -> None:
        """Ends it, however it is; its frames that are in use stay."""
        self._killed = True
        self._free_memory.clear()
        self._process.kill()
        self._connection.close()
        self._output.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel
            self._process.wait(timeout=1)

    @contextlib.contextmanager
    def _killed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.kill()
            raise

    def _send(self, request: DecodeRequest) -> "_FrameMemory":
        """Gives the memory its frames will be in."""
        try:
            if self._free_memory:
                memory = self._free_memory.pop()
                self._connection.send((request, memory.number))
            else:
                memory = _FrameMemory(next(self._memory_numbers))
                self._connection.send((request, memory.number))
                send_handle(self._connection, memory.descriptor, self._process.pid)
        except ConnectionError as error:
            raise _WorkerFailed(self._how_it_ended()) from error
        return memory

    def _release(self, memory: "_FrameMemory") -> None:
        """For the next clip. Called by whatever thread drops the last array on it."""
        memory.shrink(self._max_kept_bytes)
        if not self._killed:
            self._free_memory.append(memory)

    def _receive(self, timeout_s: float) -> Any:
        """Its next answer, as worker.py says. Time for which this process itself was stopped or
        starved is no fault of the worker's: a turn that comes late counts as one tick. Nor is that
        for which it waits for a store."""
        waited_s = 0.0
        sources: list[Any] = [self._connection, self._output]
        while True:
            before_s = time.monotonic()
            ready: list[Any] = wait(sources, TICK_S)
            if self._output in ready and not self._read_output():
                sources.remove(self._output)
            if self._connection in ready:
                try:
                    message = self._connection.recv()
                except (EOFError, ConnectionError) as error:
                    raise _WorkerFailed(self._how_it_ended()) from error
                if not isinstance(message, str):
                    return message
                if "download" in (message, self._decoder):
                    waited_s = 0.0
                self._decoder = DECODER_NAMES[message]
            if self._closing.is_set():
                raise CancelledError
            turn_s = time.monotonic() - before_s
            waited_s += turn_s if turn_s < 2 * TICK_S else TICK_S
            if self._decoder == "download":
                if waited_s > DOWNLOAD_TIMEOUT_S:
                    raise DeltatokError(
                        f"a video's download gave nothing for {DOWNLOAD_TIMEOUT_S:g} s: check the "
                        "network, and run again; what is finished stays"
                    )
            elif waited_s > timeout_s:
                raise _WorkerFailed(f"{self._decoder} hung for {timeout_s:g} s (killed)")
            if (memory := self.memory_bytes()) > self._max_memory_bytes:
                took = f"took {memory / 1e9:.1f} GB of memory (killed)"
                raise _WorkerFailed(f"{self._decoder} {took}")

    def _how_it_ended(self) -> str:
        """One line: signal or exit status of a process that has closed its connection, and its
        last words."""
        try:
            status = self._process.wait(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"{self._decoder} closed its connection"
        while self._read_output():
            pass
        how = f"exited with status {status}"
        if status < 0:
            how = f"crashed: signal {-status}{_signal_name(-status)}"
        lines = self._printed.decode(errors="replace").strip().split("\n")
        last = " ".join(lines[-1].split())[:200]
        return f"{self._decoder} {how}" + (f" ({last})" if last else "")

    def _read_output(self) -> bool:
        """Takes what it has printed, keeping the end; False if there is nothing (any more)."""
        data = self._output.read(65536)
        self._printed = (self._printed + (data or b""))[-OUTPUT_BYTES:]
        return bool(data)


class _FrameMemory:
    """A file in memory that a worker writes the frames of a clip to, and those of another clip when
    the last array on them is gone.

    There is no name in /dev/shm that a killed process could leave behind. Where the system has no
    such files (macOS), it is a temporary file.
    """

    def __init__(self, number: int) -> None:
        """number: what the worker knows it by."""
        self.number = number
        self._mapped: mmap.mmap | None = None
        try:
            self.descriptor = os.memfd_create("deltatok-frames")
        except (AttributeError, OSError):
            self.descriptor, path = tempfile.mkstemp(prefix="deltatok-frames")
            Path(path).unlink()

    def __del__(self) -> None:
        os.close(self.descriptor)

    def read(self, size: int) -> NDArray[np.uint8]:
        """uint8 (size,), read-only: what the worker has written, without a copy."""
        if self._mapped is None or len(self._mapped) < size:
            self._mapped = mmap.mmap(self.descriptor, size, prot=mmap.PROT_READ)
        return np.frombuffer(self._mapped, np.uint8, count=size)

    def shrink(self, size: int) -> None:
        """Gives back what is above `size` bytes, when no array is left."""
        if os.fstat(self.descriptor).st_size > size:
            os.ftruncate(self.descriptor, size)


def choose_num_workers(config: RunConfig) -> int:
    """Decoding processes: as given, else this process's share of the CPU cores, at least one."""
    if config.workers is not None:
        return config.workers
    return max(1, num_cores() // max(1, launched("LOCAL_WORLD_SIZE", default=1)))


def _num_bytes(result: DecodedClip | Quarantined) -> int:
    if isinstance(result, Quarantined):
        return 0
    return sum(frame.nbytes for frame in result.frames.values())


def _quarantined(clip: Clip, stage: str, failures: Sequence[str]) -> Quarantined:
    """failures: how each try ended."""
    reason = "; second try: ".join(failures)
    return Quarantined(clip=clip.key, stage=stage, reason=reason, attempts=len(failures))


def _signal_name(number: int) -> str:
    try:
        return f" ({signal.Signals(number).name})"
    except ValueError:
        return ""
