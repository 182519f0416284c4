"""The pictures of a report: colours that can be compared, strips that line up, curves."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deltatok.evaluate.forecast.run import windows_to_show
from deltatok.evaluate.report.panels import (
    ShownWindow,
    class_panel,
    feature_panel,
    most_uncertain_first,
)
from deltatok.evaluate.report.pictures import (
    GAP,
    TILE_HEIGHT,
    class_legend,
    class_palette,
    fit_pca_colours,
    panel_image,
    strip_image,
)
from deltatok.evaluate.report.plots import plot_curves, read_curve
from deltatok.shards.errors import UsageError
from deltatok.train.models.heads import SegmentationHead, SegmentationHeadConfig

GRID = (4, 5)


def shown(num_samples: int = 2) -> ShownWindow:
    """A window of 4 context and 3 target frames."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(7, 20, 8)).astype(np.float32)
    rows = dict.fromkeys(("best", "mean", "present"), truth[4:] + 0.1)
    return ShownWindow(
        title="clip, window 3",
        times_s=(-0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6),
        aspect=1.5,
        grid=GRID,
        truth=truth,
        rows=rows | {"copy_last": truth[[3, 3, 3]]},
        samples=truth[None, 4:].repeat(num_samples, axis=0),
        spread=np.ones((3, *GRID), np.float32),
        labels=tuple(np.full((8, 12), i % 2, np.uint8) for i in range(7)),
    )


def test_equal_features_have_equal_colours_in_every_row() -> None:
    panel = feature_panel(shown())
    strips = {strip.label: strip for strip in panel.strips}
    assert np.array_equal(strips["sample 1"].tiles[0], strips["truth"].tiles[4])
    assert np.array_equal(strips["copy last"].tiles[2], strips["truth"].tiles[3])
    assert not np.array_equal(strips["best sample"].tiles[0], strips["truth"].tiles[4])


def test_rows_of_a_feature_panel_are_named_and_in_order() -> None:
    labels = [strip.label for strip in feature_panel(shown()).strips]
    assert labels == [
        "truth",
        "best sample",
        "mean of samples",
        "sample 1",
        "sample 2",
        "copy last",
        "spread of samples",
    ]


def test_pca_colours_do_not_depend_on_an_eigenvectors_sign() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(50, 6)).astype(np.float32)
    axes = fit_pca_colours(tokens).axes
    peaks = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
    assert (peaks > 0).all()


def test_pca_colours_of_a_still_grey_picture_are_finite() -> None:
    colours = fit_pca_colours(np.ones((20, 6), np.float32))
    assert colours(np.ones((20, 6), np.float32), GRID).shape == (4, 5, 3)


def test_strips_of_forecasts_line_up_with_the_truth() -> None:
    panel = feature_panel(shown())
    whole, late = strip_image(panel.strips[0]), strip_image(panel.strips[1])
    assert whole.size == (7 * (round(1.5 * TILE_HEIGHT) + GAP), TILE_HEIGHT + GAP)
    assert late.width * 7 == whole.width * 3


def test_panel_picture_holds_all_strips() -> None:
    panel = feature_panel(shown())
    picture = panel_image(panel)
    assert picture.width > strip_image(panel.strips[0]).width
    assert picture.height >= len(panel.strips) * TILE_HEIGHT


def test_class_panel_shows_the_classes_that_occur() -> None:
    head = SegmentationHead(SegmentationHeadConfig(in_size=8, num_classes=5)).eval()
    with torch.no_grad():
        for name, values in head.named_parameters():
            values.zero_()
            if name.endswith("bias"):
                values[3] = 1.0
    panel = class_panel(shown(), head, class_names=("sky", "road"))
    assert [name for name, _ in panel.legend] == ["sky", "road", "class 3"]
    assert [strip.label for strip in panel.strips][:2] == ["label", "present"]
    assert "road 100 %" not in panel.strips[0].alt
    assert "sky 100 %" in panel.strips[0].alt


