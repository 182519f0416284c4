"""Which process holds a lease, and whether it still runs."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """One process, told apart from any other of the same number."""

    host: str
    """For people."""
    pid: int
    machine: str
    """Boot and process namespace: `pid` means something only where this is the same. Empty where
    the system has no /proc; then a dead process is noticed by its heartbeat alone."""
    started: str
    """When the process started, in clock ticks since the boot."""

    @classmethod
    def of_this_process(cls) -> Self:
        """The running one."""
        state = _state(os.getpid())
        return cls(
            host=platform.node(),
            pid=os.getpid(),
            machine=_machine(),
            started=state[1] if state else "",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the lease file."""
        return asdict(self)

    @staticmethod
    def is_dead(content: bytes) -> bool:
        """Whether the holder in this lease file has certainly ended; False if that is not known."""
        holder = _parse(content)
        if holder is None or not holder.machine or holder.machine != _machine():
            return False
        try:
            os.kill(holder.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            pass  # alive, of another user
        state = _state(holder.pid)
        return state is not None and (state[0] in "ZX" or state[1] != holder.started)

    @staticmethod
    def describe(content: bytes) -> str:
        """Like "host a, process 12", for people."""
        holder = _parse(content)
        if holder is None:
            return "unknown host and process"
        return f"host {holder.host}, process {holder.pid}"


def _parse(content: bytes) -> Holder | None:
    try:
        value = json.loads(content)
        return Holder(
            host=str(value["host"]),
            pid=int(value["pid"]),
            machine=str(value["machine"]),
            started=str(value["started"]),
        )
    except (ValueError, KeyError, TypeError):  # half written
        return None


def _state(pid: int) -> tuple[str, str] | None:
    """(state letter, start time) of a process, of /proc/PID/stat; None where it is not told."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return None


def _machine() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""
