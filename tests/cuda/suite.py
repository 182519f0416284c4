"""A part of the ordinary tests on the pretended device, and a table of what was found.

    python tests/cuda/suite.py tests/train tests/extract/test_run.py
    python tests/cuda/suite.py --json runs/cuda.json --bfloat16 tests/evaluate -k forecast

What asks for the CPU, or for nothing, computes on cuda:0. `auto` stays float32, so that tests which
compare numbers go on comparing them; with --bfloat16 it is what it is on a GPU. A right test may
fail here: one that hands CPU tensors to a model, or calls numpy() on a result, would on a GPU too.
Not part of `make test`. The JSON has, for every test: outcome, problems, waits, launches.
"""

import argparse
import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from pretended import PretendedDevice, pretend_cuda


class OnCuda:
    """A plugin of pytest: runs every test on a pretended device of its own."""

    def __init__(self, *, bfloat16: bool) -> None:
        self.bfloat16 = bfloat16
        self.runs: dict[str, dict[str, Any]] = {}

    @pytest.fixture(autouse=True, scope="session")
    def _everything_on_cuda(self) -> Iterator[None]:
        from deltatok.extract.backbone import Backbone
        from deltatok.shards import devices

        for room in ("extract", "train", "evaluate", "shards", "pipeline"):
            importlib.import_module(f"deltatok.pipeline.commands.{room}")
        choose, load = devices.choose_device, Backbone.load.__func__  # type: ignore[attr-defined]

        def chosen(name: str, **kwargs: Any) -> torch.device:
            return choose("cuda" if name in ("cpu", "auto") else name, **kwargs)

        def loaded(cls: Any, name: str, *, device: Any = "cpu", **kwargs: Any) -> Backbone:
            there = "cuda:0" if str(device) == "cpu" else device
            return load(cls, name, device=there, **kwargs)

        def precision(name: str, device: torch.device) -> str:
            return "float32" if name == "auto" else name

        with pytest.MonkeyPatch.context() as patch:
            for module in [m for n, m in sys.modules.items() if n.startswith("deltatok.")]:
                if hasattr(module, "choose_device"):
                    patch.setattr(module, "choose_device", chosen)
                if hasattr(module, "precision_name") and not self.bfloat16:
                    patch.setattr(module, "precision_name", precision)
            patch.setattr(Backbone, "load", classmethod(loaded))
            yield

    @pytest.fixture(autouse=True)
    def _pretended(self, request: pytest.FixtureRequest) -> Iterator[PretendedDevice]:
        with pretend_cuda() as device:
            yield device
        counts = device.counts
        self.runs.setdefault(request.node.nodeid, {}).update(
            problems=dict(Counter(device.problems)), **counts.table()
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        run = self.runs.setdefault(report.nodeid, {})
        if report.when == "call" or report.outcome != "passed":
            run["outcome"] = report.outcome
            if report.outcome == "failed":
                run["error"] = str(report.longrepr).strip().splitlines()[-1][:300]

    def table(self) -> dict[str, Any]:
        """All runs, and their sums."""
        waits: Counter[str] = Counter()
        problems: Counter[str] = Counter()
        for run in self.runs.values():
            problems.update(run.get("problems", {}))
            for row in run.get("waits", ()):
                waits[f"{row['what']} at {row['line']}"] += int(row["per_step"])
        return {
            "outcomes": Counter(run.get("outcome", "none") for run in self.runs.values()),
            "problems": problems,
            "waits": dict(waits.most_common()),
            "tests": self.runs,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("suite.json"))
    parser.add_argument("--bfloat16", action="store_true", help="auto is bfloat16, as on a GPU")
    known, words = parser.parse_known_args()
    plugin = OnCuda(bfloat16=known.bfloat16)
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--tb=line", *words], plugins=[plugin])
    known.json.parent.mkdir(parents=True, exist_ok=True)
    known.json.write_text(json.dumps(plugin.table(), indent=1) + "\n", encoding="utf-8")
    print(f"the table is in {known.json}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
