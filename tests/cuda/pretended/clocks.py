"""Streams, events and memory: who touched which block when, by vector clocks.

Agents are "host" (all its threads, in the order in which they really ran) and the streams. A stream
knows what the host had done when it was given a kernel; the host knows what a stream has done once
it has waited for it; a stream knows of another by an event or by wait_stream. Two agents that touch
a block, one of them writing, without the later one knowing of the earlier, are a race: on a GPU the
result would depend on who is faster.

A block is a storage. The allocator hands a freed block out again at once, for its own stream: so,
unless record_stream was called, no other stream may still be using it.
"""

import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .counts import Counts, source_line

HOST = "host"
EARLIER_EVENT = "event, with work behind it"
"""Why the host waits where the device does not run dry meanwhile."""

Times = dict[str, int]
"""Agent -> how many of its actions are known."""


class Access(NamedTuple):
    """One action on a block."""

    agent: str
    tick: int
    text: str


@dataclass(eq=False)
class Block:
    """What is known of one storage."""

    clocks: "Clocks"
    home: str | None = None
    """The stream it was allocated on; None for the host's memory."""
    num_bytes: int = 0
    """On the device."""
    is_pinned: bool = False
    write: Access | None = None
    reads: dict[str, Access] = field(default_factory=dict)
    """The last of each agent since the last write."""
    recorded: set[str] = field(default_factory=set)
    """Streams that record_stream named."""


class Clocks:
    """The clocks of one pretended device, and what was wrong."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self.problems: list[str] = []
        """Races and blocks freed too early, in the order in which they were found."""
        self.live_bytes = self.peak_bytes = 0
        """What is allocated on the devices, and the most that ever was."""
        self.lock = threading.RLock()
        self._known: dict[str, Times] = {}

    def block(self, storage: torch.UntypedStorage) -> Block:
        """The block of a storage, which is followed from now on."""
        block = self.find_block(storage)
        if block is None:
            block = Block(self)
            storage._pretended_block = block  # type: ignore[attr-defined]
            weakref.finalize(storage, self._freed, block).atexit = False
        return block

    def find_block(self, storage: torch.UntypedStorage) -> Block | None:
        """The block of a storage if this device or a copy has touched it."""
        block = getattr(storage, "_pretended_block", None)
        return block if block is not None and block.clocks is self else None

    def allocated(self, block: Block, stream: str, num_bytes: int) -> None:
        """The stream has a new block of its own."""
        if block.home is None:
            block.home, block.num_bytes = stream, num_bytes
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def known(self, agent: str) -> Times:
        """What an agent knows of all."""
        return self._known.setdefault(agent, {})

    def tick(self, agent: str) -> int:
        """One more action of an agent; its number."""
        times = self.known(agent)
        times[agent] = times.get(agent, 0) + 1
        return times[agent]

    def learn(self, agent: str, times: Times) -> None:
        """From now on the agent comes after what `times` says."""
        mine = self.known(agent)
        for other, tick in times.items():
            if tick > mine.get(other, 0):
                mine[other] = tick

    def launch(self, stream: str, line: str) -> None:
        """The host gives the stream a kernel."""
        self.counts.launches[line] += 1
        self.learn(stream, self.known(HOST))

    def wait(self, times: Times, why: str, line: str | None = None) -> None:
        """The host waits for all that `times` says."""
        self.learn(HOST, times)
        self.counts.waits[why, line or source_line()] += 1

    def access(
        self,
        agent: str,
        what: str,
        *,
        reads: Iterable[Block] = (),
        writes: Iterable[Block] = (),
        line: str | None = None,
    ) -> None:
        """The agent touches these blocks, in one action."""
        mine = Access(agent, self.tick(agent), f"{what} at {line or source_line()}")
        written = list(writes)
        for block in (*reads, *written):
            last = block.write
            if last is not None and not self._knows(agent, last):
                self.problems.append(f"race: {agent}: {mine.text} after {last.agent}: {last.text}")
        for block in written:
            for last in block.reads.values():
                if not self._knows(agent, last):
                    self.problems.append(
                        f"race: {agent}: {mine.text} overwrites what {last.agent} reads: "
                        f"{last.text}"
                    )
            block.write = mine
            block.reads.clear()
        for block in reads:
            block.reads[agent] = mine

    def _knows(self, agent: str, access: Access) -> bool:
        return agent == access.agent or self.known(agent).get(access.agent, 0) >= access.tick

    def _freed(self, block: Block) -> None:
        if block.home is None:
            return
        with self.lock:
            self.live_bytes -= block.num_bytes
            uses = [*block.reads.values(), *([block.write] if block.write else [])]
            for use in uses:
                if use.agent == HOST or use.agent in block.recorded:
                    continue
                if not (self._knows(block.home, use) or self._knows(HOST, use)):
                    self.problems.append(
                        f"freed: a block of {block.home}, which {use.agent} may still use: "
                        f"{use.text}"
                    )


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, clocks: Clocks, device: torch.device, name: str) -> None:
        self.device, self.name = device, name
        self._clocks = clocks

    def wait_event(self, event: "Event") -> None:
        with self._clocks.lock:
            self._clocks.learn(self.name, event.times)

    def wait_stream(self, stream: "Stream") -> None:
        with self._clocks.lock:
            self._clocks.learn(self.name, self._clocks.known(stream.name))

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self._clocks)
        event.record(self)
        return event

    def synchronize(self) -> None:
        with self._clocks.lock:
            self._clocks.wait(self._clocks.known(self.name), "stream")

    def query(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Event:
    """torch.cuda.Event. It never comes to anything else than what was recorded."""

    def __init__(self, clocks: Clocks) -> None:
        self.times: Times = {}
        self._clocks = clocks
        self._stream, self._tick, self._seconds = "", 0, 0.0

    def record(self, stream: Stream | None = None) -> None:
        with self._clocks.lock:
            self._stream = (stream or torch.cuda.current_stream()).name  # type: ignore[attr-defined]
            self._tick = self._clocks.tick(self._stream)
            self.times = dict(self._clocks.known(self._stream))
        self._seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        chosen = stream or torch.cuda.current_stream()
        chosen.wait_event(self)  # type: ignore[arg-type, union-attr]

    def synchronize(self) -> None:
        with self._clocks.lock:
            is_last = self._clocks.known(self._stream).get(self._stream, 0) == self._tick
            why = "event" if is_last else EARLIER_EVENT
            self._clocks.wait(self.times, why)

    def query(self) -> bool:
        """Whether it is over: always, as far as a program without races can tell."""
        with self._clocks.lock:
            self._clocks.learn(HOST, self.times)
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds, of the CPU's time."""
        return 1000 * (end._seconds - self._seconds)
