"""What depth and RGB heads read from features, as pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltatok.evaluate.forecast.run import run_forecast
from deltatok.evaluate.report.panels import ShownWindow, depth_panel, rgb_panel
from deltatok.shards.errors import CacheMismatch
from deltatok.train.models.heads import DepthHead, DepthHeadConfig
from deltatok.train.models.rgb_head import RGBHead, RGBHeadConfig


def rgb_head(in_size: int = 32) -> RGBHead:
    """A head that draws the mean colour whatever it sees."""
    config = RGBHeadConfig(
        in_size=in_size,
        hidden_size=16,
        depth=1,
        num_heads=2,
        mlp_size=16,
        patch=4,
        img_size=16,
        feature_weight=(1.0,) * in_size,
        feature_bias=(0.0,) * in_size,
        image_mean=(0.2, 0.4, 1.6),
    )
    head = RGBHead(config, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        head.decoder_pred.weight.zero_()
        head.decoder_pred.bias.zero_()
    return head


@pytest.fixture
def window() -> ShownWindow:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(7, 6, 32)).astype(np.float32)
    label = np.array([[0, 2], [4, 0]], np.float32)
    return ShownWindow(
        title="clip",
        times_s=tuple(0.2 * (i - 3) for i in range(7)),
        aspect=1.0,
        grid=(2, 3),
        truth=truth,
        rows={"present": truth[4:], "copy_last": truth[3:4].repeat(3, axis=0)},
        samples=np.empty((0, 3, 6, 32), np.float32),
        spread=None,
        labels=(label,),
    )


def test_rgb_tiles_are_what_the_head_draws(window: ShownWindow) -> None:
    panel = rgb_panel(window, rgb_head())
    assert [strip.label for strip in panel.strips] == ["present", "copy last"]
    for strip in panel.strips:
        assert len(strip.tiles) == 3
        for tile in strip.tiles:
            assert np.unique(tile.reshape(-1, 3), axis=0).tolist() == [[51, 102, 255]]


def test_depth_tiles_share_one_scale(window: ShownWindow) -> None:
    head = DepthHead(DepthHeadConfig(in_size=32, max_depth=8.0, num_bins=4)).eval()
    panel = depth_panel(window, head)
    label, *rows = panel.strips
    assert label.label.startswith("label, 0 to ")
    assert "2.0 to 4.0 m" in label.alt
    assert len(label.tiles) == 1
    assert [strip.label for strip in rows] == ["present", "copy last"]
    assert np.array_equal(rows[1].tiles[0], rows[1].tiles[2])


def test_the_report_shows_what_the_rgb_head_draws(
    shared_evaluation: Any, make: Any, tmp_path: Path
) -> None:
    rgb_head().save_pretrained(tmp_path / "rgb", {"patches": make.identity("uniform", "aaaa")})
    config = shared_evaluation.config(
        out=str(tmp_path / "out"), rgb_head=str(tmp_path / "rgb"), num_pictures=2
    )
    report = run_forecast(config)
    assert report.provenance["rgb_head"]["checked"] is True
    names = {path.name for path in (tmp_path / "out" / "pictures").iterdir()}
    assert {"rgb-0.png", "rgb-1.png"} <= names
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Picture read from the features of the row best sample" in page


def test_an_rgb_head_of_another_width_is_refused(
    shared_evaluation: Any, make: Any, tmp_path: Path
) -> None:
    rgb_head(16).save_pretrained(tmp_path / "rgb", {"patches": make.identity("uniform", "aaaa")})
    config = shared_evaluation.config(out=str(tmp_path / "out"), rgb_head=str(tmp_path / "rgb"))
    with pytest.raises(CacheMismatch, match=r"hidden_size is 16, the cache's tokens have 32"):
        run_forecast(config)
