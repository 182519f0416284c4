"""FORMAT.md is enough: what it says, coded from it alone, gives what the package gives."""

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltatok.shards
from deltatok.shards import DeltaShards, PatchShards, read_cache_info
from deltatok.shards.plan import Plan, window_order
from deltatok.shards.sampling import SamplingPolicy, draw_windows
from deltatok.shards.tools.export import ClipSelection, export_cache

FORMAT = (Path(deltatok.shards.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")


def names_in(value: Any, *, below: frozenset[str]) -> set[str]:
    """All keys of nested JSON, but for what is under the keys `below`."""
    if isinstance(value, list):
        return {name for item in value for name in names_in(item, below=below)}
    if not isinstance(value, dict):
        return set()
    inner = {
        name
        for key, item in value.items()
        if key not in below
        for name in names_in(item, below=below)
    }
    return inner | set(value)


FREE = frozenset({"config", "software", "files", "counts", "other_decoders", "backbone"})
"""Objects whose keys are not ours, or named by the data."""


@pytest.mark.parametrize("kind", ["patches", "deltas"])
def test_every_file_field_and_array_is_specified(little: Any, tmp_path: Path, kind: str) -> None:
    source = getattr(little, f"make_{kind}")(tmp_path / "source").folder
    dtype = {"dtype": "int8"} if kind == "patches" else {}
    cache = tmp_path / "cache"
    export_cache([source], cache, selection=ClipSelection(limit=5), **dtype)
    names = {path.name for path in cache.iterdir() if path.suffix != ""}
    for path in cache.rglob("*.json"):
        names |= names_in(json.loads(path.read_text()), below=FREE)
    for path in (cache / "plan").iterdir():
        for line in path.read_text().splitlines():
            names |= names_in(json.loads(line), below=FREE)
    for path in cache.rglob("*.zarr.zip"):
        for member, data in little.read_members(path).items():
            if member.endswith("zarr.json"):
                metadata = json.loads(data)
                names |= set(metadata["attributes"])
                names |= {member.partition("/")[0]} if metadata["node_type"] == "array" else set()
    missing = {name for name in names if f"`{name}" not in FORMAT and f'"{name}"' not in FORMAT}
    assert len(names) > 30
    assert not missing


def as_specified(
    times: np.ndarray, key: str, i: int, height: int, width: int, sampling: dict[str, Any]
) -> tuple[list[int], tuple[int, ...], bool]:
    """Window i of a clip, from the six steps of "How windows are drawn"."""
    name = f"{sampling['seed']}\0{i}\0{key}".encode()
    digest = hashlib.blake2b(name, digest_size=16, person=b"deltatok window").digest()
    num_frames = sampling["num_frames"]
    raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(41 + num_frames)
    u = [int(number >> 11) * 2.0**-53 for number in raw.tolist()]
    low, high = sampling["time_stride_range"]
    gaps = np.array([low + (high - low) * number for number in u[42:]], dtype=np.float32)
    offsets = [np.float32(0)]
    running = 0.0
    for gap in gaps:
        running += float(gap)
        offsets.append(np.float32(running))
    last = np.float32(times[-1])
    room = max(last - offsets[-1], np.float32(0))
    frames = []
    for offset in offsets:
        target = np.float32(np.float32(u[0]) * room + offset)
        distances = [abs(np.float32(time) - target) for time in times]
        frames.append(distances.index(min(distances)))
    (s0, s1), (r0, r1) = sampling["crop_scale"], sampling["crop_ratio"]
    for attempt in range(10):
        a, r, y, x = u[2 + 4 * attempt : 6 + 4 * attempt]
        area = height * width * (s0 + (s1 - s0) * a)
        aspect = math.exp(math.log(r0) + (math.log(r1) - math.log(r0)) * r)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = math.floor(y * (height - h + 1)), math.floor(x * (width - w + 1))
            break
    else:
        w, h = width, height
        if width / height < r0:
            h = round(width / r0)
        elif width / height > r1:
            w = round(height * r1)
        top, left = (height - h) // 2, (width - w) // 2
    return frames, (top, left, h, w), u[1] < sampling["flip_probability"]


@pytest.mark.parametrize("size", [(48, 80), (720, 1280), (30, 600), (600, 30)])
def test_windows_are_drawn_as_specified(size: tuple[int, int]) -> None:
    sampling = {
        "num_frames": 8,
        "num_windows": 6,
        "time_stride_range": (0.04, 1 / 3),
        "crop_scale": (0.6, 1.0),
        "crop_ratio": (3 / 4, 4 / 3),
        "flip_probability": 0.5,
        "seed": 5,
    }
    policy = SamplingPolicy(policy="windows", fps=None, min_frames=2, **sampling)
    rng = np.random.default_rng(0)
    for clip, num_frames in enumerate((2, 30, 250)):
        times = np.concatenate([[0.0], np.cumsum(rng.uniform(0.02, 0.06, num_frames - 1))])
        key = f"å/{clip}.mp4"
        for i, window in enumerate(draw_windows(policy, key, times, *size)):
            got = (list(window.frame_index), window.crop, window.flipped)
            assert got == as_specified(times, key, i, *size, sampling)


def test_uniform_windows_are_drawn_as_specified() -> None:
    policy = SamplingPolicy(
        policy="uniform",
        num_frames=4,
        num_windows=1,
        time_stride_range=(0.1, 0.2),
        crop_scale=(0.5, 1),
        crop_ratio=(1, 1),
        flip_probability=1.0,
        fps=5.0,
        seed=0,
        min_frames=2,
    )
    times = np.concatenate([[0.0], np.cumsum(np.random.default_rng(1).uniform(0, 0.2, 60))])
    count = math.floor(times[-1] * 5 + 1e-6) + 1
    wanted = []
    for point in (number / 5 for number in range(count)):
        distances = np.abs(times - point)
        wanted.append(int(np.flatnonzero(distances == distances.min())[0]))
    got = draw_windows(policy, "clip", times, 48, 80)
    frames = [frame for window in got for frame in window.frame_index]
    assert frames == wanted[: count // 4 * 4]
    assert all(window.crop == (0, 0, 48, 80) and not window.flipped for window in got)


def test_orders_are_those_of_the_hashes(patches: Any) -> None:
    def digest(text: str) -> bytes:
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    keys = [entry.key for entry in Plan.open(patches.folder)]
    assert keys == sorted(keys, key=lambda key: digest(f"clip:7:{key}"))
    order = sorted(range(50), key=lambda i: digest(f"window:7:12:{i}"))
    assert window_order(50, seed=7, shard=12).tolist() == order


def test_the_fingerprint_is_the_specified_hash(patches: Any) -> None:
    info = read_cache_info(patches.folder)
    stored = json.loads((patches.folder / "cache.json").read_text())

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: whole(item) for key, item in value.items()}
        if isinstance(value, list):
            return [whole(item) for item in value]
        is_whole = isinstance(value, float) and value.is_integer()
        return int(value) if is_whole else value

    listed = whole([stored["format"], stored["format_version"], stored["identity"]])
    text = json.dumps(listed, sort_keys=True, separators=(",", ":"))
    assert info.fingerprint == f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def crc32c(data: bytes) -> int:
    """RFC 3720, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_a_zarr_shard_has_the_specified_bytes(patches: Any) -> None:
    data = patches.read("shards/000001.zarr.zip/tokens/c/0/0/0/0")
    num_windows, num_frames, num_tokens, channels = 6, 3, 4, 6
    entries = num_windows * num_frames
    index, stored = data[-16 * entries - 4 : -4], data[-4:]
    assert crc32c(index) == int.from_bytes(stored, "little")
    reader = PatchShards(patches.folder)
    for window in range(num_windows):
        for frame in range(num_frames):
            offset, size = struct.unpack_from("<QQ", index, 16 * (window * num_frames + frame))
            chunk = data[offset : offset + size]
            assert crc32c(chunk[:-4]) == int.from_bytes(chunk[-4:], "little")
            tokens = np.frombuffer(chunk[:-4], "<f2").reshape(num_tokens, channels)
            np.testing.assert_array_equal(tokens, reader.stored_tokens([5 + window])[0, frame])
    small = patches.read("shards/000001.zarr.zip/crop/c/0/0")
    assert crc32c(small[:-4]) == int.from_bytes(small[-4:], "little")
    np.testing.assert_array_equal(
        np.frombuffer(small[:-4], "<f4").reshape(num_windows, 4), reader.crop[5:]
    )


def test_a_tar_has_the_specified_bytes(deltas: Any) -> None:
    data = (deltas.folder / "shards/000000.tar").read_bytes()
    tokens, names, position = [], [], 0
    while data[position : position + 512] != bytes(512):
        header = data[position : position + 512]
        name = header[:100].rstrip(b"\0").decode()
        size = int(header[124:136].rstrip(b" \0"), 8)
        plain = header[:148] + b" " * 8 + header[156:]
        assert sum(plain) == int(header[148:156].rstrip(b" \0"), 8)
        assert (header[156:157], header[257:265]) == (b"0", b"ustar\x0000")
        member = data[position + 512 : position + 512 + size]
        if name.endswith(".tokens.npy"):
            assert member[:8] == b"\x93NUMPY\x01\x00"
            length = int.from_bytes(member[8:10], "little")
            header_text = member[10 : 10 + length].decode()
            assert "'descr': '<f2'" in header_text
            assert "'fortran_order': False" in header_text
            tokens.append(np.frombuffer(member[10 + length :], "<f2").reshape(-1, 3, 6))
        names.append(name)
        position += 512 + -(-size // 512) * 512
    assert set(data[position:]) == {0}
    assert len(data) - position >= 1024
    assert names[:3] == ["000000.timestamps.npy", "000000.tokens.npy", "000000.windows.json"]
    np.testing.assert_array_equal(np.concatenate(tokens), DeltaShards(deltas.folder)[:5])
