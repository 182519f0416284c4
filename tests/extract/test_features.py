"""Batches of one shape: padding is dropped, order is kept, a writer sees what it was promised."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.features import WindowFeatures
from deltatok.extract.shard_writer import PatchShardWriter

T, S, N, D = 2, 32, 4, 64


def _config(*, batch_frames: int) -> ExtractConfig:
    return ExtractConfig(
        videos=("v",), out="o", num_frames=T, frame_size=S, batch_frames=batch_frames
    )


@pytest.fixture
def features(backbone: Backbone) -> WindowFeatures:
    """Three windows a batch."""
    return WindowFeatures(backbone, PatchShardWriter(), _config(batch_frames=7))


def _windows(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, T, 3, S, S), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_rows_come_back_in_order_without_padding(
    features: WindowFeatures, backbone: Backbone, count: int
) -> None:
    windows = _windows(count)
    for window in windows:
        features.add(window)
    rows = features.finish()
    assert rows.shape == (count, T, N, D)
    assert rows.dtype == np.float16
    for row, window in zip(rows, windows, strict=True):
        alone = backbone.tokens(window).numpy()
        assert np.abs(row - alone).max() <= 2**-10 * np.abs(alone).max()


def test_a_shard_does_not_depend_on_the_one_before(features: WindowFeatures) -> None:
    windows = _windows(4)
    for window in windows[:2]:
        features.add(window)
    first = features.finish()
    for window in windows[2:]:
        features.add(window)
    features.finish()
    for window in windows[:2]:
        features.add(window)
    assert np.array_equal(features.finish(), first)


def test_a_window_longer_than_a_batch_makes_a_batch_of_its_own(backbone: Backbone) -> None:
    features = WindowFeatures(backbone, PatchShardWriter(), _config(batch_frames=1))
    for window in _windows(2):
        features.add(window)
    assert features.finish().shape == (2, T, N, D)


def test_bfloat16_rows_are_bits_made_on_the_device(backbone: Backbone) -> None:
    writer = PatchShardWriter(dtype="bfloat16")
    features = WindowFeatures(backbone, writer, _config(batch_frames=4))
    features.add(_windows(1)[0])
    rows = features.finish()
    wanted = backbone.tokens(torch.cat([_windows(1)[0], torch.zeros_like(_windows(1)[0])]))[:T]
    np.testing.assert_array_equal(rows[0], wanted.bfloat16().view(torch.int16).numpy())


def test_a_writer_decides_what_is_kept(backbone: Backbone) -> None:
    class MeanWriter(PatchShardWriter):
        """Keeps one number a frame."""

        def convert(self, tokens: Tensor) -> Tensor:
            assert tokens.shape == (2, T, N, D)
            assert tokens.dtype == torch.float32
            return tokens.mean(dim=(2, 3))

    features = WindowFeatures(backbone, MeanWriter(), _config(batch_frames=4))
    for window in _windows(3):
        features.add(window)
    assert features.finish().shape == (3, T)


def test_black_file_is_written_once(tmp_path: Path) -> None:
    (tmp_path / "black.npy").write_bytes(b"there")
    PatchShardWriter().begin(tmp_path, torch.zeros(N, D))
    assert (tmp_path / "black.npy").read_bytes() == b"there"
