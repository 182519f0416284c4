"""A patch shard as one zip beside a folder of files: written, read, verified, and read by others.

    git worktree add /tmp/before 9b74f32    # the last commit that wrote folders
    python tests/benchmarks/zip.py --before /tmp/before --folder BIG_DISK --json FILE

Two processes, one with each tree, make a float16 cache of the same tokens (256 x 768 a frame) and
then take turns, round by round, at the same work. All ratios are zip over folder, of the medians of
one run: rates above 1 and seconds below 1 speak for the zip. `cpu` has the same by the processor's
time of all threads, which other work on the machine disturbs less. `write_form` has the same code
write the same members both ways, each flushed and hashed: what the form alone costs.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FORMS = ("folder", "zip")
TOKENS = "tokens/c/0/0/0/0"
SECONDS = 1.0
"""Of a round of reading."""


def main() -> None:
    """Runs the benchmark; prints the result and writes it to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="a tree that writes folders")
    parser.add_argument("--folder", type=Path, required=True, help="where the caches are made")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--patch-gb", type=float, default=1.0, help="of each cache [1.0]")
    parser.add_argument("--rounds", type=int, default=9, help="of which the first is left out [9]")
    parser.add_argument("--worker", choices=FORMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        _serve(arguments.folder, arguments.patch_gb)
        return
    here = Path(__file__).resolve().parents[2]
    with TemporaryDirectory(dir=arguments.folder) as name:
        workers = {
            form: _Worker(tree, form, Path(name) / form, arguments)
            for form, tree in zip(FORMS, (arguments.before.resolve(), here), strict=True)
        }
        result = _compare(workers, arguments.rounds)
        for worker in workers.values():
            worker.end()
    arguments.json.write_text(f"{json.dumps(result, indent=1)}\n")
    print(json.dumps(result, indent=1))


class _Worker:
    """A process that imports deltatok from `tree`."""

    def __init__(self, tree: Path, form: str, folder: Path, arguments: argparse.Namespace) -> None:
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--worker", form]
        command += ["--folder", str(folder), "--patch-gb", str(arguments.patch_gb)]
        command += ["--before", str(tree), "--json", str(arguments.json)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{tree / '.typing'}:{tree / 'tests/benchmarks'}"},
        )

    def ask(self, what: str) -> Any:
        """What the work `what` gives, see `_Work`, or a list of the names of all works."""
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("both are pipes")
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        """The process ends."""
        self.ask("end")
        self._process.wait()


def _compare(workers: dict[str, _Worker], rounds: int) -> dict[str, Any]:
    names = workers["folder"].ask("works")
    found: dict[str, dict[str, list[list[float]]]] = {
        name: {form: [] for form in FORMS} for name in [*names, *workers["zip"].ask("works")]
    }
    for number in range(rounds):
        for name, by_form in found.items():
            for form in FORMS if number % 2 else reversed(FORMS):
                if name in names or form == "zip":
                    by_form[form].append(workers[form].ask(name))
    found["write_form_s"] = {form: found.pop(f"write_form_{form}_s")["zip"] for form in FORMS}
    figures = {
        clock: {name: _ratio(by_form, number) for name, by_form in found.items()}
        for number, clock in enumerate(("wall", "cpu"))
    }
    return {"rounds": rounds - 1, **figures}


def _ratio(by_form: dict[str, list[list[float]]], number: int) -> dict[str, float]:
    medians = {
        form: statistics.median([value[number] for value in values[1:]])
        for form, values in by_form.items()
        if values
    }
    if len(medians) == 2:
        medians["zip_over_folder"] = medians["zip"] / medians["folder"]
    return medians


def _serve(folder: Path, gigabytes: float) -> None:
    """Answers one line with another until `end`."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    works = _works(folder, gigabytes)
    for line in sys.stdin:
        what = line.strip()
        answer: Any = list(works) if what == "works" else None
        if what in works:
            answer = works[what]()
        print(json.dumps(answer), file=said, flush=True)
        if what == "end":
            return


_Work = Callable[[], tuple[float, float]]
"""Gives seconds or a rate a second, by the clock and by the processor's time."""


def _works(folder: Path, gigabytes: float) -> dict[str, _Work]:
    """By name: seconds or a rate a second, as the name ends."""
    import loaders  # type: ignore[import-not-found]  # of the tree that this process reads
    import numpy as np

    from deltatok.shards import PatchShards
    from deltatok.shards.patches.writer import write_patch_shard
    from deltatok.shards.tools.verify import verify_cache
    from deltatok.shards.windows import ShardRows

    cache = folder / "cache"
    loaders.make_patches(cache, 16, gigabytes)
    shards = PatchShards(cache)
    paths = sorted(cache.glob("shards/*.zarr*"))
    is_zip = paths[0].is_file()
    per_shard, num_frames = len(shards) // len(paths), shards.shape[0]
    rng = np.random.default_rng(0)
    draws = rng.integers([0, 0], [len(shards), num_frames - 1], (100_000, 2)).tolist()
    drawn = iter(draws * 1000)
    whole = np.empty((16, *shards.shape), np.float16)
    two = np.empty((64, 2, *shards.shape[1:]), np.float16)
    rows = ShardRows(
        tokens=shards.stored_tokens(np.arange(per_shard)),
        timestamps_s=shards.timestamps_s(np.arange(per_shard)),
        frame_index=shards.frame_index(np.arange(per_shard)),
        crop=shards.crop[:per_shard],
        flipped=shards.flipped[:per_shard],
        clip=np.zeros(per_shard, np.int32),
        keys=["clip000000.mp4"],
    )

    def write() -> None:
        write_patch_shard(folder / "written", 0, rows, dtype="float16", seed=0)

    def timed(work: Callable[[], object]) -> _Work:
        def run() -> tuple[float, float]:
            shutil.rmtree(folder / "written", ignore_errors=True)
            shutil.copytree(cache, folder / "written", ignore=lambda *_: ["shards"])
            (folder / "written/shards").mkdir()
            start, cpu_start = time.perf_counter(), time.process_time()
            work()
            return time.perf_counter() - start, time.process_time() - cpu_start

        return run

    def rate(work: Callable[[], float]) -> _Work:
        def run() -> tuple[float, float]:
            count, start, cpu_start = 0.0, time.perf_counter(), time.process_time()
            while (spent := time.perf_counter() - start) < SECONDS:
                count += work()
            return count / spent, count / (time.process_time() - cpu_start)

        return run

    def windows() -> float:
        chosen = [next(drawn)[0] for _ in range(len(whole))]
        return len(shards.stored_tokens(chosen, out=whole))

    def pairs() -> float:
        chosen = [next(drawn) for _ in range(len(two))]
        frames = [[frame, frame + 1] for _, frame in chosen]
        return len(shards.stored_tokens([w for w, _ in chosen], frames=frames, out=two))

    def place() -> tuple[int, int, int]:
        window, frame = next(drawn)
        return window // per_shard, window % per_shard, frame

    def pair_of(arrays: list[Any], read: Callable[[Any], Any]) -> _Work:
        def work() -> float:
            shard, window, frame = place()
            read(arrays[shard][window, frame : frame + 2])
            return 1.0

        return rate(work)

    def open_all() -> None:
        """Opens the cache, then every shard by its first frame."""
        reader = PatchShards(cache)
        for first in reader.shard_starts[:-1].tolist():
            reader.stored_tokens([first], frames=[[0]])

    zarrs, stores = _by_zarr(paths), _by_tensorstore(paths)
    frame_bytes = two[0, 0].nbytes

    def pair_of_members(arrays: list[Any]) -> _Work:
        """Two frames by their bytes: tensorstore 0.1.86 never ends where it reads parts of arrays
        in large zips."""

        def work() -> float:
            shard, window, frame = place()
            at = (window * num_frames + frame) * (frame_bytes + 4)
            found = arrays[shard].read(TOKENS, byte_range=slice(at, at + 2 * frame_bytes + 4))
            return float(len(found.result().value) > 0)

        return rate(work)

    sizes = [float(path.stat().st_size) for path in cache.rglob("*") if path.is_file()]
    works: dict[str, _Work] = {
        "files": lambda: (float(len(sizes)), float(len(sizes))),
        "bytes": lambda: (sum(sizes), sum(sizes)),
        "write_shard_s": timed(write),
        "windows_per_s": rate(windows),
        "pairs_per_s": rate(pairs),
        "open_s": timed(open_all),
        "table_s": timed(lambda: PatchShards(cache).table()),
        "verify_s": timed(lambda: verify_cache(cache)),
        "verify_deep_s": timed(lambda: verify_cache(cache, deep=True)),
        "zarr_pairs_per_s": pair_of(zarrs, np.asarray),
        "zarr_shard_s": timed(lambda: np.asarray(zarrs[0][...])),
        "tensorstore_pairs_per_s": (
            pair_of_members(_members_by_tensorstore(paths))
            if is_zip
            else pair_of(stores, lambda part: part.read().result())
        ),
        "tensorstore_shard_s": timed(lambda: stores[0].read().result()),
    }
    if is_zip:
        works["tensorstore_reads_parts"] = lambda: _reads_parts(paths[0])
        works["zarr_mapped_pairs_per_s"] = pair_of(_by_mapped_zarr(paths), np.asarray)
        works["write_form_folder_s"] = timed(
            lambda: _write_members(paths[0], folder / "written/shards", as_zip=False)
        )
        works["write_form_zip_s"] = timed(
            lambda: _write_members(paths[0], folder / "written/shards", as_zip=True)
        )
    return works


def _by_zarr(paths: list[Path]) -> list[Any]:
    """The tokens of every shard."""
    import zarr

    stores = [zarr.storage.ZipStore(p) if p.is_file() else str(p) for p in paths]
    return [zarr.open_group(store, mode="r")["tokens"] for store in stores]


def _by_mapped_zarr(paths: list[Path]) -> list[Any]:
    """The same of zips by the recipe, which maps the members."""
    from deltatok.shards.recipes import patches_zarr

    return [patches_zarr.open_shard(path)["tokens"] for path in paths]


def _by_tensorstore(paths: list[Path]) -> list[Any]:
    import tensorstore

    def store(path: Path) -> dict[str, Any]:
        if path.is_file():
            base = {"driver": "file", "path": str(path)}
            return {"driver": "zip", "base": base, "path": "tokens/"}
        return {"driver": "file", "path": f"{path}/tokens/"}

    specs = [{"driver": "zarr3", "kvstore": store(path)} for path in paths]
    return [tensorstore.open(spec, open=True, read=True).result() for spec in specs]


def _members_by_tensorstore(paths: list[Path]) -> list[Any]:
    import tensorstore

    bases = [{"driver": "file", "path": str(path)} for path in paths]
    return [tensorstore.KvStore.open({"driver": "zip", "base": base}).result() for base in bases]


def _reads_parts(path: Path) -> tuple[float, float]:
    """1 if tensorstore reads a window of an array in a zip, 0 if it does not within 20 s."""
    code = f"""
import tensorstore
base = {{"driver": "file", "path": {str(path)!r}}}
kvstore = {{"driver": "zip", "base": base, "path": "tokens/"}}
spec = {{"driver": "zarr3", "kvstore": kvstore}}
tensorstore.open(spec, open=True).result()[1].read().result()
"""
    try:
        subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
    except subprocess.TimeoutExpired:
        return 0.0, 0.0
    return 1.0, 1.0


def _write_members(source: Path, target: Path, *, as_zip: bool) -> None:
    """Writes the members of a shard as a zip or as files, flushes all and takes SHA-256."""
    from deltatok.shards.files import flush, sha256_file
    from deltatok.shards.patches.archive import write_archive
    from deltatok.shards.patches.layout import TOKENS_CHUNK

    global _members
    if not _members:
        with zipfile.ZipFile(source) as archive:
            _members = {name: archive.read(name) for name in archive.namelist()}
    if as_zip:
        with (target / "x.zarr.zip").open("xb") as file:
            write_archive(file, _members.items(), last=TOKENS_CHUNK)
    else:
        for name, data in _members.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
    for path in (*target.rglob("*"), target):
        flush(path)
        if path.is_file():
            hashlib.sha256(sha256_file(path).encode())


_members: dict[str, bytes] = {}


if __name__ == "__main__":
    main()
