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
    Cell,
    draw_moments,
    moving_panel,
    moving_panels,
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
    pictures = moments(moving.gif)
    assert len(pictures) == 5
    for i in range(3):  # all cells show the truth
        assert [cell(pictures[i], column) for column in range(3)] == pytest.approx(
            [50 + 10 * i] * 3, abs=4
        )
    shown = [cell(pictures[4], column) for column in range(3)]
    assert shown == pytest.approx([90, 210, 160], abs=4)  # truth, best, sample
    with Image.open(io.BytesIO(moving.still[0])) as still:
        assert [cell(still.convert("RGB"), column) for column in range(3)] == pytest.approx(
            shown, abs=4
        )


def test_the_text_names_what_is_shown_and_how_it_ends() -> None:
    whole = panel(strip("truth", 5, 0), strip("sample 4", 2, 0), strip("spread of samples", 2, 0))
    moving = moving_panel(whole, times_s=TIMES_S)
    assert moving is not None
    assert "3 moments that are seen, then 2 of the future" in moving.alt
    assert "truth, sample 4" in moving.alt
    assert "About sample 4." in moving.alt
    assert "spread" not in moving.alt


def test_a_panel_without_forecasts_does_not_move(small_page: Callable[..., str]) -> None:
    assert moving_panels([[panel(strip("truth", 5, 0))]], [TIMES_S]) == []
    assert "Possible futures" not in small_page([])


def test_a_panel_that_shows_the_past_is_chosen_over_one_that_does_not() -> None:
    labels = panel(strip("label", 1, 0), strip("sample 1", 2, 0))  # of the target alone
    features = panel(strip("truth", 5, 0), strip("sample 1", 2, 0))
    (moving,) = moving_panels([[], [labels], [features]], [TIMES_S])
    assert "side by side: truth, sample 1" in moving.alt
    (moving,) = moving_panels([[labels]], [TIMES_S])
    assert "side by side: label, sample 1" in moving.alt


def test_names_cannot_break_the_page_and_motion_can_be_refused(
    small_page: Callable[..., str],
) -> None:
    whole = panel(strip("truth", 5, 0), strip('best sample"><b>', 2, 0), strip("sample 1", 2, 0))
    page = small_page([], pictures=Pictures(moving=moving_panels([[whole]], [TIMES_S])))
    assert "Possible futures" in page
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(page)
    assert "b" not in tags
    assert "clip" not in tags
    assert "(prefers-reduced-motion: reduce)" in page


def test_photographs_are_kept_small_on_the_page() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 60, (5, 112, 199, 3), dtype=np.uint8) + 90
    strips = [Strip(label="video", alt="v", tiles=tuple(noise))]
    strips += [Strip(label=f"sample {i}", alt="s", tiles=tuple(noise[3:])) for i in range(8)]
    moving = moving_panel(panel(*strips), times_s=TIMES_S)
    assert moving is not None
    assert moving.film[1] == "webp"
    assert len(moving.film[0]) < len(moving.gif)
    with Image.open(io.BytesIO(moving.film[0])) as film:
        assert getattr(film, "n_frames", 1) == 5
    plain = moving_panel(panel(strip("truth", 5, 0), strip("sample 1", 2, 0)), times_s=TIMES_S)
    assert plain is not None
    assert plain.film == (plain.gif, "gif")


def test_names_do_not_run_into_each_other_under_narrow_tiles() -> None:
    tiles = (np.zeros((SIDE, 5, 3), np.uint8),)
    cells = [Cell(label="a name of some length", tiles=tiles)] * 2
    (narrow,) = draw_moments(cells, ["now"], columns=2, first_future=1)
    assert narrow.width > 2 * 100
