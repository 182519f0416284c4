"""One decoding process as the pool sees it: started, spoken to without ever waiting, killed.

Everything here belongs to the pool's thread.
"""

import contextlib
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .wire import Message, MessageReader, WireError, send

OUTPUT_BYTES = 4096
"""How much of the end of what a child prints is kept, to say why it died."""

SOCKET_BYTES = 2**20
"""Wanted capacity of the socket: fewer switches between child and pool where pixels go through it.
Where the system does not allow as much, it is less."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""A decoding process multiplies no matrices: it needs none of the thread pools of numpy."""


class ChildFailed(Exception):
    """The child is dead or not to be trusted any more; the text says how it ended."""


class ChildProcess:
    """A child and what leads to it: a pipe for requests, a socket for its messages, and a pipe for
    what it prints."""

    def __init__(self, command: Sequence[str], *, max_payload_bytes: int) -> None:
        request_read, self.request_fd = os.pipe()
        self._response, response_write = socket.socketpair()
        self.response_fd = self._response.fileno()
        self.output_fd, output_write = os.pipe()
        for end in (self._response, response_write):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        self._reader = MessageReader(self._response, max_payload_bytes=max_payload_bytes)
        try:
            words = [str(request_read), str(response_write.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                [*command, *words],
                stdin=subprocess.DEVNULL,
                stdout=output_write,
                stderr=output_write,
                pass_fds=(request_read, response_write.fileno()),
                env=os.environ | ONE_THREAD,
                process_group=0,  # Ctrl-C is for the parent
            )
        except BaseException:
            self._close_pipes()
            raise
        finally:
            response_write.close()
            for descriptor in (request_read, output_write):
                os.close(descriptor)
        for descriptor in (self.request_fd, self.response_fd, self.output_fd):
            os.set_blocking(descriptor, False)
        self._printed = b""
        self.decoder = "decoder"
        """Which decoder it last said it was starting."""

    def memory_bytes(self) -> int:
        """Resident memory; 0 where it cannot be told (other than Linux, or the child is gone)."""
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * resource.getpagesize()

    def send(self, header: dict[str, Any]) -> None:
        """Hands a request to an idle child; ChildFailed where it does not take it."""
        self.decoder = "decoder"
        self._printed = b""
        try:
            send(self.request_fd, header)  # mostly a few kB into an empty pipe, which cannot block
        except TimeoutError as error:
            raise ChildFailed(f"takes no request ({error})") from error
        except OSError as error:
            raise ChildFailed(self.how_it_ended()) from error

    def receive(self) -> Message | None:
        """The next message, if it has come whole.

        Raises:
            ChildFailed: the child has ended, or sent something else.
        """
        try:
            return self._reader.read()
        except BlockingIOError:
            return None
        except WireError as error:
            raise ChildFailed(f"{self.decoder} {error}") from error
        except (EOFError, OSError) as error:
            raise ChildFailed(self.how_it_ended()) from error

    def read_output(self) -> bool:
        """Takes what the child has printed, keeping its end; False once there will be no more."""
        return self._read_printed() != b""

    def how_it_ended(self) -> str:
        """One line: signal or exit status of a child that has closed its pipe, and its last words.

        A child that closed its pipe and still runs is killed.
        """
        try:
            status = self._process.wait(timeout=0.5)  # it is ending: its pipe is closed
        except subprocess.TimeoutExpired:
            return f"{self.decoder} closed its pipe"
        while self._read_printed():
            pass
        how = f"exited with status {status}"
        if status < 0:
            how = f"crashed: signal {-status}{_signal_name(-status)}"
        return f"{self.decoder} {how}{self._last_words()}"

    def kill(self) -> None:
        """Kills the child and closes its pipes; `reap` then takes it off the process table."""
        self._process.kill()
        self._close_pipes()

    def reap(self, *, timeout_s: float = 0.0) -> bool:
        """Whether the killed child is gone; one that hangs in the kernel may take its time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=timeout_s)
        return self._process.returncode is not None

    def _read_printed(self) -> bytes | None:
        """What the child has printed since; None: nothing now; empty: it has closed its output."""
        try:
            data = os.read(self.output_fd, 65536)
        except BlockingIOError:
            return None
        self._printed = (self._printed + data)[-OUTPUT_BYTES:]
        return data

    def _last_words(self) -> str:
        lines = self._printed.decode(errors="replace").split("\n")
        spoken = [" ".join(line.split()) for line in lines if line.strip()]
        return f" ({spoken[-1][:200]})" if spoken else ""

    def _close_pipes(self) -> None:
        self._reader.close()
        self._response.close()
        for descriptor in (self.request_fd, self.output_fd):
            os.close(descriptor)


def _signal_name(number: int) -> str:
    try:
        return f" ({signal.Signals(number).name})"
    except ValueError:
        return ""
