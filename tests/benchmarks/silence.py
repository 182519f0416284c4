"""The longest time for which a command says nothing, and the line before it.

    python tests/benchmarks/silence.py [--limit 3] [--json FILE] -- deltatok-pipeline quickstart

stdout and stderr go through a pipe, as into a log, and on to the terminal; with --tty the command
believes that it writes to a terminal. Exit code: the command's own, or 1 where it is 0 and a gap is
longer than --limit.
"""

import argparse
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

SHOWN = 5


def main() -> int:
    """Runs the command and prints its longest gaps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=3.0, help="seconds [3]")
    parser.add_argument("--tty", action="store_true", help="through a pseudo-terminal")
    parser.add_argument("--json", type=Path, help="where the gaps go")
    parser.add_argument("command", nargs="+", help="behind --")
    arguments = parser.parse_args()
    reading, writing = pty.openpty() if arguments.tty else os.pipe()
    begun_s = last_s = time.monotonic()
    process = subprocess.Popen(arguments.command, stdout=writing, stderr=writing)
    os.close(writing)
    gaps: list[tuple[float, float, str]] = []
    said = ""
    while True:
        try:
            chunk = os.read(reading, 65536)
        except OSError:  # how a pseudo-terminal ends
            chunk = b""
        now_s = time.monotonic()
        gaps.append((now_s - last_s, last_s - begun_s, said))
        if not chunk:
            break
        last_s = now_s
        sys.stdout.buffer.write(chunk)
        sys.stdout.flush()
        lines = chunk.decode(errors="replace").replace("\r", "\n").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), said)[:200]
    code = process.wait()
    longest = sorted(gaps, reverse=True)[:SHOWN]
    print(f"\n{time.monotonic() - begun_s:.1f} s in all; the longest silences:")
    for gap_s, at_s, line in longest:
        print(f"{gap_s:6.2f} s from {at_s:7.1f} s on, after: {line.strip() or '(the start)'}")
    if arguments.json:
        found = [{"seconds": g, "at_s": at, "after": line} for g, at, line in longest]
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return code or int(longest[0][0] > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
