"""The FLOPs counted from our modules are those of the released ones."""

from functools import cache

import pytest
import torch

from deltatok.evaluate.flops import (
    FlopsConfig,
    FlopsRow,
    count_flops,
    flops_rows,
    flops_table,
    paper_table_b,
)
from deltatok.shards.errors import UsageError
from deltatok.train.models.configs import DeltaTokConfig, DeltaWorldConfig

RELEASED = {  # row: GFLOPs at 256 px, at 512 px, counted from the released modules
    "backbone, a frame": (47.1, 215.0),
    "encoder, a pair (released)": (97.0, 503.3),
    "decoder, a frame": (46.1, 213.1),
    "predictor, one sample, 4 context tokens": (0.256, 0.256),
    "predictor, one sample, 5 context tokens": (0.284, 0.284),
    "predictor, one sample, 6 context tokens": (0.313, 0.313),
    "window: backbone, 8 frames + 1 black": (424.3, 1935.3),
    "window: encode 8 pairs (released)": (775.7, 4026.3),
    "window: selection, K = 256": (256.4, 256.4),
    "window: winner, forward + backward": (3.4, 3.4),
    "window: whole, on the fly (released)": (1459.9, 6221.5),
    "tokenizer training pair: backbone": (94.3, 430.1),
    "tokenizer training pair: whole (released)": (523.6, 2579.1),
}


@cache
def counted(frame_size: int) -> dict[str, float]:
    """GFLOPs by row; counted once for the whole file."""
    return {row.name: row.gflops for row in flops_rows(FlopsConfig(frame_size=frame_size))}


@pytest.mark.parametrize(
    ("column", "frame_size"), [(0, 256), pytest.param(1, 512, marks=pytest.mark.slow)]
)
def test_full_size_counts_are_those_of_the_released_modules(column, frame_size):
    got = counted(frame_size)
    for name, values in RELEASED.items():
        digits = 3 if values[column] < 1 else 1
        assert abs(got[name] - values[column]) <= 0.51 * 10**-digits, name


def test_saved_work_is_counted_from_what_runs():
    got = counted(256)
    here = got["encoder, a pair (here: last block computes z only)"]
    assert here < 0.94 * got["encoder, a pair (released)"]
    whole = got["window: whole, from cached delta tokens"]
    assert got["window: whole, on the fly (released)"] / whole > 5


def test_table_b_of_the_paper_is_reproduced():
    got = [round(row.gflops, 2) for row in paper_table_b(FlopsConfig(frame_size=256))]
    assert got == [0.26, 0.28, 0.31, 46.12]


def test_products_are_counted_twice_per_multiply_add():
    layer = torch.nn.Linear(3, 5, device="meta")
    assert count_flops(lambda: layer(torch.empty(7, 3, device="meta"))) == 2 * 7 * 3 * 5


def test_table_has_a_column_for_every_size():
    rows = [FlopsRow("encoder", 1234.5), FlopsRow("predictor", 0.256)]
    assert flops_table([("256 px", rows), ("512 px", rows)]) == (
        "| GFLOPs | 256 px | 512 px |\n"
        "| --- | ---: | ---: |\n"
        "| encoder | 1,234.50 | 1,234.50 |\n"
        "| predictor | 0.256 | 0.256 |\n"
    )


def test_a_rectangle_costs_what_its_patches_do():
    square, wide = FlopsConfig(frame_size=64), FlopsConfig(frame_size=(32, 128))
    assert wide.grid == (2, 8)
    assert [row.gflops for row in flops_rows(wide)] == [row.gflops for row in flops_rows(square)]


def test_impossible_sizes_are_refused():
    for size in (250, (256, 250)):
        with pytest.raises(UsageError, match="multiple of patch_size 16"):
            FlopsConfig(frame_size=size)
    with pytest.raises(UsageError, match="make them equal"):
        FlopsConfig(world=DeltaWorldConfig(hidden_size=64))
    for count in (0, 257):
        with pytest.raises(UsageError, match=f"num_winners {count}: wanted 1 to .* 256"):
            FlopsConfig(num_winners=count)


def test_every_winner_passes_with_gradient():
    small = DeltaWorldConfig(predictor_num_hidden_layers=1)
    tokenizer = DeltaTokConfig(num_hidden_layers=1)
    one, four = (
        {
            row.name: row.gflops
            for row in flops_rows(
                FlopsConfig(
                    frame_size=32,
                    backbone_layers=1,
                    tokenizer=tokenizer,
                    world=small,
                    num_winners=count,
                )
            )
        }
        for count in (1, 4)
    )
    name = "forward + backward"
    # Keys and values are the same for all.
    ratio = four[f"window: 4 winners, {name}"] / one[f"window: winner, {name}"]
    assert 3.5 < ratio < 4
    more = four[f"window: 4 winners, {name}"] - one[f"window: winner, {name}"]
    whole = "window: whole, from cached delta tokens"
    assert four[whole] - one[whole] == pytest.approx(more)
