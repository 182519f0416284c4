"""Write the two tables of docs/scale.md: growth.json's, and the arithmetic of three sizes.

    python tests/benchmarks/scale.py

Nothing of the arithmetic is measured on a GPU: hours are FLOPs (evaluate/flops.py) over a rate that
is assumed. What a step of ours takes goes on from growth.json's two largest sizes in a straight
line.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltatok.evaluate.flops import FlopsConfig, flops_rows
from deltatok.evaluate.tables import markdown_table

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "scale.md"
FIGURES = HERE / "growth.json"
MARKS = ("growth", "arithmetic")
CLIPS = (650_000, 10_000_000, 100_000_000)

WINDOWS, FRAMES, SIDE = 4, 8, 256
"""configs/extract/kinetics-256.yaml."""
TOKENS, CHANNELS = (SIDE // 16) ** 2, 768
CLIPS_PER_SHARD = 16
"""ExtractConfig.frames_per_shard, 512, over frames a clip."""
SHARDS_PER_PART = 1000
BLOCK_BYTES = 16 * 2**20
"""Of one read of `residency: stream` (train/data/stream.py)."""
TABLE_BYTES = 8 + 4 * 4 + 1 + 2 * 4 * FRAMES
"""A window in memory: clip, crop, flip, frames and times (shards/windows.py)."""
MEASURED_PER_SHARD = 10
"""Clips a shard of growth.py: of the table, time goes with the shards."""
INDEX_BYTES = 96
"""A shard of an opened cache (shards/index.py)."""
TFLOPS = 396.0
"""40 % of an H200's bf16 peak, as in configs/: an assumption."""
DECODE_S = 0.24
"""CPU seconds of decord, one thread, for the windows of a clip of 10 s at 340 x 256: the two real
Kinetics clips of the tests' videos, median of five runs, two CPU cores, 2026-11-22."""


def growth_table(figures: dict[str, Any]) -> str:
    """A row a step."""
    largest = figures["sizes"][-1]
    header = [
        "step",
        "time grows with clips to the",
        "CPU us a clip",
        f"CPU s, {largest:,} clips",
        "memory grows to the",
        "bytes a clip",
        "files opened",
    ]
    body = []
    for step, found in figures["steps"].items():
        last = found["sizes"][-1]
        body.append(
            [
                step,
                _power(found["time_exponent"]),
                f"{found['us_per_clip']:,.1f}",
                f"{last['cpu_s']:,.2f}",
                _power(found["memory_exponent"]),
                f"{found['bytes_per_clip']:,.0f}",
                f"{last['files_opened']:,}",
            ]
        )
    return markdown_table(header, body)


def _power(exponent: float | None) -> str:
    return "-" if exponent is None else f"{exponent:.2f}"


