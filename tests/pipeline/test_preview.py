"""deltatok-shards preview: what is on the page, and that it stands alone."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deltatok.pipeline import preview
from deltatok.pipeline.commands.shards import main
from deltatok.pipeline.preview import choose_windows, frame_strips
from deltatok.shards import DeltaShards, PatchShards, UsageError
from deltatok.shards.files import size_text


class Page(HTMLParser):
    """The images of a page, its headings, and every address it names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.headings: list[str] = []
        self.addresses: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag
        known = dict(attrs)
        if tag == "img":
            self.images.append(known)
        self.addresses += [known[name] or "" for name in ("src", "srcset", "href") if name in known]

    def handle_data(self, data: str) -> None:
        if self._in in ("h2", "h3") and data.strip():
            self.headings.append(data)


def write_page(folder: Path, out: Path, *words: str) -> str:
    assert main(["preview", str(folder), "--out", str(out), *words]) == 0
    return out.read_text()


@pytest.fixture(scope="module")
def pages(
    tiny_run: Path, tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """A page of both kinds of cache, two windows each, that of the patches with frames."""
    out = tmp_path_factory.mktemp("pages") / "page.html"
    videos = ["--videos", str(tiny_inputs / "world" / "train")]
    return {
        kind: write_page(tiny_run / kind, out, "--windows", "2", *words)
        for kind, words in (("patches", videos), ("deltas", []))
    }


def test_a_patch_page_shows_frames_tokens_and_change(pages: dict[str, str]) -> None:
    page = Page(pages["patches"])
    alts = [str(image["alt"]) for image in page.images]
    assert [alt.split()[0] for alt in alts] == 2 * ["Frames", "Tokens", "Change"] + ["2", "Token"]
    assert page.headings[:1] == ["Windows"]
    assert [heading[:2] for heading in page.headings[1:3]] == ["1.", "2."]
    assert page.headings[3:] == ["Times", "Norms"]


def test_a_delta_page_shows_tokens_and_norms(pages: dict[str, str]) -> None:
    page = Page(pages["deltas"])
    alts = [str(image["alt"]) for image in page.images]
    assert sum(alt.startswith("Tokens of window") for alt in alts) == 2
    assert sum("Distance from the average" in alt for alt in alts) == 2
    assert page.headings[-2:] == ["Times", "Norms"]
    assert "first tokens, from black: median" in " ".join(alts)


@pytest.mark.parametrize("kind", ["patches", "deltas"])
def test_a_page_stands_alone_and_every_picture_has_words(pages: dict[str, str], kind: str) -> None:
    page = Page(pages[kind])
    assert all(image["alt"] for image in page.images)
    assert page.addresses
    inside = ("data:image/png;base64,", "data:image/webp;base64,")
    assert all(address.startswith(inside) for address in page.addresses)
    assert "prefers-color-scheme: dark" in pages[kind]
    assert 'name="viewport"' in pages[kind]
    assert "<script" not in pages[kind]


@pytest.mark.parametrize("kind", ["patches", "deltas"])
def test_what_the_cache_is_stands_below_the_pictures(pages: dict[str, str], kind: str) -> None:
    text = pages[kind]
    assert text.rindex("<img") < text.index("fingerprint")
    assert re.search(r"<td>size</td><td>[\d.]+ [kM]B</td>", text)


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (25_206_062, "25.2 MB")]
)
def test_sizes_are_as_people_write_them(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text


def test_a_png_is_one_picture(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    assert main(["preview", str(tiny_run / "patches"), "--out", str(out), "--windows", "1"]) == 0
    image = Image.open(io.BytesIO(out.read_bytes()))
    assert image.width > 900
    assert len(image.reduce(8).getcolors(2**20) or []) > 50


def test_the_seed_chooses_the_windows(tiny_run: Path) -> None:
    reader = PatchShards(tiny_run / "patches")
    chosen = [choose_windows(reader, 2, seed=seed) for seed in (0, 0, 5)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_the_same_preview_has_the_same_bytes(
    pages: dict[str, str], tiny_run: Path, tmp_path: Path
) -> None:
    again = write_page(tiny_run / "deltas", tmp_path / "a.html", "--windows", "2")
    assert again == pages["deltas"]


def test_windows_are_of_different_clips_as_long_as_there_are_some(tiny_run: Path) -> None:
    reader = DeltaShards(tiny_run / "deltas")
    num_clips = len(reader.keys)
    for seed in range(5):
        chosen = choose_windows(reader, num_clips, seed=seed)
        assert len(np.unique(reader.clip_index[chosen])) == num_clips
    everything = choose_windows(reader, 99, seed=0)
    assert everything == list(range(len(reader)))


def test_frames_are_cropped_and_flipped_as_for_the_backbone(
    tiny_run: Path, tiny_inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = PatchShards(tiny_run / "patches")
    seen: list[np.ndarray] = []

    def keep(tile: np.ndarray, *, aspect: float, smooth: bool) -> np.ndarray:
        seen.append(tile)
        return tile

    monkeypatch.setattr(preview, "resize_tile", keep)
    frame = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    monkeypatch.setattr(preview, "read_frames", lambda clip, indices: [frame for _ in indices])
    for window in range(len(reader)):
        seen.clear()
        frame_strips(reader, [window], [str(tiny_inputs / "world" / "train")])
        top, left, height, width = reader.crop[window].astype(int)
        wanted = frame[top : top + height, left : left + width]
        wanted = wanted[:, ::-1] if reader.flipped[window] else wanted
        for tile in seen:
            np.testing.assert_array_equal(tile, wanted)
        assert len(seen) == reader.shape[0]
    assert reader.flipped.any()
    assert not reader.flipped.all()


def test_names_of_clips_cannot_write_into_the_page(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = DeltaShards.window

    def hostile(self: DeltaShards, index: int) -> dict[str, Any]:
        return plain(self, index) | {"clip": '"><script>alert(1)</script>'}

    monkeypatch.setattr(DeltaShards, "window", hostile)
    text = write_page(tiny_run / "deltas", tmp_path / "a.html", "--windows", "1")
    assert "<script" not in text
    assert re.search(r"&lt;script&gt;alert", text)


def test_refusals_say_what_is_wanted(
    tiny_run: Path, tiny_inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, out = str(tiny_run / "patches"), str(tmp_path / "a.html")
    other = str(tiny_inputs / "world" / "val")
    for words, code, said in (
        ([cache, "--out", str(tmp_path / "a.pdf")], 2, "ends with .html or .png"),
        ([cache, "--out", str(tmp_path / "none" / "a.png")], 2, "there is no folder"),
        ([cache, "--out", out, "--windows", "0"], 2, "wanted 1 or more"),
        ([cache, "--out", out, "--videos", other], 2, "none of the clips shown is among them"),
        ([str(tmp_path), "--out", out], 4, "not a deltatok cache"),
    ):
        assert main(["preview", *words]) == code
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_cache_without_windows_has_nothing_to_show(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeltaShards, "num_windows", 0)
    with pytest.raises(UsageError, match="has no windows to show"):
        choose_windows(DeltaShards(tiny_run / "deltas"), 2, seed=0)
