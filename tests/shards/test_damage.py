"""Damaged caches: what is missing, cut off, changed or made up is refused with its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import CacheMismatch, DamagedShard, DeltaShards, PatchShards
from deltatok.shards.cache import reopen_cache
from deltatok.shards.tools.verify import verify_cache

COLUMNS = ["timestamps_s/c/0/0", "frame_index/c/0/0", "crop/c/0/0", "flipped/c/0", "clip/c/0"]
TOKENS = "tokens/c/0/0/0/0"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [Path.unlink, truncate, empty, extend, replace_by_folder])
def test_reader_refuses_a_missing_or_resized_patch_shard(
    patches: Any, damage: Callable[[Path], None]
) -> None:
    damage(patches.folder / "shards/000001.zarr.zip")
    with pytest.raises(DamagedShard, match=r"shard 000001: .*deltatok-shards verify"):
        PatchShards(patches.folder)
    problems = verify_cache(patches.folder, deep=True).problems
    assert len(problems) == 1
    assert "000001.zarr" in problems[0].text


@pytest.mark.parametrize("damage", [Path.unlink, truncate, empty, extend, replace_by_folder])
@pytest.mark.parametrize("verify", ["size", "sha256"])
def test_reader_refuses_a_missing_or_resized_tar(
    deltas: Any, damage: Callable[[Path], None], verify: Any
) -> None:
    damage(deltas.folder / "shards/000001.tar")
    with pytest.raises(DamagedShard, match=r"shard 000001: .*deltatok-shards verify"):
        DeltaShards(deltas.folder, verify=verify)
    assert len(verify_cache(deltas.folder, deep=True).problems) == 1


def test_a_file_that_vanishes_after_opening_is_a_damaged_shard(patches: Any) -> None:
    reader = PatchShards(patches.folder)
    (patches.folder / "shards/000001.zarr.zip").unlink()
    reader.tokens([0])
    with pytest.raises(DamagedShard, match=r"000001.zarr"):
        reader.tokens([10])


def test_a_file_that_shrinks_after_opening_is_a_damaged_shard(patches: Any) -> None:
    reader = PatchShards(patches.folder)
    reader.tokens([0])
    path = patches.folder / "shards/000000.zarr.zip"
    path.write_bytes(path.read_bytes()[:4100])
    with pytest.raises(DamagedShard, match=r"000000.zarr.*ends at byte"):
        reader.tokens([4])


def test_a_tar_that_shrinks_after_opening_is_a_damaged_shard(deltas: Any) -> None:
    reader = DeltaShards(deltas.folder)
    truncate(deltas.folder / "shards/000001.tar")
    with pytest.raises(DamagedShard, match=r"000001.tar.*10239 bytes, the done-record says"):
        reader.tokens([10])


def test_a_flipped_byte_of_any_frame_raises_on_read_and_is_found_by_verify(
    little: Any, patches: Any
) -> None:
    path = patches.folder / "shards/000000.zarr.zip"
    good = path.read_bytes()
    chunk_bytes = 4 * 6 * 2 + 4
    for chunk in range(5 * 3):
        path.write_bytes(good)
        little.flip_byte(path, chunk * chunk_bytes + chunk, member=TOKENS)
        reader = PatchShards(patches.folder)
        window = chunk // 3
        for read in (reader.tokens, reader.stored_tokens):
            with pytest.raises(DamagedShard, match=f"000000.zarr.*window {window}, frame"):
                read([window])
        others = [number for number in range(11) if number != window]
        wanted = patches.expected["tokens"][others].astype(np.float16)
        np.testing.assert_array_equal(reader.stored_tokens(others), wanted)
    with pytest.raises(DamagedShard, match="SHA-256"):
        PatchShards(patches.folder, verify="sha256").tokens([0])
    problems = verify_cache(patches.folder, deep=True).problems
    assert len(problems) == 1
    assert "shard 000000" in problems[0].text


def test_any_flipped_byte_of_the_index_raises(little: Any, patches: Any) -> None:
    path = patches.folder / "shards/000000.zarr.zip"
    good = path.read_bytes()
    for position in range(-15 * 16 - 4, 0):
        path.write_bytes(good)
        little.flip_byte(path, position, member=TOKENS)
        with pytest.raises(DamagedShard, match="index: wrong checksum"):
            PatchShards(patches.folder).tokens([0])


@pytest.mark.parametrize("name", COLUMNS)
def test_a_flipped_byte_of_a_column_raises_on_read(little: Any, patches: Any, name: str) -> None:
    little.flip_byte(patches.folder / "shards/000001.zarr.zip", 0, member=name)
    with pytest.raises(DamagedShard, match=r"000001.zarr.*wrong checksum"):
        PatchShards(patches.folder).timestamps_s([0])


def test_a_flipped_byte_of_a_tar_is_found_when_it_is_used_first_and_by_verify(
    little: Any, deltas: Any
) -> None:
    path = deltas.folder / "shards/000001.tar"
    little.flip_byte(path, 512 + 128 + 3)
    DeltaShards(deltas.folder, verify="size").tokens([10])
    reader = DeltaShards(deltas.folder)
    reader.tokens([0])
    for read in (reader.tokens, reader.timestamps_s, lambda _: reader.read_block(5)):
        with pytest.raises(DamagedShard, match=r"shard 000001: .*SHA-256"):
            read([10])
    problems = verify_cache(deltas.folder, deep=True).problems
    assert len(problems) == 1
    assert "shard 000001" in problems[0].text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [5, 3, 4, 7]),
        ("shape", "all"),
        ("data_type", "int16"),
        ("zarr_format", 2),
        ("node_type", "group"),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [1, 3, 4, 6]}}),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "big"}}]),
        ("codecs", None),
        ("storage_transformers", [{"name": "x"}]),
    ],
)
def test_reader_refuses_array_metadata_of_another_layout(
    patches: Any, field: str, value: Any
) -> None:
    name = "shards/000000.zarr.zip/tokens/zarr.json"
    metadata = json.loads(patches.read(name))
    metadata[field] = value
    patches.write(name, json.dumps(metadata).encode())
    patches.reseal()
    with pytest.raises(DamagedShard, match=r"000000.zarr.zip: tokens/zarr.json: "):
        PatchShards(patches.folder).tokens([0])
    assert len(verify_cache(patches.folder, deep=True).problems) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "NaN", '{"attributes": 3}', "[" * 10**5])
def test_reader_refuses_broken_group_metadata(patches: Any, text: str) -> None:
    patches.write("shards/000000.zarr.zip/zarr.json", text.encode())
    patches.reseal()
    with pytest.raises(DamagedShard, match=r"000000.zarr"):
        PatchShards(patches.folder).timestamps_s([0])


def test_verify_finds_values_that_are_not_finite_behind_good_checksums(
    patches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltatok.shards.patches import writer as token_encoder
    from deltatok.shards.patches.writer import write_patch_shard

    monkeypatch.setattr(token_encoder, "is_storable", lambda *_, **__: True)
    rows = patches.rows[0]
    rows.tokens[2, 1, 0, 0] = np.nan
    write_patch_shard(patches.folder, 0, rows, dtype="float16", seed=7)
    problems = verify_cache(patches.folder, deep=True).problems
    assert len(problems) == 1
    assert "not finite" in problems[0].text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 6}, "rows|windows|bytes|shape"),
        ({"rows": 4}, "rows|windows|bytes|shape"),
        ({"rows": -1}, "rows is -1, wanted an integer from 0"),
        ({"rows": 2.0}, "rows is 2.0, wanted an integer"),
        ({"rows": True}, "rows is True, wanted an integer"),
        ({"rows": 10**400}, "an integer of 401 digits"),
        ({"shard": 1}, "record of another shard"),
        ({"format_version": 2}, "format_version 2, this release reads up to 1"),
        ({"format_version": 0}, "format_version is 0"),
        ({"clips": -1}, "clips is -1, wanted an integer from 0"),
        ({"keys_sha256": "0" * 63}, "keys_sha256 is .*, wanted 64 hex digits"),
        ({"keys_sha256": None}, "keys_sha256 is None, wanted text"),
        ({"file": None}, "rows is 5 and file None, wanted a file where there are windows"),
        ({"file": []}, "file is .*, wanted a JSON object"),
        ({"file": {"bytes": -1, "sha256": "0" * 64}}, "bytes is -1"),
        ({"file": {"bytes": 1, "sha256": "zz"}}, "64 hex digits"),
        ({"file": {"bytes": 1}}, "no field 'sha256'"),
        ({"abs_max": None}, "abs_max is None, wanted a number"),
        ({"abs_max": "1"}, "abs_max is '1', wanted a number"),
        ({"beyond_float16": -1}, "beyond_float16 is -1"),
        ({"decoder": 3}, "decoder is 3, wanted text"),
        ({"other_decoders": {"a": 1}}, "other_decoders.a is 1, wanted text"),
        ({"quarantined": [{}]}, "no field 'clip'"),
        ({"quarantined": 7}, "quarantined is 7"),
    ],
)
@pytest.mark.parametrize("kind", ["patches", "deltas"])
def test_a_made_up_done_record_is_refused_with_the_field(
    request: pytest.FixtureRequest, kind: str, change: dict[str, Any], words: str
) -> None:
    folder = request.getfixturevalue(kind).folder
    path = folder / "shards/000000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    reopen_cache(folder)
    reader = PatchShards if kind == "patches" else DeltaShards
    with pytest.raises((DamagedShard, CacheMismatch), match=words):
        reader(folder, allow_incomplete=True).tokens([0, 3])
    assert verify_cache(folder, deep=True).problems


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "{", "\x00", '{"shard": Infinity}'])
def test_a_broken_done_record_is_refused(patches: Any, text: str) -> None:
    (patches.folder / "shards/000000.json").write_text(text)
    reopen_cache(patches.folder)
    with pytest.raises(DamagedShard, match=r"000000.json"):
        PatchShards(patches.folder, allow_incomplete=True)
    assert any(
        "000000.json" in problem.text
        for problem in verify_cache(patches.folder, deep=True).problems
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda windows: windows[:-1], "wanted a list of 2 windows"),
        (lambda windows: {"windows": windows}, "wanted a list of 2 windows"),
        (lambda windows: [windows[0], 3], "wanted a JSON object"),
        (lambda windows: [windows[0], {**windows[1], "clip": 3}], "clip is 3, wanted text"),
        (lambda windows: [windows[0], {**windows[1], "clip": "other"}], "other"),
        (lambda windows: [windows[0], {**windows[1], "frames": [1, 2]}], "wanted 3 indices"),
        (lambda windows: [windows[0], {**windows[1], "frames": [1, 2, -3]}], r"frames\[2\] is"),
        (lambda windows: [windows[0], {**windows[1], "crop": [1, 2, 3, "4"]}], "wanted a number"),
        (lambda windows: [windows[0], {**windows[1], "flipped": 1}], "flipped is 1"),
    ],
)
def test_made_up_window_descriptions_are_refused(
    deltas: Any, change: Callable[[Any], Any], words: str
) -> None:
    from webdataset import TarWriter

    from deltatok.shards.deltas.reader import read_members

    path = deltas.folder / "shards/000000.tar"
    data = path.read_bytes()
    members = {
        found.name: data[found.offset : found.offset + found.size] for found in read_members(path)
    }
    windows = json.loads(members["000000.windows.json"])
    members["000000.windows.json"] = json.dumps(change(windows)).encode()
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for name, content in members.items():
            key, _, extension = name.partition(".")
            tar.write({"__key__": key, extension: content})
    deltas.reseal()
    with pytest.raises(DamagedShard, match=words):
        _ = DeltaShards(deltas.folder).clip_index
    assert len(verify_cache(deltas.folder, deep=True).problems) == 1


def test_a_tar_with_a_block_of_other_sizes_is_refused(little: Any, deltas: Any) -> None:
    shutil.copy(deltas.folder / "shards/000001.tar", deltas.folder / "shards/000000.tar")
    deltas.reseal()
    with pytest.raises(DamagedShard, match="6 windows, the done-record says 5"):
        DeltaShards(deltas.folder).tokens([0])
