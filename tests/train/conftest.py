"""Little caches of smooth random features, written by the real writers, and little configs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import DELTAS, PATCHES, CacheInfo, CacheShape, PatchShards
from deltatok.shards.cache import finish_cache, open_cache
from deltatok.shards.deltas.writer import write_delta_shard
from deltatok.shards.patches.int8 import scale_sha256, write_channel_scale
from deltatok.shards.patches.writer import write_black, write_patch_shard
from deltatok.shards.plan import PlanEntry, write_plan
from deltatok.shards.records import Quarantined
from deltatok.shards.windows import ShardRows
from deltatok.train.config import (
    DINOWorldTrainConfig,
    HeadTrainConfig,
    TokenizerTrainConfig,
    WorldTrainConfig,
)
from deltatok.train.models.configs import DeltaTokConfig, DeltaWorldConfig, DINOWorldConfig

NUM_LATENTS = 3
HEIGHT, WIDTH = 32, 48
"""Pixels of a label."""


@dataclass(frozen=True, kw_only=True)
class LittleCache:
    """What a test's cache is made of. Windows are numbered by shard, clips dealt out in turn."""

    num_clips: int = 10
    windows_per_clip: int = 2
    num_shards: int = 2
    num_frames: int = 4
    grid: tuple[int, int] = (2, 2)
    hidden_size: int = 16
    dtype: str = "float16"
    policy: str = "windows"
    weights_sha256: str = "0" * 64
    frame_height: int = 32
    frame_width: int = 48

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "backbone": {"config": {"hidden_size": 1}, "weights_sha256": self.weights_sha256},
            "preprocessing": {
                "frame_size": 16 * self.grid[0],
                "patch_size": 16,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.25, 0.25, 0.25],
                "resize": "none",
            },
            "sampling": {"policy": self.policy, "num_frames": self.num_frames, "seed": 0, "fps": 5},
            "storage": {"dtype": self.dtype, **self._scales()},
            "autocast_dtype": "float32",
        }

    def channel_scale(self) -> np.ndarray:
        """float32 (D,), of int8."""
        return np.ones(self.hidden_size, dtype=np.float32)

    def _scales(self) -> dict[str, str]:
        return {"scale_sha256": scale_sha256(self.channel_scale())} if self.dtype == "int8" else {}


def clip_features(cache: LittleCache, clip: int) -> np.ndarray:
    """float32 (windows, T, N, D): a still background, and a few latents that wander."""
    shape = (cache.grid[0] * cache.grid[1], cache.hidden_size)
    directions = np.random.default_rng(1).normal(size=(NUM_LATENTS, 1, cache.hidden_size))
    rng = np.random.default_rng([2, clip])
    still = rng.normal(size=shape) * 0.3
    steps = rng.normal(size=(cache.windows_per_clip, cache.num_frames, NUM_LATENTS)) * 0.5
    moving = np.einsum("wtk,knd->wtnd", steps.cumsum(1), directions)  # the same in all patches
    return (still + moving).astype(np.float32)


def write_patches(folder: Path, cache: LittleCache) -> Path:
    """A finished patch-token cache of `cache`; clips are called clip00.mp4, clip01.mp4, ..."""
    num_tokens = cache.grid[0] * cache.grid[1]
    shape = CacheShape(
        num_frames=cache.num_frames,
        num_tokens=num_tokens,
        grid=cache.grid,
        hidden_size=cache.hidden_size,
    )
    open_cache(folder, CacheInfo(format=PATCHES, identity=cache.identity, shape=shape))
    keys = [f"clip{clip:02d}.mp4" for clip in range(cache.num_clips)]
    write_plan(
        folder,
        [
            PlanEntry(key=key, source=f"/videos/{key}", size_bytes=1, shard=shard)
            for shard in range(cache.num_shards)
            for key in keys[shard :: cache.num_shards]
        ],
    )
    black = np.random.default_rng(3).normal(size=(num_tokens, cache.hidden_size))
    write_black(folder, black.astype(np.float32))
    if cache.dtype == "int8":
        write_channel_scale(folder, cache.channel_scale())
    for shard in range(cache.num_shards):
        clips = range(shard, cache.num_clips, cache.num_shards)
        tokens = np.concatenate([clip_features(cache, clip) for clip in clips])
        count = len(tokens)
        first = np.tile(np.arange(cache.windows_per_clip) * cache.num_frames, len(clips))
        frames = (first[:, None] + np.arange(cache.num_frames)).astype(np.int32)
        rows = ShardRows(
            tokens=tokens,
            timestamps_s=(frames * 0.2).astype(np.float32),
            frame_index=frames,
            crop=np.tile(
                np.array([0, 0, cache.frame_height, cache.frame_width], dtype=np.float32),
                (count, 1),
            ),
            flipped=np.zeros(count, dtype=bool),
            clip=np.repeat(np.arange(len(clips)), cache.windows_per_clip).astype(np.int32),
            keys=[keys[clip] for clip in clips],
        )
        write_patch_shard(folder, shard, rows, dtype=cache.dtype, seed=0)
    finish_cache(folder)
    return folder


