"""The numbers that a report begins with."""

import re
from collections.abc import Callable
from html import unescape

from deltatok.evaluate.report.rows import ReportRow


def row(name: str, value: float, *, horizon: str = "mid", metric: str = "miou") -> ReportRow:
    return ReportRow(dataset="d", horizon=horizon, row=name, metric=metric, value=value)


def headline(page: str) -> list[str]:
    """What is read above the tables, in order."""
    html = page[page.index('<p class="result-title">') : page.index("<h2>Scores")]
    words = (" ".join(unescape(text).split()) for text in re.split(r"<[^>]*>", html))
    return [text for text in words if text]


def test_the_mid_horizon_is_told_from_the_lower_bound_to_the_upper_one(
    small_page: Callable[..., str],
) -> None:
    rows = [
        row("best", 0.9, horizon="short"),
        row("best", 0.5, metric="feature_loss"),
        row("present", 0.762),
        row("best", 0.651),
        row("reconstruction", 0.7),
        row("copy_last", 0.287),
    ]
    found = headline(small_page(rows, num_samples=20))
    assert found == [
        "mIoU % ↑, 0.6 s ahead (mid)",
        *("28.7", "copying the last frame"),
        *("65.1", "best of 20 samples"),
        *("70.0", "the tokenizer's reconstruction"),
        *("76.2", "the true future itself"),
    ]


def test_of_one_sample_best_and_mean_are_told_once(small_page: Callable[..., str]) -> None:
    rows = [row("best", 0.5), row("mean", 0.5)]
    found = headline(small_page(rows, num_samples=1))
    assert found[1:] == ["50.0", "best of one"]


def test_modes_are_told_where_they_are_known(small_page: Callable[..., str]) -> None:
    rows = [
        row("copy_last", 0.3),
        row("samples", 0.617, metric="mode_recall"),
        row("samples", 0.492, metric="mode_precision"),
    ]
    page = small_page(rows, num_samples=20, probes={"modes": {"overlap": 0.5}})
    found = " ".join(headline(page))
    assert "The samples hit 61.7 % of all futures" in found
    assert "49.2 % of the samples are a possible future" in found


def test_without_rows_there_is_no_headline(small_page: Callable[..., str]) -> None:
    assert 'class="result' not in small_page([]).partition("</style>")[2]
