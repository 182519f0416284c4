"""Exports hold the windows asked for, number for number, and say where they come from."""

import json
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import (
    CacheMismatch,
    DamagedShard,
    DeltaShards,
    DeltatokError,
    PatchShards,
    UsageError,
    read_cache_info,
)
from deltatok.shards.cache import finish_cache
from deltatok.shards.deltas.writer import write_delta_shard
from deltatok.shards.files import sha256_file
from deltatok.shards.patches.int8 import dequantise
from deltatok.shards.patches.layout import from_stored, to_bfloat16_bits
from deltatok.shards.patches.writer import write_patch_shard
from deltatok.shards.plan import Plan, remove_strangers, window_order, write_plan
from deltatok.shards.records import Quarantined, write_quarantine
from deltatok.shards.tools.export import ClipSelection, export_cache
from deltatok.shards.tools.info import describe_cache
from deltatok.shards.tools.verify import verify_cache


def opened(folder: Path) -> Any:
    kind = PatchShards if read_cache_info(folder).shape.num_tokens else DeltaShards
    return kind(folder)


def windows_of(folder: Path) -> dict[tuple[Any, ...], int]:
    """Window numbers by what identifies a window."""
    reader = opened(folder)
    found = {}
    for number in range(len(reader)):
        window = reader.window(number)
        found[window["clip"], *window["frames"], *window["crop"], window["flipped"]] = number
    assert len(found) == len(reader)
    return found


def assert_same_windows(out: Path, *sources: Path, dtype: str = "stored") -> int:
    """Every window of `out` has the stored bits and times of its source; gives how many."""
    known = {window: (source, n) for source in sources for window, n in windows_of(source).items()}
    reader = opened(out)
    for window, number in windows_of(out).items():
        source, old = known[window]
        other = opened(source)
        if dtype == "stored" and isinstance(reader, PatchShards):
            np.testing.assert_array_equal(
                reader.stored_tokens([number]), other.stored_tokens([old]), strict=True
            )
        np.testing.assert_array_equal(reader.timestamps_s([number]), other.timestamps_s([old]))
        if dtype == "stored":
            np.testing.assert_array_equal(reader[number], other[old], strict=True)
    assert verify_cache(out, deep=True).problems == []
    return len(reader)


