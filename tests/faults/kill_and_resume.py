"""Kill a command with SIGKILL at random moments, run it again each time, compare with an
undisturbed run: `python tests/faults/kill_and_resume.py --kills 3 --folder F -- COMMAND... {out}`

{out} in the command stands for the result folder: FOLDER/undisturbed and FOLDER/killed. The moments
are uniform between --after seconds and the undisturbed run's length. Prints one digest for each
run, over every file's name and content but timings, logs of rates and locks, and exits 1 if they
differ.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

TIMES = {"timings.jsonl", ".lock"}  # files that hold clock times or process ids only
RATES = ("_per_s", "_share", "eta_s", "peak_memory_gb")  # endings of what differs in log.jsonl


def main() -> int:
    """Run the comparison; 0 if both folders are equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--after", type=float, default=2.0, help="seconds before the first kill")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    clean, killed = arguments.folder / "undisturbed", arguments.folder / "killed"
    start = time.monotonic()
    run(arguments.command, clean)
    whole_s = time.monotonic() - start
    moments = []
    for _ in range(arguments.kills):
        moment = rng.uniform(arguments.after, max(whole_s, arguments.after))
        moments.append(round(moment, 2))
        run(arguments.command, killed, kill_after_s=moment)
    run(arguments.command, killed)
    digests = {folder.name: digest(folder) for folder in (clean, killed)}
    equal = len(set(digests.values())) == 1
    print(json.dumps({"kills_after_s": moments, "equal": equal, "sha256": digests}, indent=1))
    return 0 if equal else 1


def run(command: list[str], out: Path, *, kill_after_s: float | None = None) -> None:
    """Run `command` into `out`, whole or until it is killed with all its children's parent."""
    words = [word.replace("{out}", str(out)) for word in command]
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            _, said = process.communicate(timeout=kill_after_s)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # only the command: its children must see to it
            process.communicate()
            return
    if process.returncode != 0:
        sys.exit(f"{words[0]} ended with {process.returncode}: {said.decode()[-2000:]}")


def digest(folder: Path) -> str:
    """One sha256 over the names and contents of all files of a folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name not in TIMES:
            content = path.read_bytes()
            if path.name == "log.jsonl":
                content = without_rates(content)
            name = path.relative_to(folder).as_posix().encode()
            content = content.replace(str(folder).encode(), b"{out}")
            total.update(hashlib.sha256(name).digest() + hashlib.sha256(content).digest())
    return total.hexdigest()


def without_rates(log: bytes) -> bytes:
    """A training log without the fields that depend on the clock or on who else had memory."""
    lines = [json.loads(line) for line in log.splitlines()]
    kept = [{k: v for k, v in line.items() if not k.endswith(RATES)} for line in lines]
    return json.dumps(kept).encode()


if __name__ == "__main__":
    sys.exit(main())
