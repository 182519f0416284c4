"""Damage caches at random and hold the readers, verify and info to their promises.

    python tests/faults/fuzz_readers.py --minutes 10 [--seed 0] [--json FILE] [--keep FOLDER]

Each case damages a little cache (mutate.py), in two thirds of the cases mending hashes and
checksums afterwards, and runs in a child with limits of time and memory:

    readers     raise one of our errors or give values; unmended damage never gives wrong ones
    verify      names a problem, plain where hashes were not mended; deep where a reader does
    all         never raise anything else, hang, crash, or take more than 512 MiB

Prints findings, each with the number of its case; --case N runs that one again. Exits 1 if there
are any.
"""

import argparse
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mutate import Files, mutate, reseal
from reading import (
    FOUND,
    KINDS,
    REFUSED,
    SAME,
    WRONG,
    cache_files,
    in_child,
    make_caches,
    read_outcome,
    verify_outcome,
)

from deltatok.shards import DeltatokError
from deltatok.shards.tools.info import describe_cache

SECONDS = 20.0
EXTRA_BYTES = 512 * 2**20
MENDED_SHARE = 0.67
MAX_KEPT = 50


class Fuzzer:
    """The caches, and what was found so far."""

    def __init__(self, folder: Path, *, seed: int, keep: Path | None) -> None:
        self._folder, self._seed, self._keep = folder, seed, keep
        self._files: dict[str, Files] = {
            kind: {
                path.relative_to(folder / kind).as_posix(): path.read_bytes()
                for path in cache_files(folder / kind)
            }
            for kind in KINDS
        }
        self._truth = {kind: json.loads((folder / f"{kind}.json").read_text()) for kind in KINDS}
        self.executions = 0
        self.outcomes: Counter[str] = Counter()
        self.findings: Counter[str] = Counter()
        self.first_case: dict[str, int] = {}

    def run(self, case: int) -> list[str]:
        """One case; gives what is wrong with it."""
        rng = random.Random(f"{self._seed} {case}")
        kind = rng.choice(KINDS)
        files = dict(self._files[kind])
        changed = mutate(files, rng)
        is_mended = rng.random() < MENDED_SHARE
        if is_mended:
            changed = reseal(files, changed, rng)
        cache = self._folder / kind
        for name in changed:
            (cache / name).write_bytes(files[name])
        try:
            outcome = in_child(
                lambda: self._look(cache, kind, rng), seconds=SECONDS, extra_bytes=EXTRA_BYTES
            )
        finally:
            for name in changed:
                (cache / name).write_bytes(self._files[kind][name])
        self.executions += 1
        found = [] if outcome.fault is None else [outcome.fault]
        if outcome.result is not None:
            said, read = outcome.result
            mended = "mended" if is_mended else "damaged"
            self.outcomes[f"{mended}: verify {said}, reader {read}"] += 1
            if not is_mended and read == WRONG:
                found.append("wrong values, no error")
            if said == f"--deep {SAME}" and read == REFUSED:
                found.append("a reader refuses what verify --deep finds nothing in")
            if not is_mended and not said.endswith(FOUND) and not _is_harmless(changed):
                found.append(f"verify finds nothing in {sorted(changed)}")
        for finding in found:
            self.findings[finding] += 1
            if finding not in self.first_case:
                self.first_case[finding] = case
                print(f"case {case} ({kind}): {finding}", flush=True)
                self._save(case, kind, files)
        return found

    def _look(self, cache: Path, kind: str, rng: random.Random) -> tuple[str, str]:
        how: dict[str, Any] = {"verify": "sha256" if kind == "delta" else "size"}
        if rng.random() < 0.5:
            how["many"] = True
        read = read_outcome(cache, kind, self._truth[kind], **how)
        deep = rng.random() < 0.5
        said = verify_outcome(cache, deep=deep)
        with contextlib.suppress(DeltatokError):
            json.dumps(describe_cache(cache))
        return f"--deep {said}" if deep else said, read

    def _save(self, case: int, kind: str, files: Files) -> None:
        if self._keep is None or len(self.first_case) > MAX_KEPT:
            return
        folder = self._keep / f"{case}-{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def _is_harmless(changed: set[str]) -> bool:
    """JSON can be written in other ways with the same content; what readers take from it is held
    against the truth."""
    return changed <= {"cache.json"}


def main() -> int:
    """Fuzzes for so many minutes, or runs one case; prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--keep", type=Path, default=None, help="folder for damaged caches")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_caches(Path(folder))
        fuzzer = Fuzzer(Path(folder), seed=arguments.seed, keep=arguments.keep)
        if arguments.case is not None:
            return int(bool(fuzzer.run(arguments.case)))
        start = time.monotonic()
        while time.monotonic() - start < 60 * arguments.minutes:
            fuzzer.run(fuzzer.executions)
        seconds = time.monotonic() - start
    figures = {
        "executions": fuzzer.executions,
        "seconds": round(seconds, 1),
        "executions_per_s": round(fuzzer.executions / seconds, 1),
        "outcomes": dict(fuzzer.outcomes.most_common()),
        "findings": [
            {"what": what, "times": times, "first_case": fuzzer.first_case[what]}
            for what, times in fuzzer.findings.most_common()
        ],
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(f"{text}\n")
    return int(bool(fuzzer.findings))


if __name__ == "__main__":
    sys.exit(main())