def all_files(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def clip_names(numbers: Any) -> frozenset[str]:
    return frozenset(f"clip{number}.mp4" for number in numbers)


def label(folder: Path) -> None:
    """Clips 0..5: labels even and odd, splits train (0..3) and val."""
    plan = []
    for entry in Plan.open(folder):
        number = int(entry.key[4])
        split = "train" if number < 4 else "val"
        plan.append(replace(entry, label=("even", "odd")[number % 2], split=split))
    (folder / "plan.json").unlink()
    write_plan(folder, plan)
    remove_strangers(folder)
    finish_cache(folder)


@pytest.fixture(params=["patches", "deltas"])
def source(request: pytest.FixtureRequest, little: Any, tmp_path: Path) -> Path:
    folder: Path = getattr(little, f"make_{request.param}")(tmp_path / "source").folder
    label(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("size", [{}, {"clips_per_shard": 1}, {"windows_per_shard": 4}])
def test_other_shards_hold_the_same_numbers_and_fingerprint(
    little: Any, tmp_path: Path, dtype: str, size: dict[str, int]
) -> None:
    source = little.make_patches(tmp_path / "source", dtype=dtype)
    info = export_cache([source.folder], tmp_path / "out", **size)
    assert assert_same_windows(tmp_path / "out", source.folder) == 11
    assert info.fingerprint == source.info.fingerprint
    num_shards = info.counts["shards"]
    assert num_shards == {"clips_per_shard": 6}.get(next(iter(size), ""), num_shards)
    np.testing.assert_array_equal(
        PatchShards(tmp_path / "out").black, PatchShards(source.folder).black
    )


def test_a_subset_by_split_label_key_and_limit(source: Path, tmp_path: Path) -> None:
    taken = {
        "split": (ClipSelection(splits=("val",)), {4, 5}),
        "label": (ClipSelection(labels=("odd",)), {1, 3, 5}),
        "both": (ClipSelection(labels=("odd",), splits=("train",)), {1, 3}),
        "clips": (ClipSelection(clips=clip_names([0, 2])), {0, 2}),
    }
    for name, (selection, numbers) in taken.items():
        export_cache([source], tmp_path / name, selection=selection)
        assert_same_windows(tmp_path / name, source)
        out = opened(tmp_path / name)
        assert set(out.keys) == clip_names(numbers)
        wanted = opened(source).select(clips=clip_names(numbers))
        assert len(out) == len(wanted)
    info = export_cache([source], tmp_path / "limit", selection=ClipSelection(limit=2))
    first = [entry.key for entry in Plan.open(source)][:2]  # it is in the order of the hashes
    assert opened(tmp_path / "limit").keys == first
    assert info.exported_from["limit"] == 2
    assert describe_cache(tmp_path / "limit")["exported_from"] == info.exported_from
    assert info.exported_from["caches"][0]["fingerprint"] == opened(source).fingerprint


def test_labels_splits_and_sources_go_with_the_clips(source: Path, tmp_path: Path) -> None:
    export_cache([source], tmp_path / "out", selection=ClipSelection(labels=("odd",)))
    old = {entry.key: entry for entry in Plan.open(source)}
    for entry in Plan.open(tmp_path / "out"):
        assert replace(entry, shard=0) == replace(old[entry.key], shard=0)


def test_halves_merge_into_what_the_whole_exports_to(source: Path, tmp_path: Path) -> None:
    """Also in which shard and place each window is, whatever the order of the halves."""
    for name, numbers in (("a", [0, 3, 4]), ("b", [1, 2, 5])):
        export_cache([source], tmp_path / name, selection=ClipSelection(clips=clip_names(numbers)))
    export_cache([source], tmp_path / "whole", clips_per_shard=2)
    export_cache([tmp_path / "b", tmp_path / "a"], tmp_path / "merged", clips_per_shard=2)
    assert assert_same_windows(tmp_path / "merged", source) == 11
    whole, merged = opened(tmp_path / "whole"), opened(tmp_path / "merged")
    assert merged.fingerprint == whole.fingerprint == opened(source).fingerprint
    assert merged.keys == whole.keys
    np.testing.assert_array_equal(merged[:], whole[:])
    caches = merged.info.exported_from["caches"]
    assert [cache["clips"] for cache in caches] == [3, 3]
    assert all(cache["exported_from"]["caches"] for cache in caches)


@pytest.mark.parametrize("old", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("new", ["float16", "bfloat16", "int8"])
def test_another_dtype_holds_the_values_within_its_rounding(
    little: Any, tmp_path: Path, old: str, new: str
) -> None:
    if old == new:
        return
    source = little.make_patches(tmp_path / "source", dtype=old)
    info = export_cache([source.folder], tmp_path / "out", dtype=new)
    assert_same_windows(tmp_path / "out", source.folder, dtype=new)
    assert info.fingerprint != source.info.fingerprint
    storage = info.identity["storage"]
    assert (storage["dtype"], storage["converted_from"]) == (new, source.info.identity["storage"])
    before, after = windows_of(source.folder), windows_of(tmp_path / "out")
    order = sorted(before)
    values = PatchShards(source.folder).tokens([before[window] for window in order])
    reader = PatchShards(tmp_path / "out")
    got = reader.tokens([after[window] for window in order])
    if new == "float16":
        np.testing.assert_array_equal(got, values.astype(np.float16).astype(np.float32))
    elif new == "bfloat16":
        np.testing.assert_array_equal(got, from_stored(to_bfloat16_bits(values), "bfloat16"))
    else:
        numbers = [after[window] for window in order]
        step = dequantise(
            np.ones(got.shape, np.int8), reader.token_scale(numbers), reader.channel_scale
        )
        assert (np.abs(got - values) <= step * 0.5001).all()


def test_compression_changes_neither_numbers_nor_fingerprint(patches: Any, tmp_path: Path) -> None:
    info = export_cache([patches.folder], tmp_path / "out", compression="zstd")
    assert_same_windows(tmp_path / "out", patches.folder)
    assert info.fingerprint == patches.info.fingerprint
    with zipfile.ZipFile(tmp_path / "out/shards/000000.zarr.zip") as archive:
        assert b'"zstd"' in archive.read("tokens/zarr.json")


def test_windows_per_shard_holds_unless_one_clip_has_more(patches: Any, tmp_path: Path) -> None:
    export_cache([patches.folder], tmp_path / "out", windows_per_shard=3)
    for path in (tmp_path / "out/shards").glob("*.json"):
        done = json.loads(path.read_text())
        assert done["rows"] <= 3 or done["clips"] == 1


def test_quarantined_clips_go_with_the_export(little: Any, tmp_path: Path) -> None:
    for kind, write in (("patches", write_patch_shard), ("deltas", write_delta_shard)):
        source = getattr(little, f"make_{kind}")(tmp_path / kind)
        lost = [entry.key for entry in source.plan if entry.shard == 1]
        told = [Quarantined(clip=key, stage="open", reason="cut", attempts=2) for key in lost]
        rows = {"patches": little.patch_rows, "deltas": little.delta_rows}[kind](0, [], seed=0)
        dtype = {"dtype": "float16"} if kind == "patches" else {}
        write(source.folder, 1, replace(rows, quarantined=told), seed=7, **dtype)
        write_quarantine(source.folder)
        finish_cache(source.folder)
        out = tmp_path / f"{kind}-out"
        info = export_cache([source.folder], out, clips_per_shard=2)
        assert assert_same_windows(out, source.folder) == 5
        assert info.counts["quarantined"] == 3
        assert (out / "quarantine.jsonl").read_text() == (
            source.folder / "quarantine.jsonl"
        ).read_text()


def test_an_export_that_stopped_goes_on_and_ends_with_the_same_bytes(
    source: Path, tmp_path: Path
) -> None:
    class StoppedHereError(Exception):
        pass

    def stop_after(shards: int) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if done == shards:
                raise StoppedHereError

        return progress

    export_cache([source], tmp_path / "whole", clips_per_shard=2)
    for shards in (1, 2, 3):
        with pytest.raises(StoppedHereError):
            export_cache([source], tmp_path / "out", clips_per_shard=2, progress=stop_after(shards))
        with pytest.raises(CacheMismatch, match="has not finished"):
            opened(tmp_path / "out")
    first = tmp_path / "out/shards/000000.json"
    before = first.stat().st_mtime_ns
    export_cache([source], tmp_path / "out", clips_per_shard=2)
    assert all_files(tmp_path / "out") == all_files(tmp_path / "whole")
    assert first.stat().st_mtime_ns == before


def test_parts_of_a_plan_that_was_never_committed_are_cleared(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_cache([source], out, clips_per_shard=2)
    (out / "plan.json").unlink()
    (out / "plan/000000-0123456789abcdef.jsonl").touch()
    export_cache([source], out, clips_per_shard=2)
    assert verify_cache(out).problems == []


def test_an_export_killed_while_it_writes_goes_on(patches: Any, tmp_path: Path) -> None:
    """SIGKILL in the middle of publishing a shard: a partial folder is left, and then cleared."""
    code = """
import os, signal, sys
import deltatok.shards.records as publishing
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
publishing.publish = kill
from deltatok.shards.tools.export import export_cache
export_cache([sys.argv[1]], sys.argv[2], dtype="int8")
"""
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", code, str(patches.folder), str(out)], check=False, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    assert list((out / "shards").glob("*.partial-*"))
    export_cache([patches.folder], out, dtype="int8")
    assert not list(out.rglob("*.partial-*"))
    assert_same_windows(out, patches.folder, dtype="int8")


def test_an_export_with_other_arguments_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_cache([source], out, selection=ClipSelection(splits=("train",)), clips_per_shard=2)
    with pytest.raises(CacheMismatch, match="exported_from"):
        export_cache([source], out, selection=ClipSelection(splits=("val",)), clips_per_shard=2)
    with pytest.raises(CacheMismatch, match=r"has clip .* where .* is asked for"):
        export_cache([source], out, selection=ClipSelection(splits=("train",)), clips_per_shard=1)


def test_caches_of_different_identity_are_refused_with_the_field(
    little: Any, patches: Any, tmp_path: Path
) -> None:
    other = little.make_patches(tmp_path / "other", dtype="bfloat16").folder
    with pytest.raises(CacheMismatch, match=r"identity\.storage\.dtype is 'bfloat16', but 'float"):
        export_cache([patches.folder, other], tmp_path / "out")
    deltas = little.make_deltas(tmp_path / "deltas").folder
    with pytest.raises(CacheMismatch, match="format is 'deltatok-deltas'"):
        export_cache([patches.folder, deltas], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_caches_with_other_black_tokens_are_refused(patches: Any, tmp_path: Path) -> None:
    shutil.copytree(patches.folder, tmp_path / "other")
    black = np.load(tmp_path / "other/black.npy")
    np.save(tmp_path / "other/black.npy", black + 1)
    finish_cache(tmp_path / "other")
    with pytest.raises(CacheMismatch, match=r"black\.npy is not that of"):
        export_cache([patches.folder, tmp_path / "other"], tmp_path / "out")


Make = Callable[[Path, Path], Any]

REFUSED: list[tuple[Make, str]] = [
    (lambda s, o: export_cache([s, s], o), "clip 'clip.*' is in .* and in"),
    (lambda s, o: export_cache([s], s), "is one of the caches to export"),
    (lambda s, o: export_cache([s], o, dtype="float32"), "dtype 'float32'"),
    (lambda s, o: export_cache([s], o, clips_per_shard=0), "clips_per_shard is 0"),
    (lambda s, o: export_cache([s], o, clips_per_shard=1, windows_per_shard=1), "give one of"),
    (lambda s, o: export_cache([s], o, compression="gzip"), "compression 'gzip'"),
    (
        lambda s, o: export_cache([s], o, selection=ClipSelection(clips=frozenset({"clip9.mp4"}))),
        r"has no clip 'clip9\.mp4'",
    ),
    (
        lambda s, o: export_cache([s], o, selection=ClipSelection(splits=("test",))),
        "has no split 'test'.*known splits: 'train', 'val'",
    ),
    (
        lambda s, o: export_cache(
            [s], o, selection=ClipSelection(splits=("val",), clips=clip_names([0]))
        ),
        "no clip has all that is asked for",
    ),
    (lambda s, o: ClipSelection(limit=0), "limit is 0"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, make: Make, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        make(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_delta_caches_have_one_dtype_and_no_compression(deltas: Any, tmp_path: Path) -> None:
    for wanted in ({"dtype": "int8"}, {"compression": "zstd"}):
        with pytest.raises(UsageError, match="delta"):
            export_cache([deltas.folder], tmp_path / "out", **wanted)


def test_a_full_disk_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(DeltatokError, match=r"the export takes .* GB, there are 1e-07 GB left"):
        export_cache([source], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_the_new_dtype_cannot_hold_name_the_clip(little: Any, tmp_path: Path) -> None:
    cache = little.make_patches(tmp_path / "cache", dtype="bfloat16")
    rows = replace(cache.rows[0], tokens=cache.rows[0].tokens * np.float32(1e6))
    write_patch_shard(cache.folder, 0, rows, dtype="bfloat16", seed=7)
    finish_cache(cache.folder)
    with pytest.raises(DeltatokError, match=r"clip 'clip.*beyond the range of float16"):
        export_cache([cache.folder], tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("kind", ["patches", "deltas"])
def test_damage_is_not_exported(little: Any, tmp_path: Path, kind: str) -> None:
    cache = getattr(little, f"make_{kind}")(tmp_path / kind).folder
    data = "000001.tar" if kind == "deltas" else "000001.zarr.zip"
    little.flip_byte(cache / "shards" / data, 700)
    with pytest.raises(DamagedShard, match="000001"):
        export_cache([cache], tmp_path / "out")


def test_windows_of_an_exported_shard_are_permuted(patches: Any, tmp_path: Path) -> None:
    """In the order of the format: clips in plan order, then the hashes."""
    export_cache([patches.folder], tmp_path / "out", clips_per_shard=6)
    old, out = PatchShards(patches.folder), PatchShards(tmp_path / "out")
    plan = [entry.key for entry in Plan.open(tmp_path / "out")]
    in_plan_order = [
        window
        for key in plan
        for window in sorted(
            old.select(clips=key).tolist(), key=lambda window: old.window(window)["frames"]
        )
    ]
    order = window_order(11, seed=7, shard=0)
    wanted = old.tokens(np.array(in_plan_order)[order])
    np.testing.assert_array_equal(out.tokens(np.arange(11)), wanted)