def arithmetic_table(figures: dict[str, Any]) -> str:
    """A column a size."""
    gflops = {row.name: row.gflops for row in flops_rows(FlopsConfig(frame_size=SIDE))}
    frame = gflops["backbone, a frame"]
    pair = gflops["tokenizer training pair: from cached patch tokens"]
    window = gflops["window: whole, from cached delta tokens"]
    frame_bytes = TOKENS * CHANNELS * 2
    window_bytes = FRAMES * CHANNELS * 2
    steps = figures["steps"]

    def hours(giga: float) -> float:
        return giga / (TFLOPS * 1e3) / 3600

    def ours(step: str) -> Callable[[int], str]:
        before, last = steps[step]["sizes"][-2:]
        more = last["clips"] - before["clips"]
        cpu_s = (last["cpu_s"] - before["cpu_s"]) / more
        held = max(0, last["peak_bytes"] - before["peak_bytes"]) / more
        return lambda clips: f"{_seconds(cpu_s * clips)}, {_bytes(held * clips)}"

    def table(clips: int) -> str:
        shards = clips / CLIPS_PER_SHARD
        cpu_s = shards * steps["table of all windows"]["us_per_clip"] * MEASURED_PER_SHARD / 1e6
        return f"{_seconds(cpu_s)}, {_bytes(clips * WINDOWS * TABLE_BYTES)}"

    per_clip, pairs = WINDOWS * FRAMES, WINDOWS * (FRAMES - 1)
    rows: dict[str, Callable[[int], str]] = {
        "frames through the backbone": lambda n: _count(n * per_clip),
        "decoding, core-hours": lambda n: f"{n * DECODE_S / 3600:,.0f}",
        "backbone, H200-hours": lambda n: f"{hours(n * per_clip * frame):,.1f}",
        "patch tokens, float16": lambda n: _bytes(n * per_clip * frame_bytes),
        "patch tokens, int8": lambda n: _bytes(n * per_clip * (frame_bytes / 2 + TOKENS * 2)),
        "delta tokens": lambda n: _bytes(n * WINDOWS * window_bytes),
        "shards of 16 clips": lambda n: _count(n / CLIPS_PER_SHARD),
        "files, one cache (as many PUTs on a store)": lambda n: _count(
            n / CLIPS_PER_SHARD * (2 + 1 / SHARDS_PER_PART)
        ),
        "plan, on disk": lambda n: _bytes(n * figures["plan_bytes_per_clip"]),
        "index, on disk": lambda n: _bytes(n / CLIPS_PER_SHARD * figures["index_bytes_per_shard"]),
        "index, in a reader": lambda n: _bytes(n / CLIPS_PER_SHARD * INDEX_BYTES),
        "an epoch of the tokenizer, H200-hours": lambda n: f"{hours(n * pairs * pair):,.0f}",
        "the same read in blocks of 16 MB, requests": lambda n: _count(
            n * per_clip * frame_bytes / BLOCK_BYTES
        ),
        "an epoch of the world model, K = 256, H200-hours": lambda n: (
            f"{hours(n * WINDOWS * window):,.1f}"
        ),
        "finding the clips in a tree: CPU, memory": ours("find clips: a folder tree"),
        "the same by Kinetics' list: CPU, memory": ours("find clips: Kinetics' list"),
        "making the plan: CPU, memory beside the clips": ours("make the plan"),
        "resuming: CPU, memory beside the clips": ours("resume with one shard left"),
        "closing: CPU, memory": ours("close the cache"),
        "opening: CPU, memory": ours("open the cache"),
        "table of all windows, each rank of a training: CPU, memory": table,
    }
    header = ["", *(f"{_count(clips)} clips" for clips in CLIPS)]
    table = markdown_table(header, [[name, *map(row, CLIPS)] for name, row in rows.items()])
    frames_per_s = TFLOPS * 1e3 / frame
    read = TFLOPS * 1e3 / pair / (FRAMES - 1) * FRAMES * frame_bytes
    deltas = TFLOPS * 1e3 / window * window_bytes
    cores = frames_per_s / per_clip * DECODE_S
    return (
        f"{table}\n\nWhatever the size, one H200 at that rate: the backbone takes "
        f"{frames_per_s:,.0f} frames/s, for which {cores:,.0f} cores decode and "
        f"{frames_per_s * frame_bytes / 1e9:.1f} GB/s are written (float16); the tokenizer reads "
        f"{read / 1e9:.2f} GB/s of patch tokens, the world model {deltas / 1e6:.0f} MB/s of delta "
        f"tokens.\n"
    )


def _count(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}" if number < 1000 * size else f"{number:,.0f}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e6:.2g} MB"


def _seconds(number: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.2g} s"


def sections() -> dict[str, str]:
    """What stands between the page's marks."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    return {"growth": growth_table(figures) + "\n", "arithmetic": arithmetic_table(figures)}


def marks(name: str) -> tuple[str, str]:
    """The lines before and after a section."""
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"


def main() -> int:
    """Rewrites the sections of docs/scale.md; 0."""
    text = PAGE.read_text(encoding="utf-8")
    for name, section in sections().items():
        begin, end = marks(name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + section + end + after
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
