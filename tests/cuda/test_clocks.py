"""Races and early frees are found on the pretended device, and only they."""

import pytest
import torch
from pretended import PretendedDevice, pretend_cuda
from torch import Tensor


@pytest.fixture
def found() -> list[str]:
    """The problems of the device that is pretended meanwhile; to be looked at by the test."""
    with pretend_cuda() as device:
        yield device.problems


def on_side_stream() -> tuple[torch.cuda.Stream, Tensor, torch.cuda.Event]:
    """A stream, what it makes, and the event after that."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        made = torch.ones(4, device="cuda")
        return side, made, side.record_event()


def use(made: Tensor, made_event: torch.cuda.Event) -> None:
    current = torch.cuda.current_stream()
    current.wait_event(made_event)
    made.record_stream(current)
    made.sum()


def test_a_waited_event_orders_two_streams(cuda: PretendedDevice) -> None:
    _, made, event = on_side_stream()
    use(made, event)
    del made
    assert cuda.problems == []


def test_reading_without_an_event_is_a_race(found: list[str]) -> None:
    _, made, _ = on_side_stream()
    made.sum()
    assert "race" in found[0]
    assert "test_clocks.py" in found[0]


def test_an_event_recorded_too_early_is_a_race(found: list[str]) -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        event = side.record_event()
        made = torch.ones(4, device="cuda")
    use(made, event)
    assert "race" in found[0]


def test_writing_what_another_stream_reads_is_a_race(found: list[str]) -> None:
    side, made, event = on_side_stream()
    use(made, event)
    with torch.cuda.stream(side):
        made.zero_()
    assert "overwrites" in found[0]


def test_freeing_what_another_stream_reads_is_found(found: list[str]) -> None:
    _, made, event = on_side_stream()
    torch.cuda.current_stream().wait_event(event)
    made.sum()
    del made
    assert [text.partition(":")[0] for text in found] == ["freed"]


def test_wait_stream_and_synchronize_order_as_well(cuda: PretendedDevice) -> None:
    side, made, _ = on_side_stream()
    torch.cuda.current_stream().wait_stream(side)
    made.sum()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        made.zero_()
    side.synchronize()
    assert made.cpu().tolist() == [0.0] * 4
    assert cuda.problems == []


def test_a_stream_is_in_order_with_itself(cuda: PretendedDevice) -> None:
    x = torch.ones(4, device="cuda")
    for _ in range(3):
        x.add_(x.sum())
    del x
    assert cuda.problems == []


def test_host_reads_a_copy_that_is_under_way(found: list[str]) -> None:
    there = torch.ones(4, device="cuda")
    there.to("cpu", non_blocking=True).numpy()
    assert "race: host" in found[0]


def test_host_writes_what_is_being_copied(found: list[str]) -> None:
    pinned = torch.ones(4).pin_memory()
    there = pinned.to("cuda", non_blocking=True)
    pinned.zero_()
    assert "race: host" in found[0]
    del there


def test_host_that_has_waited_may_read_and_write(cuda: PretendedDevice) -> None:
    pinned = torch.ones(4).pin_memory()
    there = pinned.to("cuda", non_blocking=True)
    back = there.to("cpu", non_blocking=True)
    torch.cuda.current_stream().record_event().synchronize()
    pinned.zero_()
    assert back.numpy().sum() == 4
    assert cuda.problems == []


def test_times_of_events_pass(cuda: PretendedDevice) -> None:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.ones(4, device="cuda").sum()
    end.record()
    end.synchronize()
    assert 0 < start.elapsed_time(end) < 10_000
