"""The page of a report as headless Chromium renders it: wide and narrow, light and dark."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from deltatok.evaluate.compare import CompareConfig, run_compare
from deltatok.evaluate.forecast.run import run_forecast

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT_S = 60.0
WIDE, NARROW = 1280, 390

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, NAMES)),
    reason="no Chromium here (Debian: apt-get install chromium): pages are not rendered",
)


class Browser:
    """Headless Chromium, spoken to through two pipes (its DevTools protocol, JSON and zeros)."""

    def __init__(self, profile: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        program = next(filter(None, map(shutil.which, NAMES)))
        flags = "--headless=new --remote-debugging-pipe --disable-gpu --no-first-run --no-sandbox"
        flags += " --disable-dev-shm-usage --disable-extensions --disable-component-update"
        command = f'exec "$0" {flags} --user-data-dir="$1" about:blank 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, program, str(profile)],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._number = 0
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._write)  # Chromium ends when its pipe does
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that come meanwhile are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(method)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, page: Path, *, width: int, scheme: str, motion: str = "no-preference") -> None:
        """Load a page in a window of that width, until all of it is there; unfold all of it."""
        height, mobile = 900, width < 600
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next("load"))
        self.ask("document.querySelectorAll('details').forEach(x => { x.open = true })")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def _next(self, what: str) -> dict[str, Any]:
        end = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"Chromium did not answer {what} within {TIMEOUT_S:g} s"
            more = os.read(self._read, 2**16)
            assert more, f"Chromium ended at {what}"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@pytest.fixture(scope="module")
def page(shared_evaluation: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every kind of section, and names that are too long for a phone."""
    root = tmp_path_factory.mktemp("chromium")
    run = root / ("a-run-with-a-name-that-does-not-fit-on-any-phone-" * 2)
    run.mkdir()
    (run / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 9, "loss": 0.5}\n')
    run_forecast(
        shared_evaluation.config(
            out=str(root / "out"),
            dataset="vspw",  # of which the paper has rows, of another protocol
            num_pictures=2,
            curves=(str(run),),
            class_names=("sky", "a-class-of-many-letters-without-any-space-" * 3),
        )
    )
    return root / "out" / "report.html"


@pytest.fixture(scope="module")
def comparison(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three reports side by side; that they are the same one changes nothing for the page."""
    reports, out = (str(page.parent),) * 3, tmp_path_factory.mktemp("comparison")
    run_compare(CompareConfig(reports=reports, out=str(out), names=("one", "other", "a-third")))
    return out / "compare.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module", params=[WIDE, NARROW])
def width(request: pytest.FixtureRequest, browser: Browser, page: Path) -> int:
    """The page lies open in this width."""
    browser.open(page, width=request.param, scheme="light")
    return int(request.param)


def test_nothing_is_wider_than_the_window(width: int, browser: Browser) -> None:
    assert browser.ask("window.innerWidth") == width
    assert browser.ask("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll('img, h1, h2, h3, p, figure, .panel, li')]
        .filter(x => !x.closest('.wide, .view') && x.getBoundingClientRect().right > innerWidth + 1)
        .map(x => x.outerHTML.slice(0, 80))"""
    assert browser.ask(outside) == []


def test_no_console_message_and_no_request(width: int, browser: Browser, page: Path) -> None:
    methods = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert [event for event in browser.events if event.get("method") in methods] == []
    urls = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert [url for url in urls if not url.startswith("data:")] == [page.as_uri()]


def test_every_picture_is_shown_and_has_a_text(width: int, browser: Browser) -> None:
    pictures = browser.ask(
        "[...document.images].map(x => [x.complete && x.naturalWidth > 0 && x.clientWidth > 0, "
        "x.alt.trim().length > 0])"
    )
    assert len(pictures) > 20
    assert pictures == [[True, True]] * len(pictures)


def test_the_first_screen_shows_what_happened(width: int, browser: Browser) -> None:
    box = "document.querySelector('.film').getBoundingClientRect()"
    assert browser.ask(f"{box}.bottom + scrollY") <= 900
    tiles = browser.ask("[...document.querySelectorAll('.view')].map(x => x.clientWidth)")
    assert min(tiles) > (128 if width == WIDE else 100)
    if width == WIDE:
        panels = browser.ask(
            "[...document.querySelectorAll('.panel img')].map(x => "
            "x.clientWidth / getComputedStyle(x).getPropertyValue('--tiles'))"
        )
        assert min(panels) >= 128


def test_pictures_move_without_a_script_and_stop_where_one_chooses(
    width: int, browser: Browser
) -> None:
    shown = """(() => {
        const image = document.querySelector('.film .view img');
        const box = image.getBoundingClientRect();
        const view = image.parentElement.getBoundingClientRect();
        return Math.round((view.left - box.left) / view.width * 100) / 100;
    })()"""
    moving = "document.querySelector('.film .view img').getAnimations()"
    seen = set()
    for share in (0.0, 0.15, 0.35, 0.55, 0.95):
        browser.ask(
            f"{moving}.forEach(x => {{ x.pause(); x.currentTime = {share} * "
            "x.effect.getComputedTiming().duration })"
        )
        seen.add(browser.ask(shown))
    assert seen == {0, 1, 3, 5, 6}
    browser.ask("document.querySelector('.film [value=\"2\"]').click()")
    assert browser.ask(f"{moving}.length") == 0
    assert browser.ask(shown) == 2
    browser.ask("document.querySelector('.film [value=play]').click()")
    assert browser.ask(f"{moving}.length") == 1


def test_who_wants_no_motion_sees_the_last_moment(browser: Browser, page: Path) -> None:
    browser.open(page, width=WIDE, scheme="light", motion="reduce")
    assert browser.ask("document.getAnimations().length") == 0
    assert browser.ask(
        "getComputedStyle(document.querySelector('.film')).getPropertyValue('--at')"
    ) == browser.ask(
        "getComputedStyle(document.querySelector('.film')).getPropertyValue('--steps')"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_its_ground(browser: Browser, page: Path, scheme: str) -> None:
    browser.open(page, width=NARROW, scheme=scheme)
    colours = browser.ask(
        """[...document.querySelectorAll('h1, p, td, th, summary, pre, figcaption, li, .name, '
            + '.clock span, .clock label:not(:has(:checked)), .places strong, .places small')]
        .map(x => {
            let ground = x;
            const seen = y => getComputedStyle(y).backgroundColor;
            while (ground && seen(ground) === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
            return [getComputedStyle(x).color, ground ? seen(ground) : 'rgb(255, 255, 255)'];
        })"""
    )
    assert len(colours) > 50
    dark = [_luminance(ground) < 0.2 for _, ground in colours]
    assert all(dark) if scheme == "dark" else not any(dark)
    for ink, ground in colours:
        low, high = sorted((_luminance(ink), _luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)  # WCAG AA


def test_a_comparison_fits_a_phone_too(browser: Browser, comparison: Path) -> None:
    browser.open(comparison, width=NARROW, scheme="dark")
    assert browser.ask("document.documentElement.scrollWidth") <= NARROW
    assert browser.ask("[...document.images].every(x => x.naturalWidth && x.alt.trim())")


def test_a_screenshot_is_not_empty(browser: Browser, page: Path) -> None:
    browser.open(page, width=WIDE, scheme="light")
    assert len(browser.screenshot()) > 30_000


def _luminance(colour: str) -> float:
    """Relative luminance (WCAG) of rgb(r, g, b)."""
    numbers = [float(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in numbers]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
