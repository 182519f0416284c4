"""The first signal asks politely; asked twice from the keyboard, it is as deadly as ever."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from deltatok.shards.errors import Stopped
from deltatok.shards.running.interrupts import StopRequest


@pytest.fixture(autouse=True)
def _interrupts_are_on() -> Iterator[None]:
    """A test run that a shell put in the background starts with SIGINT off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_noticed_at_the_next_check(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.asked
        with pytest.raises(Stopped, match=number.name):
            stop.check()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_old_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest():
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_signal_cuts_off_what_can_be_cut_off_at_once() -> None:
    waiting = threading.Event()
    with StopRequest() as stop:
        timer = threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGTERM])
        with pytest.raises(Stopped), stop.at_once():
            timer.start()
            waiting.wait(timeout=30)
        timer.join()


def test_signal_before_is_noticed_by_what_can_be_cut_off() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), stop.at_once():
            pytest.fail("went on")


def test_a_stop_is_not_taken_for_a_package_that_does_not_work() -> None:
    """Libraries import optional packages in `except Exception`."""
    with StopRequest() as stop, pytest.raises(Stopped), stop.at_once():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("swallowed")


def test_second_interrupt_is_an_ordinary_one() -> None:
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_second_sigterm_does_not_kill(first: signal.Signals) -> None:
    """A launcher and a scheduler each send one."""
    with StopRequest() as stop:
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked


def test_without_a_signal_nothing_happens() -> None:
    with StopRequest() as stop:
        stop.check()
        assert not stop.asked


def test_outside_of_the_main_thread_it_works_without_signals() -> None:
    asked = []

    def run() -> None:
        with StopRequest(time_limit_s=1000) as stop:
            asked.append(stop.asked)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [False]
