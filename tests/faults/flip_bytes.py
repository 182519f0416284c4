"""Change one byte of a cache, or cut a file short, read it and verify it; again and again.

    python tests/faults/flip_bytes.py [--flips 1000] [--cuts 200] [--seed 0] [--json FILE]
    python tests/faults/flip_bytes.py --flips all

Over a little cache of every kind (float16, bfloat16, int8, zstd, delta). Each case runs in a child
with limits of time and memory. Exits 1 if verify misses a change of content, if a reader gives
wrong values without an error, or if anything hangs, crashes or raises what is none of our errors.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from reading import (
    FOUND,
    KINDS,
    WRONG,
    cache_files,
    in_child,
    make_caches,
    read_outcome,
    verify_outcome,
)

SECONDS = 20.0
EXTRA_BYTES = 512 * 2**20


def main() -> int:
    """Runs all cases; prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", default="1000", help="bytes of each cache, or `all`")
    parser.add_argument("--cuts", type=int, default=200, help="cut files of each cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        make_caches(Path(folder))
        kinds = {
            kind: Driver(Path(folder), kind).run(arguments.flips, arguments.cuts, arguments.seed)
            for kind in arguments.kinds
        }
    figures: dict[str, Any] = {"kinds": kinds, "seconds": round(time.monotonic() - start, 1)}
    for name in ("flips", "cuts", "missed_by_verify", "wrong_values", "faults"):
        figures[name] = sum(
            len(found[name]) if isinstance(found[name], list) else found[name]
            for found in kinds.values()
        )
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(f"{text}\n")
    return int(bool(figures["missed_by_verify"] + figures["wrong_values"] + figures["faults"]))


class Driver:
    """The cases of one kind of cache."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._cache = folder / kind
        self._kind = kind
        self._truth = json.loads((folder / f"{kind}.json").read_text())
        self._outcomes: Counter[str] = Counter()
        self._missed: list[str] = []
        self._wrong: list[str] = []
        self._faults: list[str] = []
        self._harmless = 0

    def run(self, flips: str, cuts: int, seed: int) -> dict[str, Any]:
        """All cases; the cache is whole again afterwards."""
        rng = random.Random(f"{seed} {self._kind}")
        files = {path: path.read_bytes() for path in cache_files(self._cache)}
        places = [(path, position) for path, data in files.items() for position in range(len(data))]
        chosen = places if flips == "all" else rng.sample(places, min(int(flips), len(places)))
        for path, position in chosen:
            changed = bytearray(files[path])
            changed[position] ^= rng.randrange(1, 256)
            self._case(path, files[path], bytes(changed), f"byte {position}")
        for _ in range(cuts):
            path = rng.choice([path for path, data in files.items() if data])
            length = rng.randrange(len(files[path]))
            self._case(path, files[path], files[path][:length], f"cut at {length}")
        return {
            "bytes": len(places),
            "flips": len(chosen),
            "cuts": cuts,
            "outcomes": dict(sorted(self._outcomes.items())),
            "same_content": self._harmless,
            "missed_by_verify": self._missed,
            "wrong_values": self._wrong,
            "faults": self._faults,
        }

    def _case(self, path: Path, before: bytes, after: bytes, what: str) -> None:
        name = f"{path.relative_to(self._cache)}: {what}"
        path.write_bytes(after)
        try:
            outcome = in_child(self._look, seconds=SECONDS, extra_bytes=EXTRA_BYTES)
        finally:
            path.write_bytes(before)
        if outcome.fault is not None:
            self._faults.append(f"{name}: {outcome.fault}")
            return
        said, *read = outcome.result
        self._outcomes[f"verify {said}, readers {', '.join(read)}"] += 1
        if WRONG in read:
            self._wrong.append(name)
        if said != FOUND:
            if _same_json(before, after):
                self._harmless += 1
            else:
                self._missed.append(name)

    def _look(self) -> list[str]:
        # As they are opened by default, of a few shards and of many; a tar has no checksums of its
        # own, so that it is hashed.
        verify = "sha256" if self._kind == "delta" else "size"
        ways: list[dict[str, Any]] = [{"verify": verify}, {"verify": verify, "many": True}]
        return [
            verify_outcome(self._cache, deep=False),
            *(read_outcome(self._cache, self._kind, self._truth, **how) for how in ways),
        ]


def _same_json(before: bytes, after: bytes) -> bool:
    """Whether both are the same lines of JSON, apart from spaces."""
    try:
        values = [[json.loads(line) for line in data.splitlines()] for data in (before, after)]
    except ValueError:
        try:
            values = [json.loads(data) for data in (before, after)]
        except ValueError:
            return False
    return json.dumps(values[0]) == json.dumps(values[1])


if __name__ == "__main__":
    sys.exit(main())
