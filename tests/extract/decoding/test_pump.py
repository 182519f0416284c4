"""The clock of the pool's thread and the order of its clips, without processes."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deltatok.extract.decoding import pump as pump_module
from deltatok.extract.decoding.exchange import Exchange, Job
from deltatok.extract.decoding.pump import TICK_S, Pump, PumpLimits
from deltatok.extract.decoding.wire import DecodedFrames

TIMEOUT_S = 60.0


class _IdleChild:
    """Neither sends nor takes memory; remembers whether it was killed."""

    decoder = "decord"
    response_fd = output_fd = 1_000_000  # open nowhere
    killed = False

    def memory_bytes(self) -> int:
        return 0

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The pump's clock, moved by hand."""
    clock = SimpleNamespace(now_s=1000.0)
    monkeypatch.setattr(pump_module, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


@pytest.fixture
def busy(clock: SimpleNamespace) -> Iterator[tuple[Pump, Any]]:
    """A pump that is not running, with one child that has TIMEOUT_S for its clip from now."""
    limits = PumpLimits(
        num_workers=1,
        timeout_s=TIMEOUT_S,
        max_clips_per_child=1,
        max_child_rss=1,
        max_clip_bytes=1,
        max_waiting_bytes=1,
    )
    pump, child = Pump(["unused"], limits), _IdleChild()
    worker = pump_module._Worker(child, clock.now_s + TIMEOUT_S, ready=True)  # type: ignore[arg-type]
    worker.job = Job(0, {"key": "clip", "decoder": "auto"})
    pump._workers.append(worker)
    yield pump, child
    pump.exchange.close(RuntimeError("the test is over"))


def _look_for(seconds: float, pump: Pump, clock: SimpleNamespace) -> None:
    """Time goes by, and the pump looks at its children at every tick."""
    for _ in range(int(seconds / TICK_S)):
        clock.now_s += TICK_S
        pump._check_workers()


def test_child_is_killed_after_its_time(busy: tuple[Pump, Any], clock: SimpleNamespace) -> None:
    pump, child = busy
    _look_for(TIMEOUT_S, pump, clock)
    assert not child.killed
    _look_for(2 * TICK_S, pump, clock)
    assert child.killed


def test_own_pause_is_not_blamed_on_a_child(busy: tuple[Pump, Any], clock: SimpleNamespace) -> None:
    pump, child = busy
    _look_for(TIMEOUT_S / 2, pump, clock)
    clock.now_s += 3600  # this process was stopped for an hour
    _look_for(TIMEOUT_S / 2 - TICK_S, pump, clock)
    assert not child.killed
    _look_for(3 * TICK_S, pump, clock)
    assert child.killed


def _frames(size: int) -> DecodedFrames:
    return DecodedFrames("pyav", np.zeros((1, size, 1, 3), np.uint8), [])


def test_clip_that_is_waited_for_is_begun_however_much_waits() -> None:
    exchange = Exchange(max_waiting_bytes=10)
    for _ in range(4):
        exchange.submit({})
    jobs = [exchange.next_job() for _ in range(4)]
    assert all(jobs)
    first, second, third, _ = (job for job in jobs if job)
    exchange.deliver(second, _frames(100))
    exchange.put_back(first)
    exchange.put_back(third)
    again = exchange.next_job()
    assert again is first
    assert exchange.next_job() is None  # the third must wait until the others are taken
    exchange.close(RuntimeError("the test is over"))
