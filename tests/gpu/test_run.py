"""run.py works: its dry form from end to end, and what becomes of sections that fail or hang."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("run.py")


@pytest.fixture(autouse=True, scope="session")
def device() -> None:
    """None is needed."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """run.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu_run", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_dry_form_runs(tmp_path: Path) -> None:
    words = [sys.executable, str(PROGRAM), "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run([*words, "--minutes", "60"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (tmp_path / "REPORT.md").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["dry"]
    assert {section["status"] for section in report["sections"].values()} == {"passed"}
    reasons = [
        test["reason"]
        for section in report["sections"].values()
        for test in section.get("tests", {}).values()
        if test["outcome"] != "passed"
    ]
    assert set(reasons) <= {"needs a GPU"}
    page = (tmp_path / "REPORT.md").read_text()
    assert page.startswith("# ")
    assert "(dry: " in page.splitlines()[0]
    assert "GPU-hours" not in page
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.json",
        "REPORT.md",
        *(f"trace-{name}.json.gz" for name in ("extraction", "tokenizer", "world")),
    }


def test_a_section_that_fails_hangs_or_lacks_a_package_is_told(run: Any, tmp_path: Path) -> None:
    programs = {
        "failed": "print('before'); raise SystemExit('something broke')",
        "out of time": "import time; time.sleep(100)",
        "skipped": "import no_such_package",
    }
    for number, (status, program) in enumerate(programs.items()):
        (folder := tmp_path / str(number)).mkdir()
        found = run.begin_section(
            "world",
            [sys.executable, "-c", program],
            folder=folder,
            limit_s=2.0 if status == "out of time" else 100.0,
            env=dict(os.environ),
        )
        assert found["status"] == status
        if status == "failed":
            assert found["said"] == ["before", "something broke"]
        if status == "skipped":
            assert found["reason"] == "No module named 'no_such_package'"


def test_a_failed_section_fails_the_run_and_the_others_run(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(name: str, command: list[str], **_: Any) -> dict[str, Any]:
        return {"status": "failed" if name == "parity" else "passed", "seconds": 1.0}

    monkeypatch.setattr(run, "begin_section", begin)
    for only, code in ((["parity", "world"], 1), (["world"], 0)):
        words = ["run.py", "--device", "cpu", "--out", str(tmp_path), "--only", *only]
        monkeypatch.setattr(sys, "argv", words)
        assert run.main() == code
        report = json.loads((tmp_path / "report.json").read_text())
        assert list(report["sections"]) == only


def test_a_cpu_never_overwrites_the_report_of_a_gpu(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert "--device cpu wants --out" in capsys.readouterr().err
