"""The paper's rows stand beside ours only where the protocol is the same."""

from collections.abc import Callable
from typing import Any

import pytest

from deltatok.evaluate.forecast.config import ForecastConfig
from deltatok.evaluate.report.paper_rows import (
    PAPER_ROWS,
    PaperComparison,
    compare_with_paper,
    paper_table,
)
from deltatok.evaluate.report.rows import ROW_NAMES, ReportRow
from deltatok.train.models.heads import SegmentationHead, SegmentationHeadConfig

IDENTITY: dict[str, Any] = {
    "sampling": {"policy": "evaluation", "dataset": "vspw", "stride_s": 0.2},
    "preprocessing": {"frame_size": 512},
    "backbone": {
        "config": {
            "model_type": "dinov3_vit",
            "patch_size": 16,
            "hidden_size": 768,
            "num_hidden_layers": 12,
        }
    },
}
ROWS = [
    ReportRow(dataset="vspw", horizon=horizon, row="best", metric="miou", value=value)
    for horizon, value in (("short", 0.571), ("mid", 0.522))
]


@pytest.fixture(scope="module")
def head() -> SegmentationHead:
    return SegmentationHead(SegmentationHeadConfig(in_size=8, num_classes=124))


def comparison(
    model: SegmentationHead, identity: dict[str, Any] | None = None, **changes: Any
) -> PaperComparison | None:
    settings = {"patches": "p", "tokenizer": "t", "out": "o", "head": "h", "labels": "l"}
    config = ForecastConfig(**settings | changes)
    return compare_with_paper(config, IDENTITY if identity is None else identity, head=model)


def test_the_same_protocol_is_comparable_and_ours_stands_beside(
    head: SegmentationHead, small_page: Callable[..., str]
) -> None:
    found = comparison(head)
    assert found == PaperComparison(dataset="vspw", differences=())
    assert found is not None
    header, body = paper_table(ROWS, found)
    assert header == ["row", "mIoU % short", "mIoU % mid"]
    ours = body.index(["this run: Best sample", "57.1", "52.2"])
    assert body[ours + 1] == ["paper: DeltaWorld, paper, best", "55.4", "50.1"]
    assert "The same protocol" in small_page(ROWS, paper=found)


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (("preprocessing", "frame_size"), 256, "frame size: 256, paper 512"),
        (("sampling", "stride_s"), 0.4, "seconds between frames: 0.4, paper 0.2"),
        (("sampling", "policy"), "uniform", "sampling policy: uniform, paper evaluation"),
    ],
)
def test_another_cache_is_not_comparable(
    head: SegmentationHead,
    small_page: Callable[..., str],
    place: tuple[str, str],
    value: Any,
    text: str,
) -> None:
    identity = {key: dict(part) for key, part in IDENTITY.items()}
    identity[place[0]][place[1]] = value
    found = comparison(head, identity)
    assert found is not None
    assert found.differences == (text,)
    assert not any("this run" in row[0] for row in paper_table(ROWS, found)[1])
    page = small_page(ROWS, paper=found)
    assert "Not comparable" in page
    assert text in page


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_samples": 10}, "samples: 10, paper 20"),
        ({"mid_steps": 4}, "steps of the mid horizon: 4, paper 3"),
        ({"noise_scale": 2.0}, "noise scale: 2, paper 1"),
        ({"head": None, "labels": None}, "labels: none, paper given"),
        (
            {"predictions": "p", "backbone": "b", "predictions_subset": True},
            "only a subset of the targets: yes, paper no",
        ),
    ],
)
def test_other_settings_are_not_comparable(
    head: SegmentationHead, changes: dict[str, Any], text: str
) -> None:
    found = comparison(head, **changes)
    assert found is not None
    assert text in found.differences


def test_a_data_set_that_only_bears_the_name_is_not_comparable(head: SegmentationHead) -> None:
    found = comparison(head, {"sampling": {"policy": "uniform"}}, dataset="vspw")
    assert found is not None
    assert len(found.differences) > 3


def test_the_paper_has_no_rows_of_another_data_set(
    head: SegmentationHead, small_page: Callable[..., str]
) -> None:
    assert comparison(head, {"sampling": {"policy": "uniform"}}, dataset="mine") is None
    assert "Beside the paper" not in small_page(ROWS, paper=None)


def test_rows_of_the_paper_are_of_kinds_that_a_report_has() -> None:
    for rows in PAPER_ROWS.values():
        assert {kind for kind, _, _ in rows} <= set(ROW_NAMES)
        assert len({label for _, label, _ in rows}) == len(rows) == 10


TABLE = """
Present | 58.4 / 58.4 | 70.5 / 70.5 | 2.79 / 2.79
Copy last | 51.2 / 44.3 | 53.5 / 39.6 | 3.76 / 4.86
DINO-world (paper's) | 54.0 / 47.9 | 62.0 / 49.8 | 3.16 / 4.07
Cosmos-12B, best | 51.7 / 47.7 | 55.3 / 53.3 | 3.72 / 4.01
Cosmos-12B, mean | 50.7 / 45.5 | 56.0 / 51.2 | 3.71 / 4.14
DeltaWorld, paper, best | 55.4 / 50.1 | 65.8 / 55.4 | 3.00 / 3.88
DeltaWorld, paper, mean | 53.7 / 46.7 | 63.9 / 51.3 | 3.17 / 4.17
DeltaWorld, released, best | 56.3 / 51.5 | 66.2 / 55.3 | 2.95 / 3.71
DeltaWorld, released, mean | 54.2 / 46.6 | 64.2 / 49.5 | 3.32 / 4.74
DeltaTok reconstruction, released | 58.6 / 58.5 | 69.6 / 67.9 | 2.78 / 2.86
"""
"""As printed, short / mid: VSPW, Cityscapes, KITTI."""


def test_the_papers_figures_are_those_that_were_printed() -> None:
    printed = [line.split(" | ") for line in TABLE.strip().splitlines()]
    for column, dataset in enumerate(("vspw", "cityscapes", "kitti"), start=1):
        wanted = {cells[0]: tuple(cells[column].split(" / ")) for cells in printed}
        assert {label: numbers for _, label, numbers in PAPER_ROWS[dataset]} == wanted
