"""The pretended device, and the little caches, clips and models of the other rooms' tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
dinoworld_config, head_config, labels = _train.dinoworld_config, _train.head_config, _train.labels
make, shared_evaluation, tiny = _evaluate.make, _evaluate.shared_evaluation, _evaluate.tiny


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
