"""The extraction benchmark runs, and gives the figures that it promises."""

import json
import runpy
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "extraction.py"


def test_extraction_benchmark_gives_its_figures(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--videos", str(tiny_inputs / "world" / "train"), "--backbone", "small"]
    words += ["--json", str(tmp_path / "result.json"), "--limit", "2", "--frame-size", "32"]
    words += ["--forward-seconds", "0.1", "--workers", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["extraction.py", *words])
    runpy.run_path(str(PROGRAM), run_name="__main__")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["clips"], result["frames"], result["frame_size"]) == (2, 128, 32)
    assert result["device"].endswith("threads")
    assert result["slowest_stage"]
    ratio = result["frames_per_s"] / result["forward_frames_per_s"]
    assert result["end_to_end_over_forward"] == pytest.approx(ratio)
