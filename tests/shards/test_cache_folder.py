"""cache.json: what makes a folder this cache and no other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import (
    CacheMismatch,
    DamagedShard,
    DeltaShards,
    PatchShards,
    UsageError,
    read_cache_info,
)
from deltatok.shards.cache import canonical_json, compare, finish_cache, open_cache
from deltatok.shards.plan import write_plan


def test_fingerprint_is_the_same_for_ever(little: Any) -> None:
    """Pinned: another hash would refuse every cache there is."""
    wanted = "sha256:66e238dbca9c6d804d177cfd030311f2ee8c80e36456a3c2f36c44a5497c2354"
    identity = {"b": [1, 2.5, None, True, "é"], "a": {"y": 1.0, "x": -0.0}}
    assert canonical_json(identity) == '{"a":{"x":0,"y":1},"b":[1,2.5,null,true,"\\u00e9"]}'
    assert little.patch_info(identity=identity).fingerprint == wanted


def test_cache_json_comes_back(little: Any, tmp_path: Path) -> None:
    info = little.patch_info(
        backbone={"name": "facebook/dinov3"}, software={"torch": "2"}, parent_fingerprint=None
    )
    assert open_cache(tmp_path / "a/b", info) == info
    assert read_cache_info(tmp_path / "a/b", format="deltatok-patches") == info


def test_opening_again_gives_what_is_stored(patches: Any, little: Any) -> None:
    again = open_cache(patches.folder, little.patch_info(software={"torch": "newer"}))
    assert again == patches.info
    assert again.complete
    counts = {"clips": 6, "quarantined": 0, "windows": 11, "frames": 33, "shards": 2}
    assert again.counts == counts


def with_identity(info: Any, path: str, value: Any) -> Any:
    identity = json.loads(json.dumps(info.identity))
    *parents, name = path.split(".")
    inner = identity
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    return replace(info, identity=identity)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("backbone.weights_sha256", "cd" * 32, "identity.backbone.weights_sha256 is 'abab"),
        ("preprocessing.frame_size", 64, "identity.preprocessing.frame_size is 32, but 64 in"),
        ("sampling.seed", 8, "identity.sampling.seed is 7, but 8 in the settings given"),
        ("sampling.time_stride_range", [0.04, 0.5], r"identity.sampling.time_stride_range is \["),
        ("sampling.fps", 5.0, "identity.sampling.fps is missing, but 5.0 in"),
        ("storage", None, "identity.storage is missing, but None"),
        ("sampling.seed", True, "identity.sampling.seed is 7, but True"),
    ],
)
def test_a_foreign_cache_is_refused_naming_the_field(
    patches: Any, path: str, value: Any, words: str
) -> None:
    with pytest.raises(CacheMismatch, match=words):
        open_cache(patches.folder, with_identity(patches.info, path, value))


def test_another_shape_or_parent_is_refused(patches: Any, deltas: Any) -> None:
    shape = replace(patches.info.shape, num_frames=4)
    with pytest.raises(CacheMismatch, match=r"shape\.num_frames is 3, but 4"):
        open_cache(patches.folder, replace(patches.info, shape=shape))
    with pytest.raises(CacheMismatch, match="parent_fingerprint is 'sha256:"):
        open_cache(deltas.folder, replace(deltas.info, parent_fingerprint="sha256:other"))


def test_a_cache_of_the_other_format_is_refused(patches: Any, deltas: Any) -> None:
    with pytest.raises(CacheMismatch, match="is a deltatok-patches cache, wanted a deltatok-delta"):
        DeltaShards(patches.folder)
    with pytest.raises(CacheMismatch, match="is a deltatok-deltas cache, wanted a deltatok-patch"):
        PatchShards(deltas.folder)
    with pytest.raises(CacheMismatch, match="format is 'deltatok-patches'"):
        open_cache(patches.folder, deltas.info)


def test_a_folder_that_is_no_cache_is_refused(little: Any, tmp_path: Path) -> None:
    with pytest.raises(CacheMismatch, match="not a deltatok cache"):
        PatchShards(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        PatchShards(tmp_path / "missing")
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(CacheMismatch, match=r"holds 'holiday\.jpg'"):
        open_cache(tmp_path, little.patch_info())


def test_a_folder_that_cannot_be_written_is_a_usage_error(little: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="cannot be written"):
            open_cache(folder, little.patch_info())


def test_a_partial_cache_json_does_not_make_a_folder_foreign(little: Any, tmp_path: Path) -> None:
    (tmp_path / "cache.json.partial-1-0123abcd").write_text("{")
    open_cache(tmp_path, little.patch_info())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "zip"}, "not a deltatok cache .format 'zip'"),
        ({"format": 3}, "format is 3, wanted text"),
        ({"format_version": 2}, "format_version 2, this release reads up to 1: update"),
        ({"format_version": 0}, "format_version is 0"),
        ({"fingerprint": "sha256:00"}, "the file was edited"),
        ({"identity": {"storage": {"dtype": "bfloat16"}}}, "the file was edited"),
        ({"identity": []}, "identity is"),
        ({"shape": {}}, "shape: no field 'num_frames'"),
        ({"complete": "yes"}, "complete is 'yes'"),
        ({"counts": {"windows": -3}}, "counts.windows is -3"),
        ({"counts": {"windows": 12}}, "cache.json says None with 12"),
        ({"files": {"black.npy": 3}}, "files.black.npy"),
        ({"software": {"torch": 2}}, "software.torch is 2"),
        ({"licence": None}, "licence is None"),
        ({"parent_fingerprint": 4}, "parent_fingerprint is 4"),
    ],
)
def test_a_made_up_cache_json_is_refused_with_the_field(
    patches: Any, change: dict[str, Any], words: str
) -> None:
    path = patches.folder / "cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((DamagedShard, CacheMismatch), match=words):
        PatchShards(patches.folder)


@pytest.mark.parametrize("name", ["num_frames", "num_tokens", "hidden_size"])
@pytest.mark.parametrize("value", [0, -1, 2**40, 1.5, None, "3", True])
def test_absurd_shapes_are_refused(patches: Any, name: str, value: Any) -> None:
    path = patches.folder / "cache.json"
    content = json.loads(path.read_text())
    content["shape"][name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedShard, match=f"shape: {name} is"):
        read_cache_info(patches.folder)


@pytest.mark.parametrize("grid", [[3, 2], [4], [2, 2, 1], [-2, -2], "22", None])
def test_a_grid_that_does_not_fit_is_refused(patches: Any, grid: Any) -> None:
    path = patches.folder / "cache.json"
    content = json.loads(path.read_text())
    content["shape"]["grid"] = grid
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedShard, match=r"grid(\[0\])? is"):
        read_cache_info(patches.folder)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"NaN", b"[[" * 50_000, b"1" * 5000])
def test_a_broken_cache_json_is_refused(patches: Any, data: bytes) -> None:
    (patches.folder / "cache.json").write_bytes(data)
    with pytest.raises(DamagedShard, match=r"cache\.json: "):
        read_cache_info(patches.folder)


def test_an_unknown_storage_dtype_is_refused(little: Any, tmp_path: Path) -> None:
    open_cache(tmp_path, little.patch_info("float8"))
    with pytest.raises(CacheMismatch, match=r"storage.dtype is 'float8', this release reads"):
        PatchShards(tmp_path, allow_incomplete=True)


def test_compare_names_the_first_field_that_differs() -> None:
    got = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    words = {"what_got": "deltas", "what_wanted": "the tokenizer"}
    compare(got, {"a": {"c": (1.0, 2.0), "b": 1.0}, "d": None}, **words)
    with pytest.raises(CacheMismatch, match=r"deltas: a.b is 1, but 2 in the tokenizer"):
        compare(got, {"a": {"b": 2, "c": []}, "d": None}, **words)
    with pytest.raises(CacheMismatch, match=r"a\.c is \[1, 2\], but \[\] in"):
        compare(got, {"a": {"b": 2, "c": []}}, **words, fields=["a.c", "x"])
    with pytest.raises(CacheMismatch, match="a is missing, but 3"):
        compare(got, {"a": 3}, **words, fields=["a.b"])
    with pytest.raises(CacheMismatch, match="d is None, but missing"):
        compare(got, {"a": got["a"]}, **words)
    compare(got, {"a": {"b": 1}}, **words, fields=["a.b"])


def test_an_unfinished_cache_is_refused_with_its_progress(little: Any, tmp_path: Path) -> None:
    cache = little.make_patches(tmp_path / "cache", finish=False)
    (cache.folder / "shards/000001.json").unlink()
    with pytest.raises(CacheMismatch, match="1 of 2 shards: run deltatok-extract again"):
        PatchShards(cache.folder)
    reader = PatchShards(cache.folder, allow_incomplete=True)
    np.testing.assert_array_equal(reader.load(), cache.expected["tokens"][:5].astype(np.float16))
    with pytest.raises(CacheMismatch, match="1 shards are done, wanted the 2 of the plan"):
        finish_cache(cache.folder)


def test_a_cache_without_any_window_opens(little: Any, tmp_path: Path) -> None:
    open_cache(tmp_path, little.patch_info())
    write_plan(tmp_path, [])
    finish_cache(tmp_path)
    reader = PatchShards(tmp_path)
    assert reader.load().shape == (0, 3, 4, 6)
    assert reader.timestamps_s([]).shape == (0, 3)
    assert reader.clip_index.shape == (0,)
