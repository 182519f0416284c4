"""The thread behind `DecodePool`: hands clips to decoding processes, takes results, keeps time.

It waits for nobody in particular: all pipes are non-blocking under one selector, and a process
that is late, dead or talks nonsense is killed and replaced. It never blames a process for its own
pauses (a stopped or starved parent): a late turn of the loop moves all deadlines by as much.
"""

import logging
import selectors
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ...shards.errors import DeltatokError
from ...shards.records import Quarantined
from .child_process import ChildFailed, ChildProcess
from .exchange import Exchange, Job, Result
from .wire import Message, WireError, read_windows

logger = logging.getLogger(__name__)

TRIES = 2
"""The second try is made with PyAV: decord is the one that hangs."""

START_TIMEOUT_S = 120.0
"""For a process to import what it needs; minutes happen on a network disk (a guess)."""

MAX_FAILED_STARTS = 3
"""Processes that die in a row before they are ready: then none will start (a guess)."""

TICK_S = 0.5
"""How often deadlines and memory are looked at while processes are busy."""

DECODER_NAMES = {"decord": "decord", "torchcodec": "torchcodec", "pyav": "PyAV", "frames": "Pillow"}
STAGES = ("open", "decode", "sample")


@dataclass(frozen=True, kw_only=True)
class PumpLimits:
    """The limits of `DecodePool`, documented there."""

    num_workers: int
    timeout_s: float
    max_clips_per_child: int
    max_child_rss: int
    max_clip_bytes: int
    max_waiting_bytes: int


@dataclass(eq=False)
class _Worker:
    """One process and what it is at."""

    child: ChildProcess
    deadline_s: float
    """On the monotonic clock: to be ready, or to be done with `job`."""
    ready: bool = False
    job: Job | None = None
    num_clips: int = 0


