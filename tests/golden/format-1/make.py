"""Makes the golden caches of format 1: `python tests/golden/format-1/make.py FOLDER`.

    FOLDER/float16, bfloat16, int8, zstd     patch tokens of four clips; a fifth is in quarantine,
                                             alone in the last shard, which has no windows
    FOLDER/deltas                            delta tokens of the same clips, blocks of two windows
    FOLDER/evaluation                        two targets with labels, of three windows
    FOLDER/expected.json                     what must be read from each

What is committed beside this file was made once and stays: every later version must read it. All
numbers come from hashes, none from a random generator or a model, so that they never change.
"""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltatok.shards import DELTAS, PATCHES, CacheInfo, CacheShape, DeltaShards, PatchShards
from deltatok.shards.cache import finish_cache, open_cache
from deltatok.shards.deltas.writer import write_delta_shard
from deltatok.shards.evaluation.labels import LabelRule, PlanTarget, target_to_json
from deltatok.shards.patches.int8 import scale_sha256, write_channel_scale
from deltatok.shards.patches.writer import write_black, write_patch_shard
from deltatok.shards.plan import Plan, PlanEntry, make_plan, write_plan
from deltatok.shards.records import Quarantined
from deltatok.shards.windows import ShardRows

NUM_FRAMES, GRID, HIDDEN_SIZE = 2, (1, 2), 4
NUM_TOKENS = GRID[0] * GRID[1]
SEED = 7
PATCH_KINDS = ("float16", "bfloat16", "int8", "zstd")
KINDS = (*PATCH_KINDS, "deltas", "evaluation")
CHANNEL_SCALE = np.array([4.0, 0.5, 1.0, 16.0], dtype=np.float32)


@dataclass(frozen=True)
class Clip:
    """A clip that is planned."""

    key: str
    size_bytes: int
    label: str | None = None
    split: str | None = None
    folder: str = "/videos"

    @property
    def origin(self) -> str:
        return f"{self.folder}/{self.key}"


CLIPS = (
    Clip("walk/1.mp4", 101, label="walk", split="train"),
    Clip("walk/2.mp4", 102, label="walk", split="val"),
    Clip("übung/3.mp4", 103, label="run", folder="/more videos"),
    Clip("run/4.mp4", 104, label="run", split="train"),
    Clip("run/broken.mp4", 0),
)


def numbers(name: str, *shape: int) -> NDArray[np.float32]:
    """Multiples of 1/64 between -16 and 16, which float16 holds exactly."""
    count = int(np.prod(shape))
    raw = np.frombuffer(hashlib.shake_128(name.encode()).digest(2 * count), dtype="<u2")
    return ((raw % 2049).astype(np.float32) / 64 - 16).reshape(shape)


def columns(num_windows: int, keys: list[str], name: str) -> dict[str, Any]:
    """Everything of a shard's rows but tokens."""
    first = np.arange(num_windows, dtype=np.int32) * 3
    frames = first[:, None] + np.arange(NUM_FRAMES, dtype=np.int32) * 2
    return {
        "timestamps_s": (frames / 32).astype(np.float32),
        "frame_index": frames.astype(np.int32),
        "crop": np.abs(numbers(f"{name} crop", num_windows, 4)) + 1,
        "flipped": np.arange(num_windows) % 3 == 1,
        "clip": (np.arange(num_windows) * len(keys) // max(num_windows, 1)).astype(np.int32),
        "keys": keys,
        "decoders": {key: "pyav" if key == "run/4.mp4" else "decord" for key in keys},
    }


def shard_rows(kind: str, shard: int, keys: list[str]) -> ShardRows:
    """Two windows of every clip, none of a broken one."""
    name = f"{'deltas' if kind == 'deltas' else 'patches'} {shard}"
    known = [key for key in keys if "broken" not in key]
    count = 2 * len(known)
    patches = (NUM_TOKENS,) if kind != "deltas" else ()
    tokens = numbers(name, count, NUM_FRAMES, *patches, HIDDEN_SIZE)
    lost = [
        Quarantined(clip=key, stage="open", reason="no such file", attempts=2)
        for key in keys
        if key not in known
    ]
    if kind != "deltas":
        return ShardRows(tokens=tokens, **columns(count, known, name), quarantined=lost)
    tokens = tokens.astype(np.float16)
    rows = ShardRows(tokens=tokens, **columns(count, known, name), quarantined=lost)
    return rows.from_first_frame()


def patch_info(dtype: str, *, evaluation: bool = False) -> CacheInfo:
    """cache.json of a patch cache."""
    sampling: dict[str, Any] = {
        "policy": "windows",
        "num_frames": NUM_FRAMES,
        "num_windows": 2,
        "min_frames": 2,
        "time_stride_range": [0.04, 0.5],
        "crop_scale": [0.6, 1.0],
        "crop_ratio": [0.75, 1.5],
        "flip_probability": 0.5,
        "seed": SEED,
    }
    if evaluation:
        sampling = {
            "policy": "evaluation",
            "dataset": "golden",
            "num_frames": NUM_FRAMES,
            "num_context": 1,
            "stride_s": 0.0625,
            "fps": 32.0,
            "crops": "squares at both ends of the resized frame",
            "max_aspect_ratio": 2.0,
            "seed": SEED,
        }
    storage = {"dtype": dtype}
    if dtype == "int8":
        storage["scale_sha256"] = scale_sha256(CHANNEL_SCALE)
    return CacheInfo(
        format=PATCHES,
        identity={
            "backbone": {"config": {"hidden_size": HIDDEN_SIZE}, "weights_sha256": "ab" * 32},
            "preprocessing": {
                "frame_size": 32,
                "patch_size": 16,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.25, 0.25, 0.25],
                "resize": "OpenCV INTER_LINEAR on uint8",
            },
            "sampling": sampling,
            "storage": storage,
            "autocast_dtype": "float32",
        },
        shape=CacheShape(
            num_frames=NUM_FRAMES, num_tokens=NUM_TOKENS, grid=GRID, hidden_size=HIDDEN_SIZE
        ),
        backbone={"name": "golden"},
        licence="none: these numbers are hashes",
    )


