"""A run asked to stop ends after the step at hand; asked twice from the keyboard, at once."""

import signal
from collections.abc import Iterator

import pytest

from deltatok.train.engine.stop import StopSignal


@pytest.fixture(autouse=True)
def _interrupts_are_on() -> Iterator[None]:
    """A test run that a shell put in the background starts with SIGINT off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
    assert signal.getsignal(number) == before


def test_a_second_interrupt_does_not_wait() -> None:
    with StopSignal():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_preemption_after_an_interrupt_still_asks() -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
