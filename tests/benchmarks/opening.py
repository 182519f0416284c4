"""How long it takes to close and open caches of many shards, of which only the metadata is there.

    python tests/benchmarks/opening.py [--shards 10000] [--channels 768] [--json FILE]

Synthetic done-records (64 windows of 16 clips, statistics of all channels), written and finished as
every cache is; the data are empty files with the right names. Closing reads every done-record once.
Opening reads cache.json and index.jsonl and lists shards/: no done-record and no data file is
opened (counted). For comparison: reading all done-records, as without the index.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deltatok.shards import (
    DELTAS,
    PATCHES,
    CacheInfo,
    CacheShape,
    DeltaShards,
    PatchShards,
)
from deltatok.shards.cache import finish_cache, open_cache
from deltatok.shards.files import json_bytes
from deltatok.shards.plan import PlanEntry, keys_sha256, write_plan
from deltatok.shards.records import DoneRecord, StoredFile, iterate_done, shard_path

ROWS, CLIPS = 64, 16
REPEATS = 3


def main() -> int:
    """Makes the caches, opens them, prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"shards": arguments.shards, "channels": arguments.channels}
    with tempfile.TemporaryDirectory() as folder:
        for name, format, reader in (
            ("patches", PATCHES, PatchShards),
            ("deltas", DELTAS, DeltaShards),
        ):
            cache = Path(folder) / name
            make(cache, format=format, shards=arguments.shards, channels=arguments.channels)
            start = time.process_time()
            finish_cache(cache)
            finish_s = time.process_time() - start
            opens, seconds = measured(lambda r=reader, c=cache: r(c, verify="size"))
            records_s = measured(lambda c=cache: list(iterate_done(c)), repeats=1)[1]
            figures[name] = {
                "finish_cpu_s": round(finish_s, 3),
                "open_s": round(seconds, 3),
                "files_opened": opens,
                "all_records_s": round(records_s, 3),
                "index_bytes": (cache / "index.jsonl").stat().st_size,
                "records_bytes": sum(p.stat().st_size for p in (cache / "shards").glob("*.json")),
            }
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(f"{text}\n")
    return 0


def measured(function: Callable[[], Any], *, repeats: int = REPEATS) -> tuple[int, float]:
    """Files opened in one call, and the median of its seconds."""
    opened: list[object] = []
    is_counting = [True]

    def count(event: str, details: tuple[object, ...]) -> None:
        if event == "open" and is_counting:
            opened.append(details[0])

    sys.addaudithook(count)  # for ever
    function()
    is_counting.clear()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return len(opened), sorted(times)[len(times) // 2]


def make(folder: Path, *, format: str, shards: int, channels: int) -> None:
    """A cache whose data files are empty, and which is to be finished."""
    patches = format == PATCHES
    shape = CacheShape(
        num_frames=8,
        num_tokens=256 if patches else None,
        grid=(16, 16) if patches else None,
        hidden_size=channels,
    )
    identity = {"sampling": {"seed": 0}, "storage": {"dtype": "float16"}}
    open_cache(folder, CacheInfo(format=format, identity=identity, shape=shape, licence="none"))
    entries = []
    for shard in range(shards):
        keys = [f"class{shard % 700:03d}/video_{shard:06d}_{clip:02d}.mp4" for clip in range(CLIPS)]
        entries += [PlanEntry(key=key, source=key, size_bytes=1, shard=shard) for key in keys]
        data = shard_path(folder, shard, ".zarr.zip" if patches else ".tar")
        record = DoneRecord(
            shard=shard,
            clips=CLIPS,
            keys_sha256=keys_sha256(keys),
            rows=ROWS,
            file=StoredFile(bytes=10**8, sha256="0" * 64),
            abs_max=1.0,
            decoder="pyav",
        )
        value = {"format_version": 1, **asdict(record)}
        shard_path(folder, shard, ".json").write_bytes(json_bytes(value))
        data.touch()
    write_plan(folder, entries)


if __name__ == "__main__":
    sys.exit(main())
