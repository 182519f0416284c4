"""A few cases of the fuzzer: forged caches give data or our errors, never anything else.

tests/faults/fuzz_readers.py runs as many as one likes, in children with limits of time and memory.
"""

import importlib.util
import json
import random
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from deltatok.shards import DeltaShards, DeltatokError, PatchShards
from deltatok.shards.tools.info import describe_cache
from deltatok.shards.tools.verify import verify_cache

CASES = 60
MUTATE = Path(__file__).parents[1] / "faults" / "mutate.py"


@pytest.fixture(scope="module")
def mutations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate", MUTATE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["float16", "int8", "zstd", "delta"])
def test_forged_caches_give_data_or_our_errors(
    little: Any, tmp_path: Path, mutations: ModuleType, kind: str
) -> None:
    folder = tmp_path / "cache"
    if kind == "delta":
        little.make_deltas(folder)
    elif kind == "zstd":
        little.make_patches(folder, compression="zstd")
    else:
        little.make_patches(folder, dtype=kind)
    whole = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    outcomes = set()
    for case in range(CASES):
        rng = random.Random(f"{kind} {case}")
        files = dict(whole)
        changed = mutations.reseal(files, mutations.mutate(files, rng), rng)
        for name in changed:
            (folder / name).write_bytes(files[name])
        outcomes.add(read(folder, kind))
        with suppress(DeltatokError):
            verify_cache(folder, deep=True)
        with suppress(DeltatokError):
            json.dumps(describe_cache(folder))
        for name in changed:
            (folder / name).write_bytes(whole[name])
    assert outcomes == {"read", "refused"}


def read(folder: Path, kind: str) -> str:
    try:
        reader: Any = DeltaShards(folder) if kind == "delta" else PatchShards(folder)
        windows = np.arange(reader.num_windows)
        tokens = reader.tokens(windows)
        assert tokens.shape == (len(windows), *reader.shape)
        assert reader.timestamps_s(windows).shape == (len(windows), reader.shape[0])
        assert all(0 <= clip < len(reader.keys) for clip in reader.clip_index.tolist())
    except DeltatokError:
        return "refused"
    return "read"
