"""The README says what the committed figures say, and its commands exist."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED_PAGE = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MEASURED = [  # the start of a row; its JSON; keys and format of every ratio in it
    ("delta loader", "loaders.json", (("loader_over_memory", ".2f"),)),
    ("cold files", "loaders.json", (("stream_cold_over_sequential_read", ".2f"),)),
    (
        "patch loader over",
        "loaders.json",
        (("patches_256/loader_over_memmap", ".2f"), ("patches_1024/loader_over_memmap", ".2f")),
    ),
    (
        "random pairs over",
        "loaders.json",
        (
            ("patches_256/random_pairs_over_memmap", ".2f"),
            ("patches_1024/random_pairs_over_memmap", ".2f"),
        ),
    ),
    (
        "a patch shard as one zip",
        "zip.json",
        (
            ("wall/pairs_per_s/zip_over_folder", ".2f"),
            ("wall/write_shard_s/zip_over_folder", ".2f"),
            ("wall/open_s/zip_over_folder", ".2f"),
            ("wall/verify_s/zip_over_folder", ".2f"),
        ),
    ),
    (
        "`--engine ray` over",
        "fleet.json",
        (("over_one_process/1 actor", ".2f"), ("over_one_process/2 actors", ".2f")),
    ),
    (
        "frames from a decoding",
        "transport.json",
        (("memory_over_copy/rate", ".2f"), ("socket_over_copy/rate", ".2f")),
    ),
    ("extraction end", "extraction.json", (("end_to_end_over_forward", ".2f"),)),
    ("the same with 4", "extraction_4_windows.json", (("end_to_end_over_forward", ".2f"),)),
    (
        "training a window",
        "training.json",
        (("seconds_ratio", ".0f"), ("flops_ratio", ".0f")),
    ),
    ("tokenizer steps", "training.json", (("tokenizer_over_memory", ".2f"),)),
    ("search for the best", "selection.json", (("selection_speedup", ".1f"),)),
    ("the same on two threads", "training.json", (("selection_speedup", ".1f"),)),
    ("the search in bfloat16", "selection.json", (("selection_finalists_speedup", ".1f"),)),
    (
        "planned over",
        "plan.json",
        (("plan_bytes_over_written", ".2f"), ("plan_hours_over_clock", ".2f")),
    ),
]


@pytest.fixture(scope="module")
def readme() -> Any:
    """tests/benchmarks/readme.py."""
    path = ROOT / "tests" / "benchmarks" / "readme.py"
    spec = importlib.util.spec_from_file_location("readme", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_quickstart_table_is_the_one_of_the_committed_figures(readme: Any) -> None:
    figures = json.loads(readme.FIGURES.read_text(encoding="utf-8"))
    assert readme.BEGIN + readme.section(figures) + readme.END in README


def test_gpu_figures_are_those_of_the_committed_report_of_a_gpu(readme: Any) -> None:
    text = readme.page.measured(readme.page.read_report())
    assert readme.GPU_BEGIN + text + readme.GPU_END in MEASURED_PAGE


def test_only_a_report_made_on_a_gpu_gives_figures(readme: Any) -> None:
    rate = {"pairs_per_s": 1000.0, "tflop_per_s": 400.0, "peak_memory_gb": 70.0}
    names = {config: rate for _, _, config in readme.page.STAGES}
    report = {
        "device": "some GPU",
        "dry": False,
        "made": "2026-01-02T03:04+00:00",
        "torch": "2.10.0",
        "cuda": "13.0",
        "sections": {
            "tokenizer": {"figures": names},
            "world": {"figures": names},
            "selection": {"figures": {"variants": {"exact": {"256": {"speedup": 2.5}}}}},
        },
    }
    text = readme.page.measured(report)
    assert "On one some GPU (torch 2.10.0, CUDA 13.0, 2026-01-02;" in text
    assert "| steps of tokenizer/one-h200-256 | 1,000 pairs/s, 400 TFLOP/s, 70 GB |" in text
    assert "| best of 256, exact: speed over the plain form | 2.5 |" in text
    samples = 1024 * (1_000_000 + 500_000 + 2 * 50_000 + 300_000 + 5_000)
    assert f"(computed from the rates above) | {samples / 1000 / 3600:.0f} |" in text
    for none in (None, report | {"dry": True}):
        assert readme.page.measured(none) == readme.page.NOT_MEASURED


def test_the_picture_moves_and_is_small() -> None:
    path = ROOT / "docs" / "futures.gif"
    assert f"({path.relative_to(ROOT)})" in README
    assert path.stat().st_size < 400_000
    with Image.open(path) as picture:
        assert getattr(picture, "n_frames", 1) == 7


def test_the_two_commands_come_first_and_are_in_the_makefile() -> None:
    block = re.search(r"```\n(.*?)```", README, re.DOTALL)
    assert block is not None
    assert [line.split()[:2] for line in block[1].splitlines()] == [
        ["make", "quickstart"],
        ["make", "test"],
    ]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\nquickstart: setup\n" in makefile
    assert "\ntest: setup\n" in makefile


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_linked_files_and_sections_exist(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, section = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if section:
            titles = re.findall(r"(?m)^#+ (.*)$", target.read_text(encoding="utf-8"))
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert section in slugs, link


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    for page in PAGES[1:]:
        assert f"({page.relative_to(ROOT)})" in README


@pytest.mark.parametrize(("row", "file", "figures"), MEASURED, ids=lambda value: str(value)[:30])
def test_measured_ratios_are_those_of_the_json(
    row: str, file: str, figures: tuple[tuple[str, str], ...]
) -> None:
    measured = json.loads((ROOT / "tests" / "benchmarks" / file).read_text(encoding="utf-8"))
    found = []
    for path, shown in figures:
        value = measured
        for key in path.split("/"):
            value = value[key]
        found.append(format(value, shown))
    cells = [line.split("|") for line in MEASURED_PAGE.splitlines() if line.startswith(f"| {row}")]
    assert len(cells) == 1, f"rows that start with {row!r}: {len(cells)}"
    assert re.split(r"[,;] ", cells[0][2].strip()) == found


def test_the_readers_of_the_page_on_reading_run(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    (tmp_path / "cache").symlink_to(tiny_run)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        code = block.replace('splits="val", labels=["archery", "bowling"]', "")
        exec(code.replace("[0, 5, 9]", "[0, 1, 2]"), names)
    assert names["tokens"].shape[0] == names["z"].shape[0] == 3
    assert names["pairs"].shape[:2] == (len(names["windows"]), 2)


def test_the_python_example_runs(
    tiny_inputs: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "quickstart"
    run.mkdir(parents=True)
    for folder in (*tiny_inputs.iterdir(), *tiny_run.iterdir()):
        (run / folder.name).symlink_to(folder)
    code = block[1].replace("0038", "0001")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["futures"].tokens.shape == (20, 3, 16)
    again = names["state"].predict(horizon_s=0.6)
    assert torch.equal(again.tokens, names["futures"].tokens)
    assert (tmp_path / "futures.png").exists()
    assert (tmp_path / "my-world" / "tokenizer").is_dir()
