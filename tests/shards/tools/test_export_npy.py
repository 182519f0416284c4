"""npy folders need NumPy alone, hold the cache's numbers, and explain themselves."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import (
    DeltaShards,
    DeltatokError,
    PatchShards,
    UsageError,
    finish_cache,
    write_patch_shard,
)
from deltatok.shards.tools.export_plan import Selection
from deltatok.shards.tools.npy_folder import export_npy


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_patch_tokens_come_as_stored_and_the_readme_says_how_to_read_them(
    little: Any, tmp_path: Path, run_script: Callable[..., str], dtype: str
) -> None:
    cache = little.make_patches(tmp_path / "cache", dtype=dtype)
    out = tmp_path / "out"
    assert export_npy([cache.folder], out) == 11
    readme = (out / "README.txt").read_text()
    assert "DINOv3 License" in readme
    formula = [
        line.strip()
        for line in readme.splitlines()
        if line.strip().startswith(("(tokens", "tokens.astype"))
    ]
    reader = PatchShards(cache.folder)
    np.save(tmp_path / "wanted.npy", reader[:])
    np.save(tmp_path / "times.npy", reader.timestamps_s(np.arange(11)))
    run_script(
        """
import sys, json, pathlib, numpy
out = pathlib.Path(sys.argv[1])
tokens = numpy.load(out / "tokens.npy", mmap_mode="r")
assert isinstance(tokens, numpy.memmap)
if (out / "token_scale.npy").exists():
    token_scale, channel_scale = (numpy.load(out / f"{n}_scale.npy") for n in ("token", "channel"))
values = eval(sys.argv[4]) if sys.argv[4] else tokens.astype("float32")
numpy.testing.assert_array_equal(values, numpy.load(sys.argv[2]), strict=True)
numpy.testing.assert_array_equal(numpy.load(out / "timestamps.npy"), numpy.load(sys.argv[3]))
assert numpy.load(out / "black.npy").shape == (4, 6)
assert "deltatok" not in sys.modules
""",
        out,
        tmp_path / "wanted.npy",
        tmp_path / "times.npy",
        formula[0] if formula else "",
    )
    assert bool(formula) == (dtype != "float16")


def test_windows_are_described_line_by_line(deltas: Any, tmp_path: Path) -> None:
    export_npy([deltas.folder], tmp_path / "out")
    reader = DeltaShards(deltas.folder)
    lines = (tmp_path / "out/windows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {**reader.window(window), "label": None, "split": None} for window in range(11)
    ]
    tokens = np.load(tmp_path / "out/tokens.npy")
    np.testing.assert_array_equal(tokens, reader[:], strict=True)
    source = json.loads((tmp_path / "out/source.json").read_text())
    assert source["fingerprint"] == reader.fingerprint
    assert source["exported_from"]["caches"][0]["windows"] == 11
    assert not (tmp_path / "out/black.npy").exists()


def test_a_selection_keeps_the_order_of_the_cache(patches: Any, tmp_path: Path) -> None:
    clips = frozenset({"clip1.mp4", "clip2.mp4"})
    count = export_npy([patches.folder], tmp_path / "out", selection=Selection(clips=clips))
    reader = PatchShards(patches.folder)
    wanted = reader.stored_tokens(reader.select(clips=clips))
    assert count == len(wanted)
    np.testing.assert_array_equal(np.load(tmp_path / "out/tokens.npy"), wanted)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_can_be_converted(little: Any, tmp_path: Path, dtype: str) -> None:
    cache = little.make_patches(tmp_path / "cache", dtype="int8").folder
    export_npy([cache], tmp_path / "out", dtype=dtype)
    tokens = np.load(tmp_path / "out/tokens.npy")
    np.testing.assert_array_equal(tokens, PatchShards(cache)[:].astype(dtype), strict=True)
    assert not (tmp_path / "out/token_scale.npy").exists()


def test_small_pieces_give_the_same_file(
    patches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_npy([patches.folder], tmp_path / "one")
    monkeypatch.setattr("deltatok.shards.tools.npy_folder.CHUNK_BYTES", 1)
    export_npy([patches.folder], tmp_path / "two")
    files = [path.name for path in (tmp_path / "one").iterdir()]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_was_begun_is_never_seen_and_goes_away(
    patches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.partial-1999999999-00000000").mkdir()  # of another machine: kept for a day
    monkeypatch.setattr("deltatok.shards.tools.npy_folder.CHUNK_BYTES", 1)

    def stop(done: int, total: int) -> None:
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_npy([patches.folder], tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob("out.partial-*"))) == 1


def test_what_is_there_is_never_replaced(patches: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(UsageError, match="is there already"):
        export_npy([patches.folder], tmp_path / "out")
    with pytest.raises(UsageError, match="dtype 'bfloat16', npy folders hold float16, float32"):
        export_npy([patches.folder], tmp_path / "new", dtype="bfloat16")


def test_values_beyond_float16_name_the_clip(little: Any, tmp_path: Path) -> None:
    cache = little.make_patches(tmp_path / "cache", dtype="bfloat16")
    rows = replace(cache.rows[0], tokens=cache.rows[0].tokens * np.float32(1e6))
    write_patch_shard(cache.folder, 0, rows, dtype="bfloat16", seed=7)
    finish_cache(cache.folder, {})
    with pytest.raises(DeltatokError, match=r"clip 'clip.*beyond the range of float16"):
        export_npy([cache.folder], tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
