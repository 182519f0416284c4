"""A part of the ordinary tests on the pretended device, and a table of what was found.

    python tests/cuda/suite.py tests/train tests/extract/test_run.py
    python tests/cuda/suite.py --json runs/cuda.json --bfloat16 tests/evaluate -k forecast

What asks for the CPU, or for nothing, computes on cuda:0. `auto` stays float32, so that tests which
compare numbers go on comparing them; with --bfloat16 it is what it is on a GPU. A right test may
fail here: one that hands CPU tensors to a model, or calls numpy() on a result, would on a GPU too.
Not part of `make test`. The JSON has, for every test: outcome, problems, training steps, and waits
and launches by line, a step where there were any (evaluations and checkpoints are in them).
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
        self.device: PretendedDevice
        self.steps = 0
        """Training steps of the test at hand."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Iterator[None]:
        """One device for the session, on which session fixtures may lie."""
        with pytest.MonkeyPatch.context() as patch, pretend_cuda() as self.device:
            self._send_to_cuda(patch)
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Counts what belongs to one test."""
        self.steps, before = 0, len(self.device.problems)
        self.device.counts.clear()
        result = yield
        self.runs.setdefault(item.nodeid, {}).update(
            problems=dict(Counter(self.device.problems[before:])),
            steps=self.steps,
            **self.device.counts.table(steps=max(1, self.steps)),
        )
        return result

    def _send_to_cuda(self, patch: pytest.MonkeyPatch) -> None:
        for room in ("extract", "train", "evaluate", "shards", "pipeline"):
            importlib.import_module(f"deltatok.pipeline.commands.{room}")
        # Not before: pytest rewrites the assertions of what its plugins are made of.
        from deltatok.extract.backbone import Backbone
        from deltatok.shards.running import devices
        from deltatok.train.engine import devices as train_devices
        from deltatok.train.engine.loop import Trainer

        fetch, choose = Trainer._fetch, devices.choose_device
        load = Backbone.load.__func__  # type: ignore[attr-defined]

        def fetched(trainer: Any, batches: Any) -> Any:
            self.steps += 1
            return fetch(trainer, batches)

        def chosen(name: str, **kwargs: Any) -> torch.device:
            return choose("cuda" if name in ("cpu", "auto") else name, **kwargs)

        def loaded(cls: Any, name: str, *, device: Any = "cpu", **kwargs: Any) -> Any:
            there = "cuda:0" if str(device) == "cpu" else device
            return load(cls, name, device=there, **kwargs)

        def precision(name: str, device: torch.device) -> str:
            return "float32" if name == "auto" else name

        def accelerator(device: str, precision: str) -> Any:
            return accelerate("auto" if device == "cpu" else device, precision)

        accelerate = train_devices.make_accelerator
        others = {"choose_device": chosen, "make_accelerator": accelerator}
        if not self.bfloat16:
            others["precision_name"] = precision
        for module in [m for n, m in sys.modules.items() if n.startswith("deltatok.")]:
            for name, other in others.items():
                if hasattr(module, name):
                    patch.setattr(module, name, other)
        patch.setattr(Backbone, "load", classmethod(loaded))
        patch.setattr(Trainer, "_fetch", fetched)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        run = self.runs.setdefault(report.nodeid, {})
        if report.when == "call" or report.outcome != "passed":
            run["outcome"] = report.outcome
            if report.outcome == "failed":
                run["error"] = str(report.longrepr).strip().splitlines()[-1][:300]

    def table(self) -> dict[str, Any]:
        """All runs, and their sums."""
        waits: Counter[str] = Counter()
        launches: dict[str, float] = {}
        problems: Counter[str] = Counter()
        for name, run in self.runs.items():
            problems.update(run.get("problems", {}))
            for row in run.get("waits", ()):
                waits[f"{row['what']} at {row['line']}"] += round(
                    row["per_step"] * max(1, run["steps"])
                )
            if run.get("steps"):
                launches[name] = run["launches_per_step"]
        return {
            "outcomes": Counter(run.get("outcome", "none") for run in self.runs.values()),
            "problems": problems,
            "waits": dict(waits.most_common()),
            "launches_per_step": launches,
            "tests": {name: _short(run) for name, run in self.runs.items()},
        }


def _short(run: dict[str, Any]) -> dict[str, Any]:
    """Without the lines, where nothing was trained."""
    lines = ("waits", "copies", "launches")
    return {name: value for name, value in run.items() if run.get("steps") or name not in lines}


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
