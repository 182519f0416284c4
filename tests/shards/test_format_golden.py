"""Caches of format 1 that were written once and stay (tests/golden/format-1): every later version
reads them, FORMAT.md alone suffices to read them, and the writers still give their bytes.

The reader below knows FORMAT.md and nothing of the package.
"""

import ast
import hashlib
import importlib.util
import json
import shutil
import struct
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from deltatok.shards.tools.verify import verify_cache

GOLDEN = Path(__file__).parents[1] / "golden" / "format-1"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
KINDS = sorted(EXPECTED)


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """tests/golden/format-1/make.py."""
    spec = importlib.util.spec_from_file_location("make_format_1", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A reader from FORMAT.md.


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical(value: Any) -> bytes:
    """The JSON text that is hashed; the numbers here are integers where they are whole."""

    def whole(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: whole(inner) for key, inner in item.items()}
        if isinstance(item, list):
            return [whole(inner) for inner in item]
        return int(item) if isinstance(item, float) and item.is_integer() else item

    return json.dumps(whole(value), sort_keys=True, separators=(",", ":")).encode()


def crc32c(data: bytes) -> int:
    """Castagnoli, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def checked(data: bytes) -> bytes:
    """What is before the crc32c at the end."""
    assert struct.unpack("<I", data[-4:])[0] == crc32c(data[:-4])
    return data[:-4]


def npy(data: bytes) -> np.ndarray:
    assert data[:8] == b"\x93NUMPY\x01\x00"
    (length,) = struct.unpack_from("<H", data, 8)
    header = ast.literal_eval(data[10 : 10 + length].decode())
    assert header["fortran_order"] is False
    return np.frombuffer(data[10 + length :], header["descr"]).reshape(header["shape"])


def zip_members(data: bytes) -> dict[str, bytes]:
    """The members of a stored zip, in order; every byte of the file accounted for."""
    assert data[-22:-18] == b"PK\x05\x06"
    *_, count, size, start, comment = struct.unpack("<4H2IH", data[-18:])
    assert (comment, start + size) == (0, len(data) - 22)
    members: dict[str, bytes] = {}
    at, end_before = start, 0
    for _ in range(count):
        assert data[at : at + 4] == b"PK\x01\x02"
        head = struct.unpack_from("<6H3I5H2I", data, at + 4)
        _, needed, flags, method, time, date, crc, packed, bytes_, name, extra, *_, local = head
        assert (needed, flags, method, time, date) == (20, 0, 0, 0, 33)
        assert packed == bytes_
        path = data[at + 46 : at + 46 + name].decode("ascii")
        at += 46 + name + extra
        begin = struct.unpack_from("<4s5H3I2H", data, local)
        assert begin[:9] == (b"PK\x03\x04", needed, flags, method, time, date, crc, packed, bytes_)
        assert local == end_before
        assert data[local + 30 : local + 30 + name].decode("ascii") == path
        first = local + 30 + name + begin[10]
        assert first % (4096 if path == "tokens/c/0/0/0/0" else 64) == 0
        assert path not in members
        members[path] = data[first : first + bytes_]
        assert zlib.crc32(members[path]) == crc
        end_before = first + bytes_
    assert (at, end_before) == (start + size, start)
    return members


def tar_members(data: bytes) -> dict[str, bytes]:
    members, at = {}, 0
    while any(data[at : at + 512]):
        header = data[at : at + 512]
        assert header[257:265] == b"ustar\x0000"
        assert header[156:157] == b"0"
        blank = header[:148] + b" " * 8 + header[156:]
        assert int(header[148:156].rstrip(b" \0"), 8) == sum(blank)
        size = int(header[124:136].rstrip(b" \0"), 8)
        members[header[:100].rstrip(b"\0").decode()] = data[at + 512 : at + 512 + size]
        at += 512 + (size + 511) // 512 * 512
    assert len(data) - at >= 1024
    return members


def frames(chunks: bytes, metadata: dict[str, Any]) -> np.ndarray:
    """The array of one Zarr shard, a chunk a frame."""
    shape, kind = metadata["shape"], metadata["data_type"]
    (sharding,) = metadata["codecs"]
    assert sharding["name"] == "sharding_indexed"
    inner = [codec["name"] for codec in sharding["configuration"]["codecs"]]
    dtype = np.dtype(kind).newbyteorder("<")
    count = shape[0] * shape[1]
    index = np.frombuffer(checked(chunks[-16 * count - 4 :]), "<u8").reshape(count, 2)
    values = []
    for offset, size in index.tolist():
        data = checked(chunks[offset : offset + size])
        if "zstd" in inner:
            from numcodecs.zstd import decompress

            data = bytes(decompress(data))
        values.append(np.frombuffer(data, dtype))
    return np.concatenate(values).reshape(shape)


def patch_shard(data: bytes, info: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """The windows of a patch-token shard."""
    members = zip_members(data)
    group = json.loads(members["zarr.json"])["attributes"]
    assert group["keys"] == keys
    assert group["fingerprint"] == info["fingerprint"]

    def whole(name: str) -> np.ndarray:
        metadata = json.loads(members[f"{name}/zarr.json"])
        chunk = f"{name}/c/" + "/".join("0" for _ in metadata["shape"])
        dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
        return np.frombuffer(checked(members[chunk]), dtype).reshape(metadata["shape"])

    names = ("timestamps_s", "frame_index", "crop", "flipped")
    values: dict[str, Any] = {name: whole(name) for name in names}
    metadata = json.loads(members["tokens/zarr.json"])
    stored = frames(members["tokens/c/0/0/0/0"], metadata)
    logical = metadata["attributes"]["logical_dtype"]
    assert logical == group["logical_dtype"] == info["identity"]["storage"]["dtype"]
    if logical == "bfloat16":
        values["tokens"] = (stored.astype("<u4") << 16).view("<f4")
    elif logical == "int8":
        scale_metadata = json.loads(members["token_scale/zarr.json"])
        scale = frames(members["token_scale/c/0/0/0"], scale_metadata).astype("<f4")
        channel_scale = whole("channel_scale")
        assert sha256(channel_scale.tobytes()) == info["identity"]["storage"]["scale_sha256"]
        values["tokens"] = stored.astype("<f4") * scale[..., None] * channel_scale
    else:
        values["tokens"] = stored.astype("<f4")
    values["clip"] = [keys[clip] for clip in whole("clip").tolist()]
    return values


def delta_shard(data: bytes, keys: list[str]) -> dict[str, Any]:
    """The windows of a delta-token shard."""
    members = tar_members(data)
    kinds = ("timestamps.npy", "tokens.npy", "windows.json")
    blocks = sorted({name.split(".")[0] for name in members})
    assert [*members] == [f"{block}.{kind}" for block in blocks for kind in kinds]
    windows = [
        window for block in blocks for window in json.loads(members[f"{block}.windows.json"])
    ]
    assert {window["clip"] for window in windows} <= set(keys)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([npy(members[f"{block}.{name}.npy"]) for block in blocks])

    return {
        "tokens": joined("tokens").astype("<f4"),
        "timestamps_s": joined("timestamps"),
        "frame_index": np.array([window["frames"] for window in windows], "<i4"),
        "crop": np.array([window["crop"] for window in windows], "<f4"),
        "flipped": np.array([window["flipped"] for window in windows]),
        "clip": [window["clip"] for window in windows],
    }


def planned_clips(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Shard -> its clips, in plan order."""
    plan, shards = json.loads((folder / "plan.json").read_bytes()), {}
    assert plan["format_version"] == 1
    for part in plan["parts"]:
        data = (folder / part["file"]).read_bytes()
        assert (len(data), sha256(data)) == (part["bytes"], part["sha256"])
        assert part["file"] == f"plan/{part['first_shard']:06d}-{part['sha256'][:16]}.jsonl"
        for number, line in enumerate(data.splitlines(), start=part["first_shard"]):
            entry = json.loads(line)
            assert entry["shard"] == number
            shards[number] = entry["clips"]
    assert [*shards] == list(range(plan["shards"]))
    assert sum(map(len, shards.values())) == plan["clips"]
    return shards


def read_from_specification(folder: Path) -> dict[str, Any]:
    """Everything in a complete cache, checked as FORMAT.md says."""
    info = json.loads((folder / "cache.json").read_bytes())
    assert info["format_version"] == 1
    assert info["complete"] is True
    named = [info["format"], info["format_version"], info["identity"]]
    assert info["fingerprint"] == f"sha256:{sha256(canonical(named))}"
    for name, entry in info["files"].items():
        data = (folder / name).read_bytes()
        assert (len(data), sha256(data)) == (entry["bytes"], entry["sha256"])
    head, *lines = (folder / "index.jsonl").read_text().splitlines()
    wanted = ["clips", "rows", "bytes", "sha256", "keys_sha256"]
    assert json.loads(head) == {"format_version": 1, "columns": wanted}
    planned = planned_clips(folder)
    assert len(lines) == len(planned) == info["counts"]["shards"]
    is_deltas = info["format"] == "deltatok-deltas"
    shards, used = [], []
    for shard, line in enumerate(lines):
        clips, rows, size, digest, keys_digest = json.loads(line)
        record = json.loads((folder / f"shards/{shard:06d}.json").read_bytes())
        lost = {entry["clip"] for entry in record["quarantined"]}
        entries = [entry for entry in planned[shard] if entry["key"] not in lost]
        keys = [entry["key"] for entry in entries]
        assert (record["format_version"], record["shard"]) == (1, shard)
        assert (record["clips"], record["rows"]) == (clips, rows)
        assert len(keys) == clips
        assert sha256(canonical(keys)) == record["keys_sha256"] == keys_digest
        used += entries
        if rows == 0:
            assert (record["file"], size, digest) == (None, 0, None)
            continue
        suffix = "tar" if is_deltas else "zarr.zip"
        data = (folder / f"shards/{shard:06d}.{suffix}").read_bytes()
        assert (len(data), sha256(data)) == (size, digest)
        assert record["file"] == {"bytes": size, "sha256": digest}
        shards.append(delta_shard(data, keys) if is_deltas else patch_shard(data, info, keys))
        assert len(shards[-1]["tokens"]) == rows
        assert float(np.abs(shards[-1]["tokens"]).max()) == record["abs_max"]
    values = {
        name: np.concatenate([shard[name] for shard in shards])
        for name in ("tokens", "timestamps_s", "frame_index", "crop", "flipped")
    }
    values["clip"] = [clip for shard in shards for clip in shard["clip"]]
    values["label"] = {entry["key"]: entry.get("label") for entry in used}
    values["split"] = {entry["key"]: entry.get("split") for entry in used}
    clips = [entry for shard in planned.values() for entry in shard]
    root = json.loads((folder / "plan.json").read_bytes())["root"]
    values["source"] = {entry["key"]: entry.get("source", root + entry["key"]) for entry in clips}
    values["target"] = {entry["key"]: entry["target"] for entry in clips if "target" in entry}
    if not is_deltas:
        values["black"] = npy((folder / "black.npy").read_bytes())
    assert info["counts"]["windows"] == len(values["tokens"])
    return values


# What must hold.


@pytest.mark.parametrize("kind", KINDS)
def test_this_version_reads_format_1(make: ModuleType, kind: str) -> None:
    assert make.describe(make.read_cache(GOLDEN / kind)) == EXPECTED[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_specification_alone_reads_format_1(make: ModuleType, kind: str) -> None:
    values = read_from_specification(GOLDEN / kind)
    assert make.describe(values) == EXPECTED[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_verify_finds_nothing_in_format_1(kind: str) -> None:
    report = verify_cache(GOLDEN / kind, deep=True)
    assert report.problems == []
    assert report.windows == EXPECTED[kind]["tokens"]["shape"][0]


def test_the_golden_caches_hold_what_they_are_for() -> None:
    """Hand-made: an index into a wrong window or a sign lost would change these."""
    columns = EXPECTED["float16"]
    assert KINDS == ["bfloat16", "deltas", "evaluation", "float16", "int8", "zstd"]
    assert columns["tokens"]["shape"] == [8, 2, 2, 4]
    assert set(columns["clip"]) == {"run/4.mp4", "walk/1.mp4", "walk/2.mp4", "übung/3.mp4"}
    assert columns["label"]["übung/3.mp4"] == "run"
    same = ("tokens", "timestamps_s", "frame_index", "crop", "flipped")
    assert all(EXPECTED["zstd"][name]["dtype"] == columns[name]["dtype"] for name in same)
    assert len(EXPECTED["evaluation"]["clip"]) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_writers_still_give_the_bytes_of_format_1(
    make: ModuleType, tmp_path: Path, kind: str
) -> None:
    make.make_cache(tmp_path / kind, kind)
    golden, made = (
        {path.relative_to(top).as_posix(): path.read_bytes() for path in top.rglob("*.*")}
        for top in (GOLDEN / kind, tmp_path / kind)
    )
    assert sorted(golden) == sorted(made)
    assert {name for name, data in golden.items() if made[name] != data} == set()


@pytest.mark.parametrize("kind", KINDS)
def test_format_1_is_read_only_as_it_is(make: ModuleType, tmp_path: Path, kind: str) -> None:
    """One byte of a shard's data elsewhere: the golden numbers do not come from anywhere else."""
    folder = tmp_path / kind
    shutil.copytree(GOLDEN / kind, folder)
    shard = next(path for path in (folder / "shards").iterdir() if path.suffix in (".zip", ".tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(AssertionError):
        read_from_specification(folder)
    assert verify_cache(folder).problems != []
