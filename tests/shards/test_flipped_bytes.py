"""Any byte changed, any file cut: verify finds it, readers refuse it or give what was stored.

A seeded few; tests/faults/flip_bytes.py does as many as one likes, in children that may die.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import DeltaShards, DeltatokError, PatchShards
from deltatok.shards.tools.verify import verify_cache

FLIPS, CUTS = 40, 10


def values(folder: Path, kind: str) -> dict[str, Any]:
    """Everything a reader gives, comparable."""
    reader: Any = DeltaShards(folder) if kind == "delta" else PatchShards(folder)
    windows = np.arange(reader.num_windows)
    clips = [reader.keys[clip] for clip in reader.clip_index]
    found = {
        "tokens": reader.tokens(windows).tobytes(),
        "timestamps_s": reader.timestamps_s(windows).tobytes(),
        "clips": clips,
        "labels": reader.labels,
    }
    if kind == "delta":
        return {**found, "windows": [reader.window(int(window)) for window in windows]}
    columns = (reader.crop, reader.flipped, reader.frame_index(windows), reader.black)
    return {**found, "columns": [column.tobytes() for column in columns]}


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8", "zstd", "delta"])
@pytest.mark.parametrize("large", [False, True])
def test_damage_is_found_by_verify_and_never_read_as_values(
    little: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, large: bool
) -> None:
    folder = tmp_path / "cache"
    if kind == "delta":
        little.make_deltas(folder)
    elif kind == "zstd":
        little.make_patches(folder, compression="zstd")
    else:
        little.make_patches(folder, dtype=kind)
    if large:  # the sizes of the files are not looked at when it is opened
        monkeypatch.setattr("deltatok.shards.reader.EAGER_SHARDS", 0)
    truth = values(folder, kind)
    rng = random.Random(f"{kind} {large}")
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    places = [(path, position) for path, data in files.items() for position in range(len(data))]
    damage = []
    for path, position in rng.sample(places, FLIPS):
        changed = bytearray(files[path])
        changed[position] ^= rng.randrange(1, 256)
        damage.append((path, bytes(changed)))
    for path in rng.choices([path for path, data in files.items() if data], k=CUTS):
        damage.append((path, files[path][: rng.randrange(len(files[path]))]))
    refused = 0
    for path, data in damage:
        path.write_bytes(data)
        if not large:
            assert found_by_verify(folder), path
        try:
            assert values(folder, kind) == truth, path
        except DeltatokError:
            refused += 1
        path.write_bytes(files[path])
    assert refused > 10


def found_by_verify(folder: Path) -> bool:
    try:
        return bool(verify_cache(folder).problems)
    except DeltatokError:
        return True
