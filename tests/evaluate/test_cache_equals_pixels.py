"""An evaluation from a cache gives the figures of one that makes its tokens from the images."""

import argparse
import runpy
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "evaluation.py"


def test_evaluation_from_the_cache_equals_evaluation_from_pixels(tmp_path: Path) -> None:
    measure = runpy.run_path(str(PROGRAM), run_name="benchmark")["measure"]
    arguments = argparse.Namespace(targets=1, frame_size=48, num_samples=3, small=True)
    figures = measure(tmp_path, arguments)
    assert figures["largest_relative_difference"] < 1e-6
    for name in ("bounds", "all_rows"):
        assert figures[name]["from_cache_s"] > 0
        assert figures[name]["from_pixels_s"] > 0
