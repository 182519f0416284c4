"""report.html: one whole file, well-formed, for everybody; and what the tables say."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from deltatok.evaluate.forecast.run import run_forecast
from deltatok.evaluate.report.rows import ReportRow, expected_order, table

VOID = {"meta", "img", "source", "br", "wbr", "link", "input"}


class Page(HTMLParser):
    """Collects tags and checks that every one that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page_text(shared_evaluation: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with everything on it, and a hostile name."""
    root = tmp_path_factory.mktemp("page")
    run = root / "run"
    run.mkdir()
    (run / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 9, "loss": 0.5}\n')
    config = shared_evaluation.config(
        out=str(root / "out"),
        dataset='<b onload="x">&',
        num_pictures=2,
        curves=(str(run),),
        class_names=("sky", "<road>"),
    )
    run_forecast(config)
    return (root / "out" / "report.html").read_text()


def test_page_is_well_formed(page_text: str) -> None:
    assert page_text.startswith("<!DOCTYPE html>")
    assert Page(page_text).all("h1")


def test_page_refers_to_nothing_outside(page_text: str) -> None:
    assert not re.search(r"https?:|//cdn|url\(|@import", page_text)
    for name in ("src", "srcset", "href"):
        for target in re.findall(rf'{name}="([^"]{{0,40}})', page_text):
            assert re.match("data:image/(png|gif|webp);base64,", target)
    assert not Page(page_text).all("script")


def test_every_picture_has_a_text(page_text: str) -> None:
    pictures = Page(page_text).all("img")
    assert len(pictures) > 20
    assert all((picture["alt"] or "").strip() for picture in pictures)


def test_page_follows_dark_mode_and_phones(page_text: str) -> None:
    assert "@media (prefers-color-scheme: dark)" in page_text
    assert 'content="width=device-width, initial-scale=1"' in page_text
    sources = Page(page_text).all("source")
    assert sources
    media = {source["media"] for source in sources}
    assert media == {"(prefers-color-scheme: dark)"}


def test_pictures_come_first_then_numbers_then_tables(page_text: str) -> None:
    page = Page(page_text)
    found = [(tag, attributes.get("class")) for tag, attributes in page.tags]
    film, result = found.index(("figure", "film")), found.index(("ul", "result"))
    assert film < result < found.index(("table", None))
    assert ("h2", None) not in found[:result]
    assert ("li", "main") in found
    assert "best of 6 samples" in page.text
    assert "the target 0.2 s (short, 1 step) and 0.6 s (mid, 3 steps) later" in page.text


def test_the_first_picture_shows_truth_best_mean_and_three_samples(page_text: str) -> None:
    first = page_text[page_text.index('<figure class="film"') :]
    names = re.findall("<strong>(.*?)</strong>", first[: first.index("</figure>")])
    assert names[:3] == ["label", "best sample", "mean of samples"]
    assert [name.split()[0] for name in names[3:6]] == ["sample"] * 3
    assert len(set(names)) == len(names)


def test_every_table_is_followed_by_what_it_says(page_text: str) -> None:
    parts = re.split(r"<table(?! class=\"facts\">)", page_text)[1:]
    assert len(parts) >= 4
    for part in parts:
        _, _, after = part.partition("</table>")
        after = after[: after.index("</p>")]
        assert 'class="reading"' in after
        assert len(re.sub(r"<[^>]*>", " ", after).split()) > 5


def test_a_diagnosis_stands_before_everything(small_page: Callable[..., str]) -> None:
    found = {
        "cause": "The tokenizer <ignores> its token.",
        "measured": {"z_swap_ratio": 1.0123456},
        "next_step": "Train it for more steps.",
    }
    page = small_page(mid(best=0.5), diagnosis=[found])
    box = page[page.index('class="diagnosis"') : page.index('<ul class="result">')]
    words = " ".join(re.sub(r"<[^>]*>", " ", box).split())
    assert "The tokenizer &lt;ignores&gt; its token. z swap ratio 1.012." in words
    assert "Next: Train it for more steps." in words
    assert 'class="diagnosis"' not in small_page(mid(best=0.5))


def test_names_cannot_break_the_page(page_text: str) -> None:
    page = Page(page_text)
    assert not page.all("b")
    assert 'Forecasts on <b onload="x">&' in page.text
    assert "<road>" in page.text


def test_page_says_where_the_numbers_come_from(page_text: str) -> None:
    text = Page(page_text).text
    assert "expected order:" in text
    assert "| row | mIoU % ↑ short |" in text
    assert "cache.fingerprint" in text
    assert "Training curves" in text


def test_pictures_of_an_earlier_report_are_removed(tiny: Any) -> None:
    run_forecast(tiny.config(num_pictures=2))
    pictures = tiny.root / "report" / "pictures"
    assert len(list(pictures.iterdir())) == 6
    run_forecast(tiny.config(num_pictures=1, head=None, labels=None))
    assert sorted(path.name for path in pictures.iterdir()) == ["features-0.png", "moving-0.gif"]


def test_frames_of_the_videos_are_shown(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    videos = tiny.root / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4")
    (videos / "c.mp4").write_bytes(b"no video")
    run_forecast(tiny.config(num_pictures=5, videos=(str(videos),)))
    text = (tiny.root / "report" / "report.html").read_text()
    alts = [picture["alt"] or "" for picture in Page(text).all("img")]
    shown = [alt for alt in alts if alt.startswith("Frames of")]
    assert len(shown) == 6  # two windows of a.mp4, in both kinds of panel, and moving
    assert all("a.mp4" in alt for alt in shown)
    assert "sub/b.mp4 is not among --videos" in caplog.text
    assert "c.mp4: its pictures have no frames" in caplog.text


def write_video(path: Path) -> None:
    """50 small frames."""
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(50):
            frame = np.full((32, 32, 3), 5 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def mid(metric: str = "miou", **values: float) -> list[ReportRow]:
    """Rows of the mid horizon."""
    return [
        ReportRow(dataset="d", horizon="mid", row=name, metric=metric, value=number)
        for name, number in values.items()
    ]


PAPER = {"present": 0.58, "best": 0.5, "discriminative": 0.48, "mean": 0.47, "copy_last": 0.44}


def test_order_of_the_paper_holds() -> None:
    check = expected_order(mid(**PAPER))
    assert check.holds is True
    assert check.text.startswith("expected order: holds on mid-term mIoU: present (58.0) > best")


@pytest.mark.parametrize(
    ("row", "number", "message"),
    [
        ("best", 0.47, "best (47.0) is no better than discriminative (48.0)"),
        ("best", 0.6, "present (58.0) is no better than best (60.0)"),
        ("mean", 0.43, "mean (43.0) is no better than copy_last (44.0)"),
        ("mean", 0.44, "mean (44.0) is no better than copy_last (44.0)"),
    ],
)
def test_order_that_does_not_hold_is_said_plainly(row: str, number: float, message: str) -> None:
    check = expected_order(mid(**PAPER | {row: number}))
    assert check.holds is False
    assert check.text == f"expected order: does not hold on mid-term mIoU: {message}"


def test_order_without_labels_is_that_of_the_losses() -> None:
    losses = {"present": 0.0, "best": 0.1, "discriminative": 0.2, "mean": 0.15, "copy_last": 0.3}
    check = expected_order(mid(metric="feature_loss", **losses))
    assert check.holds is True
    assert "feature loss" in check.text


def test_order_of_missing_rows_is_not_checked() -> None:
    check = expected_order(mid(present=0.5, copy_last=0.4))
    assert check.holds is None
    assert "not in this report: present > best" in check.text


def test_markdown_table_is_one_line_a_row() -> None:
    lines = table(mid(present=0.584, copy_last=0.4)).markdown().splitlines()
    assert lines == [
        "| row | mIoU % ↑ short | mIoU % ↑ mid |",
        "| --- | ---: | ---: |",
        "| Copy last (lower bound) | - | 40.0 |",
        "| Present (upper bound) | - | 58.4 |",
    ]
