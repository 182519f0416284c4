"""The pretended device, and the little caches, clips and models of the other rooms' tests."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltatok.shards import PatchShards
from deltatok.train.config import DINOWorldTrainConfig, HeadTrainConfig, TrainConfig
from deltatok.train.models.configs import DINOWorldConfig

sys.path.append(str(Path(__file__).parent))
from neighbours import load
from pretended import PretendedDevice, pretend_cuda

ROOMS = ("extract", "train", "evaluate")

_extract, _train, _evaluate = (load(f"{room}/conftest.py") for room in ROOMS)
backbone, backbone_folder, clips = _extract.backbone, _extract.backbone_folder, _extract.clips
digests, make_config, write_clip = _extract.digests, _extract.make_config, _extract.write_clip
deltas, patches, log_lines = _train.deltas, _train.patches, _train.log_lines
make_patches, make_deltas = _train.make_patches, _train.make_deltas
tokenizer_config, world_config = _train.tokenizer_config, _train.world_config
make, shared_evaluation, tiny = _evaluate.make, _evaluate.shared_evaluation, _evaluate.tiny

TrainConfigs = Callable[..., TrainConfig]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    if torch.version.cuda is not None:
        pytest.skip("needs a torch without CUDA")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cuda() -> Iterator[PretendedDevice]:
    """A pretended device; the test fails if a race or a block freed too early was found on it."""
    with pretend_cuda() as device:
        yield device
    assert device.problems == []


@pytest.fixture
def dinoworld_config(tmp_path: Path, patches: Path) -> TrainConfigs:
    """As `world_config`, for DINO-world."""

    def config(model: dict[str, Any] | None = None, **changed: Any) -> DINOWorldTrainConfig:
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
            "steps": 6,
            "batch_size": 6,
            "warmup_steps": 2,
            "log_every": 1,
            "eval_every": 3,
            "save_every": 2,
            "validation_fraction": 0.2,
        }
        return DINOWorldTrainConfig(**{**fields, **changed})

    return config


@pytest.fixture
def head_config(tmp_path: Path, patches: Path) -> TrainConfigs:
    """As `world_config`, for a segmentation head; a patch's class is the sign of its channel 0."""
    shards = PatchShards(patches)
    tokens = shards.tokens(np.arange(len(shards)))
    frames = shards.frame_index(np.arange(len(shards)))
    labels = {key: np.full((8, 32, 48), 255, np.uint8) for key in shards.keys}
    for window, clip in enumerate(shards.clip_index):
        for frame in range(tokens.shape[1]):
            classes = (tokens[window, frame, :, 0] > 0).reshape(2, 2).astype(np.uint8)
            enlarged = classes.repeat(16, 0).repeat(24, 1)
            labels[shards.keys[clip]][frames[window, frame]] = enlarged
    for key, array in labels.items():
        np.save(tmp_path / f"{key}.npy", array)

    def config(**changed: Any) -> HeadTrainConfig:
        fields = {
            "patches": str(patches),
            "labels": str(tmp_path),
            "num_classes": 2,
            "out": str(tmp_path / "run"),
            "steps": 6,
            "batch_size": 8,
            "warmup_steps": 2,
            "log_every": 1,
            "eval_every": 3,
            "save_every": 2,
            "validation_fraction": 0.2,
        }
        return HeadTrainConfig(**{**fields, **changed})

    return config