def test_what_a_head_reads_is_smooth_and_features_are_blocks() -> None:
    head = SegmentationHead(SegmentationHeadConfig(in_size=8, num_classes=2)).eval()
    classes = class_panel(shown(), head, class_names=()).strips[1].tiles[0]
    tokens = feature_panel(shown()).strips[1]
    side = TILE_HEIGHT // GRID[0]
    blocks = [classes[:side, :side], tokens.tiles[0][:side, :side]]
    assert tokens.blocks
    assert len(np.unique(blocks[1].reshape(-1, 3), axis=0)) == 1
    rows = (classes[::side] != classes[side - 1 :: side]).any()
    assert rows, "class maps change within a patch"


def test_windows_whose_samples_differ_most_come_first() -> None:
    windows = [
        replace(shown(), title=str(value), spread=np.full((3, *GRID), value, np.float32))
        for value in (1, 3, 2)
    ]
    plain = [replace(shown(), title=name, spread=None) for name in "ab"]
    assert [w.title for w in most_uncertain_first(windows)] == ["3", "2", "1"]
    assert [w.title for w in most_uncertain_first(plain)] == ["a", "b"]


def test_classes_have_different_colours_and_ignore_is_grey() -> None:
    palette = class_palette(124)
    assert len(np.unique(palette[:124], axis=0)) == 124
    legend = class_legend([np.array([[0, 255]], np.uint8)], palette, ())
    assert legend[1] == ("ignored", (128, 128, 128))


@pytest.mark.parametrize(
    ("clips", "count", "wanted"),
    [
        ([0, 0, 0, 1, 2, 3], 2, [0, 4]),
        ([0, 0, 0, 1, 2, 3], 4, [0, 3, 4, 5]),
        ([0, 0, 0, 1, 2, 3], 5, [0, 1, 3, 4, 5]),
        ([0, 0], 9, [0, 1]),
        ([0, 0], 0, []),
    ],
)
def test_windows_shown_are_spread_over_the_clips(
    clips: list[int], count: int, wanted: list[int]
) -> None:
    assert windows_to_show(np.array(clips), count) == wanted


def test_curve_is_read_from_a_run_folder_up_to_its_last_whole_line(tmp_path: Path) -> None:
    lines = [
        '{"kind": "train", "step": 5, "loss": 2.0, "learning_rate": 0.1}',
        '{"kind": "validation", "step": 5, "validation_loss": 3.0}',
        '{"kind": "train", "step": 10, "loss": null}',
        '{"kind": "train", "step": 15, "lo',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    curve = read_curve(str(tmp_path))
    assert curve.name == tmp_path.name
    assert curve.losses == {"loss": ([5], [2.0]), "validation_loss": ([5], [3.0])}


def test_curve_plot_has_a_light_and_a_dark_picture(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 3, "loss": 0.5}\n')
    (plot,) = plot_curves([read_curve(str(tmp_path))])
    assert plot.light[:4] == plot.dark[:4] == b"\x89PNG"
    assert plot.light != plot.dark
    assert "loss from 2 at step 1 to 0.5 at step 3" in plot.alt


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (None, "cannot be read"),
        (b"nonsense\n", "cannot be read"),
        (b"\xff\xfe\x00\n", "cannot be read"),
        (b"[" * 100_000 + b"\n", "cannot be read"),
        (b'{"step": 1, "loss": 1' + b"0" * 400 + b"}\n", "no line with"),
        (b'{"step": 1}\n', "no line with"),
    ],
)
def test_curve_of_no_use_is_refused(tmp_path: Path, log: bytes | None, message: str) -> None:
    if log is not None:
        (tmp_path / "log.jsonl").write_bytes(log)
    with pytest.raises(UsageError, match=message):
        read_curve(str(tmp_path))


def test_a_pipe_in_place_of_a_log_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(UsageError, match="no regular file"):
        read_curve(str(tmp_path))