def write_deltas_cache(
    folder: Path, *, num_clips: int = 40, num_frames: int = 5, hidden_size: int = 8
) -> Path:
    """A finished delta-token cache of one window a clip, whose tokens turn by a fixed rotation."""
    rng = np.random.default_rng(5)
    turn = np.linalg.qr(rng.normal(size=(hidden_size, hidden_size)))[0]
    tokens = [rng.normal(size=(num_clips, hidden_size))]
    for _ in range(num_frames - 1):
        noise = rng.normal(size=(num_clips, hidden_size)) * 0.05
        tokens.append(tokens[-1] @ turn + noise)
    keys = [f"clip{clip:02d}.mp4" for clip in range(num_clips)]
    info = CacheInfo(
        format=DELTAS,
        identity={"patches": LittleCache().identity, "tokenizer": {"weights_sha256": "1" * 64}},
        shape=CacheShape(
            num_frames=num_frames, num_tokens=None, grid=None, hidden_size=hidden_size
        ),
    )
    open_cache(folder, info)
    planned = keys or ["clip00.mp4"]  # a clip that gave no window
    write_plan(folder, [PlanEntry(key=k, source=k, size_bytes=1, shard=0) for k in planned])
    times = np.tile(np.arange(num_frames) * 0.2, (num_clips, 1)).astype(np.float32)
    rows = ShardRows(
        tokens=np.stack(tokens, axis=1).astype(np.float16),
        timestamps_s=times,
        frame_index=np.zeros((num_clips, num_frames), dtype=np.int32),
        crop=np.zeros((num_clips, 4), dtype=np.float32),
        flipped=np.zeros(num_clips, dtype=bool),
        clip=np.arange(num_clips, dtype=np.int32),
        keys=keys,
        quarantined=[
            Quarantined(clip=key, stage="decode", reason="none", attempts=1)
            for key in planned[len(keys) :]
        ],
    )
    write_delta_shard(folder, 0, rows)
    finish_cache(folder)
    return folder


@pytest.fixture(scope="session")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 clips x 2 windows of 4 frames, 2 x 2 patches, 16 channels."""
    return write_patches(tmp_path_factory.mktemp("caches") / "patches", LittleCache())


@pytest.fixture(scope="session")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 windows of 5 delta tokens, 8 channels."""
    return write_deltas_cache(tmp_path_factory.mktemp("caches") / "deltas")


@pytest.fixture(scope="session")
def make_patches() -> Callable[..., Path]:
    """make_patches(folder, field=value, ...) -> folder: a cache of a test's own."""
    return lambda folder, **changed: write_patches(folder, LittleCache(**changed))


@pytest.fixture(scope="session")
def make_deltas() -> Callable[..., Path]:
    """make_deltas(folder, num_clips=, num_frames=, hidden_size=) -> folder: a test's own cache."""
    return write_deltas_cache


@pytest.fixture
def tokenizer_config(tmp_path: Path, patches: Path) -> Callable[..., TokenizerTrainConfig]:
    """tokenizer_config(field=value, ...): a run of a few tiny steps into tmp_path/run."""

    def make(model: dict[str, Any] | None = None, **changed: Any) -> TokenizerTrainConfig:
        tiny = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "layer_scale_init": 0.1,
        }
        fields = {
            "patches": str(patches),
            "out": str(tmp_path / "run"),
            "model": DeltaTokConfig(**{**tiny, **(model or {})}),
            "steps": 6,
            "batch_size": 9,
            "warmup_steps": 2,
            "log_every": 1,
            "eval_every": 3,
            "save_every": 2,
            "validation_fraction": 0.2,
            "clip_grad_norm": None,
            "device": "cpu",
        }
        return TokenizerTrainConfig(**{**fields, **changed})

    return make


