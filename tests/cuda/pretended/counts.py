"""Host waits, copies between host and device, and launches, counted by source line."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import FrameType

import deltatok

ROOT = Path(deltatok.__file__).resolve().parent
HERE = Path(__file__).resolve().parent


@dataclass
class Counts:
    """What the host did since the last `clear`. A line is "train/engine/loop.py:12"."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(why, line) -> how often the host waited for the device."""
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(kind, line) -> copies between host and device, those without a wait too."""
    launches: Counter[str] = field(default_factory=Counter)
    """line -> operators that run a kernel. A backward pass is launched by one line."""
    devices: Counter[int] = field(default_factory=Counter)
    """Number of a device -> launches on it."""

    def clear(self) -> None:
        for counter in (self.waits, self.copies, self.launches, self.devices):
            counter.clear()

    @property
    def num_waits(self) -> int:
        return sum(self.waits.values())

    @property
    def num_launches(self) -> int:
        return sum(self.launches.values())

    @property
    def pageable(self) -> dict[str, int]:
        """line -> copies from or to memory that is not pinned, for which the host waits."""
        found: Counter[str] = Counter()
        for (kind, line), count in self.copies.items():
            if "pageable" in kind:
                found[line] += count
        return dict(found)

    def waits_in(self, file: str) -> dict[str, int]:
        """line -> waits, of the lines of one file of the project."""
        found: Counter[str] = Counter()
        for (_, line), count in self.waits.items():
            if line.startswith(f"{file}:"):
                found[line] += count
        return dict(found)

    def table(self, *, steps: int = 1, most: int = 8) -> dict[str, object]:
        """For JSON: waits, copies and launches a step, the largest first."""

        def rows(counter: Counter[tuple[str, str]]) -> list[dict[str, object]]:
            return [
                {"what": what, "line": line, "per_step": round(count / steps, 3)}
                for (what, line), count in counter.most_common(most)
            ]

        return {
            "waits_per_step": round(self.num_waits / steps, 3),
            "launches_per_step": round(self.num_launches / steps, 1),
            "waits": rows(self.waits),
            "copies": rows(self.copies),
            "launches": [
                {"line": line, "per_step": round(count / steps, 1)}
                for line, count in self.launches.most_common(most)
            ],
        }


def source_line() -> str:
    """The innermost line of the project on the stack, else of the tests."""
    frame: FrameType | None = sys._getframe(1)
    of_tests = ""
    while frame is not None:
        name, is_test = _project_file(frame.f_code.co_filename)
        if name and not is_test:
            return f"{name}:{frame.f_lineno}"
        if name and not of_tests:
            of_tests = f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return of_tests or "?"


@lru_cache(maxsize=4096)
def _project_file(file: str) -> tuple[str, bool]:
    """Its name in the project, "" for other files and this package; whether it is one of tests."""
    path = Path(file)
    if not path.is_absolute():  # <frozen runpy>
        return "", False
    path = path.resolve()
    if not path.is_relative_to(ROOT) or path.is_relative_to(HERE) or ".venv" in path.parts:
        return "", False
    name = path.relative_to(ROOT).as_posix()
    return name, name.startswith("tests/")