def delta_info() -> CacheInfo:
    """cache.json of the delta cache of the float16 one."""
    patches = patch_info("float16")
    return CacheInfo(
        format=DELTAS,
        identity={
            "patches": patches.identity,
            "tokenizer": {"config": {"num_hidden_layers": 1}, "weights_sha256": "cd" * 32},
            "storage": {"dtype": "float16"},
            "autocast_dtype": "float32",
        },
        shape=CacheShape(
            num_frames=NUM_FRAMES, num_tokens=None, grid=None, hidden_size=HIDDEN_SIZE
        ),
        parent_fingerprint=patches.fingerprint,
        backbone=patches.backbone,
        licence=patches.licence,
    )


def make_cache(folder: Path, kind: str) -> None:
    """The cache of one kind in the new folder `folder`."""
    if kind == "evaluation":
        _make_evaluation(folder)
        return
    dtype = kind if kind in ("bfloat16", "int8") else "float16"
    open_cache(folder, delta_info() if kind == "deltas" else patch_info(dtype))
    clips_per_shard = 2 if kind == "float16" else 4
    plan = write_plan(folder, make_plan(CLIPS, clips_per_shard=clips_per_shard, seed=SEED))
    if kind != "deltas":
        write_black(folder, numbers("black", NUM_TOKENS, HIDDEN_SIZE))
    if dtype == "int8":
        write_channel_scale(folder, CHANNEL_SCALE)
    for shard in range(plan.num_shards):
        rows = shard_rows(kind, shard, [entry.key for entry in plan.shard(shard)])
        if kind == "deltas":
            write_delta_shard(folder, shard, rows, block_windows=2, seed=SEED)
        else:
            compression = "zstd" if kind == "zstd" else "none"
            write_patch_shard(folder, shard, rows, dtype=dtype, seed=SEED, compression=compression)
    finish_cache(folder)


def _make_evaluation(folder: Path) -> None:
    open_cache(folder, patch_info("float16", evaluation=True))
    entries = []
    for number, kind in ((19, "segmentation"), (39, "depth")):
        rule = LabelRule(name="depth", steps_per_m=256.0) if kind == "depth" else LabelRule()
        target = PlanTarget(
            label=f"town/{number:06d}.png",
            label_size=(20, 34),
            kind=kind,  # type: ignore[arg-type]
            sequence="town",
            rule=rule,
        )
        key = f"town/{number:06d}"
        source = f"/data/{key}.png"
        entries.append(
            PlanEntry(key=key, source=source, size_bytes=1, shard=0, split="val", target=target)
        )
    write_plan(folder, entries)
    write_black(folder, numbers("black", NUM_TOKENS, HIDDEN_SIZE))
    keys = [entry.key for entry in entries]
    rows = ShardRows(
        tokens=numbers("evaluation", 3, NUM_FRAMES, NUM_TOKENS, HIDDEN_SIZE),
        **columns(3, keys, "evaluation"),
    )
    write_patch_shard(folder, 0, rows, dtype="float16", seed=SEED)
    finish_cache(folder)


def describe(values: dict[str, Any]) -> dict[str, Any]:
    """Arrays by dtype, shape, hash and first numbers; what is no array as it is."""
    return {
        name: {
            "dtype": str(value.dtype),
            "shape": list(value.shape),
            "first": value.reshape(-1)[:8].tolist(),
            "sha256": hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest(),
        }
        if isinstance(value, np.ndarray)
        else value
        for name, value in values.items()
    }


def read_cache(folder: Path) -> dict[str, Any]:
    """What this package reads from a cache: all windows, in order."""
    is_deltas = json.loads((folder / "cache.json").read_text())["format"] == DELTAS
    reader: Any = (DeltaShards if is_deltas else PatchShards)(folder, verify="sha256")
    windows = range(reader.num_windows)
    table, plan = reader.table(), list(Plan.open(folder))
    keys = [reader.keys[clip] for clip in reader.clip_index]
    values = {
        "tokens": np.asarray(reader.tokens(windows)).astype(np.float32),
        "timestamps_s": table.timestamps_s,
        "frame_index": table.frame_index,
        "crop": table.crop,
        "flipped": table.flipped,
        "clip": keys,
        "label": dict(zip(reader.keys, reader.labels, strict=True)),
        "split": dict(zip(reader.keys, reader.splits, strict=True)),
        "source": {entry.key: entry.source for entry in plan},
        "target": {entry.key: target_to_json(entry.target) for entry in plan if entry.target},
    }
    return values if is_deltas else {**values, "black": reader.black}


def make_all(folder: Path) -> None:
    """All caches and expected.json."""
    for kind in KINDS:
        make_cache(folder / kind, kind)
    expected = {kind: describe(read_cache(folder / kind)) for kind in KINDS}
    lines = [
        f' "{kind}": {{\n'
        + ",\n".join(
            f'  "{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in found.items()
        )
        + "\n }"
        for kind, found in expected.items()
    ]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (folder / "expected.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="new or empty")
    make_all(parser.parse_args().folder)