@pytest.fixture
def world_config(tmp_path: Path, deltas: Path) -> Callable[..., WorldTrainConfig]:
    """world_config(field=value, ...): a run of a few tiny steps into tmp_path/run."""

    def make(model: dict[str, Any] | None = None, **changed: Any) -> WorldTrainConfig:
        tiny = {
            "hidden_size": 8,
            "predictor_hidden_size": 16,
            "predictor_num_hidden_layers": 2,
            "predictor_num_heads": 2,
            "rope_axis_sizes": (6,),
            "rope_unrotated_size": 2,
            "num_samples_train": 6,
            "num_samples_eval": 4,
            "layer_scale_init": 0.1,
        }
        fields = {
            "deltas": str(deltas),
            "out": str(tmp_path / "run"),
            "model": DeltaWorldConfig(**{**tiny, **(model or {})}),
            "steps": 6,
            "batch_size": 8,
            "warmup_steps": 2,
            "log_every": 1,
            "eval_every": 3,
            "save_every": 2,
            "validation_fraction": 0.2,
            "device": "cpu",
        }
        return WorldTrainConfig(**{**fields, **changed})

    return make


@pytest.fixture
def dinoworld_config(tmp_path: Path, patches: Path) -> Callable[..., DINOWorldTrainConfig]:
    """dinoworld_config(field=value, ...): a run of a few tiny steps into tmp_path/run."""

    def make(model: dict[str, Any] | None = None, **changed: Any) -> DINOWorldTrainConfig:
        tiny = {
            "hidden_size": 16,
            "predictor_hidden_size": 16,
            "predictor_num_hidden_layers": 2,
            "predictor_num_heads": 1,
            "rope_axis_sizes": (4, 4, 4),
            "num_samples_train": 4,
            "num_samples_eval": 3,
            "layer_scale_init": 0.1,
            "use_bom": True,
        }
        fields = {
            "patches": str(patches),
            "out": str(tmp_path / "run"),
            "model": DINOWorldConfig(**{**tiny, **(model or {})}),
            "steps": 4,
            "batch_size": 6,
            "warmup_steps": 2,
            "log_every": 1,
            "eval_every": 2,
            "save_every": 2,
            "validation_fraction": 0.2,
            "device": "cpu",
        }
        return DINOWorldTrainConfig(**{**fields, **changed})

    return make


@pytest.fixture
def labels(tmp_path: Path, patches: Path) -> Path:
    """Class of a pixel: whether channel 0 of its patch is positive; a border is ignored."""
    shards = PatchShards(patches)
    windows = np.arange(len(shards))
    tokens, frames = shards.tokens(windows), shards.frame_index(windows)
    arrays = {key: np.full((8, HEIGHT, WIDTH), 255, np.uint8) for key in shards.keys}
    for window, clip in enumerate(shards.clip_index):
        for frame in range(4):
            classes = (tokens[window, frame, :, 0] > 0).reshape(2, 2).astype(np.uint8)
            enlarged = classes.repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1)
            arrays[shards.keys[clip]][frames[window, frame], 2:] = enlarged[2:]
    for key, array in arrays.items():
        np.save(tmp_path / f"{key}.npy", array)
    return tmp_path


@pytest.fixture
def head_config(tmp_path: Path, patches: Path, labels: Path) -> Callable[..., HeadTrainConfig]:
    """head_config(field=value, ...): a run of a few tiny steps into tmp_path/head."""

    def make(**changed: Any) -> HeadTrainConfig:
        fields = {
            "patches": str(patches),
            "labels": str(labels),
            "num_classes": 2,
            "out": str(tmp_path / "head"),
            "steps": 3,
            "batch_size": 8,
            "warmup_steps": 1,
            "log_every": 1,
            "save_every": 2,
            "validation_fraction": 0.2,
            "device": "cpu",
        }
        return HeadTrainConfig(**{**fields, **changed})

    return make


@pytest.fixture
def log_lines() -> Callable[..., list[dict[str, Any]]]:
    """log_lines(run folder, drop=...) -> lines of log.jsonl without what a clock decided."""
    import json

    def read(folder: Path | str, kinds: Sequence[str] = ("train", "validation")) -> list[Any]:
        text = (Path(folder) / "log.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        return [
            {
                name: value
                for name, value in line.items()
                if not name.endswith(("_per_s", "_share", "peak_memory_gb", "eta_s"))
            }
            for line in lines
            if line["kind"] in kinds
        ]

    return read
