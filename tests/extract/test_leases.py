"""A lease has one holder; a dead holder's lease gets one heir; a living one's gets none."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from deltatok.extract import leases as leases_module
from deltatok.extract.holder import Holder
from deltatok.extract.leases import Lease, Leases

HOUR_S = 3600.0


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[[], Leases]]:
    """Makes one process's leases on tmp_path; they take an hour to be given up."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Leases(tmp_path, timeout_s=HOUR_S))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock that heartbeats are watched by; stands still."""
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(leases_module, "time", SimpleNamespace(monotonic=lambda: now.s))
    return now


def dead_holder() -> dict[str, object]:
    """What a process of this machine that has ended would have written."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return Holder.of_this_process().to_json() | {"pid": process.pid}


def leave(folder: Path, name: str, holder: dict[str, object] | None) -> Path:
    """A lease file by this holder, or an empty one."""
    path = folder / "leases" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("" if holder is None else json.dumps(holder))
    return path


ELSEWHERE = {"host": "elsewhere", "pid": 1, "machine": "other", "started": "1"}


def at_once(takers: list[Leases], name: str) -> list[Lease]:
    """What they get who all try at the same moment."""
    barrier = threading.Barrier(len(takers))

    def take(leases: Leases) -> Lease | None:
        barrier.wait()
        return leases.take(name)

    with ThreadPoolExecutor(len(takers)) as pool:
        return [lease for lease in pool.map(take, takers) if lease is not None]


def test_of_many_takers_at_once_one_wins(process: Callable[[], Leases]) -> None:
    takers = [process() for _ in range(8)]
    for number in range(20):
        won = at_once(takers, f"{number:06d}")
        assert len(won) == 1
        assert won[0].is_held()


def test_of_many_heirs_of_a_dead_process_one_wins(
    process: Callable[[], Leases], tmp_path: Path
) -> None:
    takers, dead = [process() for _ in range(8)], dead_holder()
    for number in range(20):
        leave(tmp_path, f"{number:06d}.json", dead)
        assert sum(lease.is_held() for lease in at_once(takers, f"{number:06d}")) == 1


def test_a_released_lease_can_be_taken_again(process: Callable[[], Leases]) -> None:
    one, other = process(), process()
    lease = one.take("000000")
    assert lease is not None
    assert other.take("000000") is None
    lease.release()
    assert other.take("000000") is not None


def test_first_free_name_is_taken_and_later_ones_are_not_looked_at(
    process: Callable[[], Leases],
) -> None:
    one, other = process(), process()
    one.take("000000")
    names = iter(["000000", "000001", "000002"])
    assert other.take_first(names) is not None
    assert list(names) == ["000002"]


def test_an_heir_that_died_too_is_in_nobodys_way(
    process: Callable[[], Leases], tmp_path: Path
) -> None:
    dead = dead_holder()
    leave(tmp_path, "000000.json", dead)
    leave(tmp_path, "000000.1.json", dead)
    assert process().take("000000") is not None
    assert [path.name for path in (tmp_path / "leases").iterdir()] == ["000000.2.json"]


def test_process_number_that_was_given_out_again_is_another_process(
    process: Callable[[], Leases], tmp_path: Path
) -> None:
    leave(tmp_path, "000000.json", Holder.of_this_process().to_json() | {"started": "1"})
    assert process().take("000000") is not None


@pytest.mark.parametrize("holder", [ELSEWHERE, None], ids=["elsewhere", "half_written"])
def test_silent_holder_elsewhere_is_dead_once_watched_for_the_timeout(
    process: Callable[[], Leases],
    tmp_path: Path,
    clock: SimpleNamespace,
    holder: dict[str, object] | None,
) -> None:
    leave(tmp_path, "000000.json", holder)
    os.utime(tmp_path / "leases" / "000000.json", (1, 1))  # another machine's clock says nothing
    leases = process()
    assert leases.take("000000") is None
    clock.s += HOUR_S
    assert leases.take("000000") is None
    clock.s += 1
    assert leases.take("000000") is not None


def test_beating_holder_elsewhere_is_never_dead(
    process: Callable[[], Leases], tmp_path: Path, clock: SimpleNamespace
) -> None:
    leases = process()
    for beat in range(5):
        leave(tmp_path, "000000.json", ELSEWHERE | {"beats": beat})
        assert leases.take("000000") is None
        clock.s += 0.9 * HOUR_S


def test_leases_of_this_process_beat(tmp_path: Path) -> None:
    with Leases(tmp_path, timeout_s=0.06) as leases:
        lease = leases.take("000000")
        assert lease is not None
        beat = threading.Event()
        original = lease.beat

        def spy() -> None:
            original()
            beat.set()

        lease.beat = spy  # type: ignore[method-assign]
        before = (tmp_path / "leases" / "000000.json").read_bytes()
        assert beat.wait(timeout=30)
        after = (tmp_path / "leases" / "000000.json").read_bytes()
    assert len(before) == len(after)
    assert json.loads(before)["beats"] < json.loads(after)["beats"]


def test_holder_that_slept_finds_out_and_leaves_the_heir_alone(
    process: Callable[[], Leases], tmp_path: Path, clock: SimpleNamespace
) -> None:
    sleeper, heir = process(), process()
    lost = sleeper.take("000000")
    assert lost is not None
    heir.take("000000")
    clock.s += HOUR_S + 1
    taken = heir.take("000000")
    assert taken is not None
    assert not lost.is_held()
    lost.beat()
    lost.release()
    assert taken.is_held()
    assert sleeper.take("000000") is None


def test_folder_goes_with_the_last_process(tmp_path: Path) -> None:
    with Leases(tmp_path, timeout_s=HOUR_S) as one:
        one.take("000000")
        with Leases(tmp_path, timeout_s=HOUR_S) as other:
            other.take("000001")
        assert [path.name for path in (tmp_path / "leases").iterdir()] == ["000000.json"]
    assert not (tmp_path / "leases").exists()
