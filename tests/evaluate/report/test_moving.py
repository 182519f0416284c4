"""Moving pictures of a report: every moment, side by side, and a text for who cannot see them."""

import io
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from deltatok.evaluate.report.animation import (
    GAP,
    LINE,
    draw_moments,
    moving_panel,
    moving_panels,
    outlined,
)
from deltatok.evaluate.report.pictures import Panel, Strip
from deltatok.evaluate.report.write import Pictures

TIMES_S = (-0.4, -0.2, 0.0, 0.2, 0.4)
SIDE = 20


def strip(label: str, count: int, grey: int) -> Strip:
    tiles = tuple(np.full((SIDE, SIDE, 3), grey + 10 * i, np.uint8) for i in range(count))
    return Strip(label=label, alt=f"About {label}.", tiles=tiles)


def panel(*strips: Strip) -> Panel:
    columns = tuple(f"{time_s:+.1f} s" for time_s in TIMES_S)
    return Panel(title="<clip>, window 3", columns=columns, strips=strips)


def moments(gif: bytes) -> list[Image.Image]:
    with Image.open(io.BytesIO(gif)) as film:
        found = []
        for i in range(getattr(film, "n_frames", 1)):
            film.seek(i)
            found.append(film.convert("RGB"))
        assert film.info["loop"] == 0
        return found


def cell(picture: Image.Image, column: int) -> int:
    """Grey in the middle of a tile of the first line; three cells, as wide as their names."""
    place = (GAP + column * (picture.width - GAP) // 3 + SIDE // 2, LINE + SIDE // 2)
    found = picture.getpixel(place)
    assert isinstance(found, tuple)
    return int(found[0])


def test_futures_part_after_what_was_seen() -> None:
    moving = moving_panel(
        panel(strip("truth", 5, 50), strip("sample 4", 2, 150), strip("best sample", 2, 200)),
        times_s=TIMES_S,
    )
    assert moving is not None
    pictures = moments(moving.gif())
    assert len(pictures) == 5
    for i in range(3):  # all cells show the truth
        assert [cell(pictures[i], column) for column in range(3)] == pytest.approx(
            [50 + 10 * i] * 3, abs=4
        )
    shown = [cell(pictures[4], column) for column in range(3)]
    assert shown == pytest.approx([90, 210, 160], abs=4)  # truth, best, sample


def test_every_place_has_a_tile_for_every_moment_and_its_own_text() -> None:
    whole = panel(
        strip("video", 5, 0),
        strip("truth", 5, 0),
        *(strip(f"sample {i}", 2, 0) for i in range(4)),
        strip("spread of samples", 2, 0),
    )
    moving = moving_panel(whole, times_s=TIMES_S)
    assert moving is not None
    assert moving.num_seen == 3
    labels = ["video", "truth", "sample 0", "sample 1", "sample 2"]  # three samples, no spread
    assert [one.label for one in moving.strips] == labels
    assert [one.alt for one in moving.strips] == [f"About {label}." for label in labels]
    assert {len(one.tiles) for one in moving.strips} == {5}
    assert moving.shown_step_s >= 0.4  # slow enough to be followed


def test_the_best_sample_is_not_shown_twice_unless_all_are_alike() -> None:
    best = strip("best sample", 2, 10)
    samples = [strip(f"sample {grey}", 2, grey) for grey in (10, 50, 100, 150)]
    moving = moving_panel(panel(strip("truth", 5, 0), best, *samples), times_s=TIMES_S)
    assert moving is not None
    assert [one.label for one in moving.strips[2:]] == ["sample 50", "sample 100", "sample 150"]
    alike = [strip(f"sample {i}", 2, 10) for i in range(4)]
    moving = moving_panel(panel(strip("truth", 5, 0), best, *alike), times_s=TIMES_S)
    assert moving is not None
    assert [one.label for one in moving.strips[2:]] == ["sample 0", "sample 1", "sample 2"]


def test_forecasts_of_classes_have_the_outline_of_the_truth() -> None:
    truth = np.zeros((SIDE, SIDE, 3), np.uint8)
    truth[5:15, 5:15] = 200
    labels = Strip(label="label", alt="l", tiles=(truth,) * 5)
    moving = moving_panel(panel(labels, strip("sample 1", 2, 100)), times_s=TIMES_S)
    assert moving is not None
    assert moving.outlined
    label, sample = moving.strips
    np.testing.assert_array_equal(label.tiles, labels.tiles)
    np.testing.assert_array_equal(sample.tiles[:3], labels.tiles[:3])
    np.testing.assert_array_equal(sample.tiles[4], outlined(np.full_like(truth, 110), truth))
    assert sample.tiles[4][5, 10].tolist() == [255] * 3  # on the edge
    assert sample.tiles[4][10, 10].tolist() == [110] * 3  # inside
    assert sample.tiles[4][0, 0].tolist() == [110] * 3  # outside


def test_a_panel_without_forecasts_does_not_move(small_page: Callable[..., str]) -> None:
    assert moving_panels([[panel(strip("truth", 5, 0))]], [TIMES_S]) == []
    assert '<figure class="film"' not in small_page([])


def test_a_panel_that_shows_the_past_is_chosen_over_one_that_does_not() -> None:
    labels = panel(strip("label", 1, 0), strip("sample 1", 2, 0))  # of the target alone
    features = panel(strip("truth", 5, 0), strip("sample 1", 2, 0))
    (moving,) = moving_panels([[], [labels], [features]], [TIMES_S])
    assert [one.label for one in moving.strips] == ["truth", "sample 1"]
    (moving,) = moving_panels([[labels]], [TIMES_S])
    assert [one.label for one in moving.strips] == ["label", "sample 1"]


def test_names_cannot_break_the_page_and_motion_can_be_refused(
    small_page: Callable[..., str],
) -> None:
    whole = panel(strip("truth", 5, 0), strip('best sample"><b>', 2, 0), strip("sample 1", 2, 0))
    page = small_page([], pictures=Pictures(moving=moving_panels([[whole]], [TIMES_S])))
    assert '<figure class="film"' in page
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(page)
    assert "b" not in tags
    assert "clip" not in tags
    assert "(prefers-reduced-motion: no-preference)" in page
    assert page.count('type="radio"') == 1 + len(TIMES_S)  # play, or one moment alone


def test_names_do_not_run_into_each_other_under_narrow_tiles() -> None:
    tiles = (np.zeros((SIDE, 5, 3), np.uint8),)
    strips = [Strip(label="a name of some length", alt="", tiles=tiles)] * 2
    (narrow,) = draw_moments(strips, ["now"], columns=2, first_future=1)
    assert narrow.width > 2 * 100