class Pump(threading.Thread):
    """Jobs come from `exchange` and results go there; everything else is this thread's own."""

    def __init__(self, command: Sequence[str], limits: PumpLimits) -> None:
        super().__init__(name="deltatok-decode", daemon=True)
        self.exchange = Exchange(max_waiting_bytes=limits.max_waiting_bytes)
        self._command = command
        self._limits = limits
        self._workers: list[_Worker] = []
        self._killed: list[ChildProcess] = []
        self._failed_starts = 0
        self._checked_s = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.exchange.wake_fd, selectors.EVENT_READ, None)

    def run(self) -> None:
        """The loop of the thread."""
        ended: BaseException = RuntimeError("the pool is closed")
        try:
            while not self.exchange.stopping():
                self._turn()
        except BaseException as error:  # raised again in the user's thread
            ended = error
        finally:
            self._kill_all()
            for child in self._killed:
                child.reap(timeout_s=1.0)
            self._selector.close()
            self.exchange.close(ended)

    def _turn(self) -> None:
        """Once round: give out work, move what has come, look at the clock."""
        if self.exchange.cancelling():
            self._kill_all()
            self.exchange.cancelled()
        self._assign()
        active = any(not worker.ready or worker.job for worker in self._workers)
        events = self._selector.select(TICK_S if active else None)
        for key, _ in events:
            if key.data in self._workers:
                self._serve(key.data, key.fd)
        self._check_workers()
        self._killed = [child for child in self._killed if not child.reap()]

    # Giving out work.

    def _assign(self) -> None:
        idle = [worker for worker in self._workers if worker.ready and worker.job is None]
        for worker in idle:
            job = self.exchange.next_job()
            if job is None:
                return
            worker.job = job
            worker.deadline_s = time.monotonic() + self._limits.timeout_s
            try:
                worker.child.send(job.request)
            except ChildFailed as failure:
                self._fail(worker, str(failure))
        starting = sum(not worker.ready for worker in self._workers)
        num_new = self.exchange.num_pending() - starting
        while num_new > 0 and len(self._workers) < self._limits.num_workers:
            self._start_worker()
            num_new -= 1

    def _start_worker(self) -> None:
        child = ChildProcess(self._command, max_payload_bytes=self._limits.max_clip_bytes)
        worker = _Worker(child, deadline_s=time.monotonic() + START_TIMEOUT_S)
        self._workers.append(worker)
        for descriptor in (child.response_fd, child.output_fd):
            self._selector.register(descriptor, selectors.EVENT_READ, worker)

    # Taking in results.

    def _serve(self, worker: _Worker, descriptor: int) -> None:
        if descriptor == worker.child.output_fd:
            if not worker.child.read_output():
                self._selector.unregister(descriptor)
            return
        try:
            message = worker.child.receive()
            if message is not None:
                self._handle(worker, message)
        except ChildFailed as failure:
            self._fail(worker, str(failure))
        except WireError as error:
            self._fail(worker, f"{worker.child.decoder} {error}")

    def _handle(self, worker: _Worker, message: Message) -> None:
        event, job = message.header.get("event"), worker.job
        decoder = str(message.header.get("decoder"))
        if event == "ready" and not worker.ready:
            worker.ready = True
            self._failed_starts = 0
        elif event == "decoding" and decoder in DECODER_NAMES:
            worker.child.decoder = DECODER_NAMES[decoder]
        elif event == "windows" and job is not None:
            self._finish(worker, job, read_windows(message))
        elif event == "unusable" and job is not None and message.header.get("stage") in STAGES:
            reason = str(message.header.get("reason"))
            self._finish(worker, job, _quarantined(job, reason, stage=message.header["stage"]))
        else:
            raise WireError("sent a message that was not asked for")

    def _finish(self, worker: _Worker, job: Job, result: Result) -> None:
        self.exchange.deliver(job, result)
        worker.job = None
        worker.num_clips += 1
        old = worker.num_clips >= self._limits.max_clips_per_child
        if old or worker.child.memory_bytes() > self._limits.max_child_rss:
            self._kill(worker)

    # When things go wrong.

    def _check_workers(self) -> None:
        now_s = time.monotonic()
        late_s = now_s - self._checked_s - TICK_S
        self._checked_s = now_s
        most = self._limits.max_child_rss + self._limits.max_clip_bytes
        for worker in list(self._workers):
            if worker.ready and worker.job is None:
                continue
            if late_s > TICK_S:
                worker.deadline_s += late_s
            if now_s > worker.deadline_s:
                limit_s = self._limits.timeout_s if worker.ready else START_TIMEOUT_S
                self._fail(worker, f"{worker.child.decoder} hung for {limit_s:g} s (killed)")
            elif (memory := worker.child.memory_bytes()) > most:
                took = f"took {memory / 1e9:.1f} GB of memory (killed)"
                self._fail(worker, f"{worker.child.decoder} {took}")

    def _fail(self, worker: _Worker, reason: str) -> None:
        """Replaces a process that cannot be used any more; its clip gets another try or is out."""
        self._kill(worker)
        job = worker.job
        if job is not None:
            logger.info("%s: %s", job.request["key"], reason)
            job.failures.append(reason)
            if len(job.failures) < TRIES:
                job.request["decoder"] = "pyav"
                self.exchange.put_back(job)
            else:
                self.exchange.deliver(job, _quarantined(job, job.failures.pop(), stage="decode"))
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise DeltatokError(
                    f"no decoding process can be started: {reason}: "
                    f"run `{' '.join(self._command)}` by hand to see why"
                )

    def _kill(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        for descriptor in (worker.child.response_fd, worker.child.output_fd):
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
        worker.child.kill()
        self._killed.append(worker.child)

    def _kill_all(self) -> None:
        for worker in list(self._workers):
            self._kill(worker)


def _quarantined(job: Job, reason: str, *, stage: str) -> Quarantined:
    """`reason` is how the last try ended; the tries before it are in `job.failures`."""
    return Quarantined(
        clip=job.request["key"],
        stage=stage,
        reason="; second try: ".join([*job.failures, reason]),
        attempts=len(job.failures) + 1,
    )
