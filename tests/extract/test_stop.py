"""The first signal asks politely, the second one is as deadly as ever."""

import os
import signal
import threading
from pathlib import Path

import pytest
import transformers

from deltatok.extract.backbone import load_frozen_model
from deltatok.extract.stop import stop_on_signals
from deltatok.shards.errors import Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_noticed_at_the_next_check(number: signal.Signals) -> None:
    with stop_on_signals() as stop:
        signal.raise_signal(number)
        assert stop.asked
        with pytest.raises(Stopped, match=number.name):
            stop.check()


def test_signal_cuts_off_what_can_be_cut_off_at_once() -> None:
    waiting = threading.Event()
    with stop_on_signals() as stop:
        timer = threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGTERM])
        with pytest.raises(Stopped), stop.at_once():
            timer.start()
            waiting.wait(timeout=30)
        timer.join()


def test_a_stop_while_the_backbone_loads_is_no_broken_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is caught around the loading, as bad weights, must let a stop through."""

    def load(*_: object, **__: object) -> None:
        os.read(os.pipe()[0], 1)

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", load)
    with stop_on_signals(time_limit_s=0.01) as stop, pytest.raises(Stopped), stop.at_once():
        load_frozen_model(tmp_path)


def test_signal_before_is_noticed_by_what_can_be_cut_off() -> None:
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), stop.at_once():
            pytest.fail("went on")


def test_second_interrupt_is_an_ordinary_one() -> None:
    # Python's own handler: a test run that a shell put in the background starts with SIGINT off.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_on_signals():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_a_signal_nothing_happens() -> None:
    with stop_on_signals() as stop:
        stop.check()
        assert not stop.asked


def test_outside_of_the_main_thread_it_works_without_signals() -> None:
    asked = []

    def run() -> None:
        with stop_on_signals() as stop:
            asked.append(stop.asked)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [False]
