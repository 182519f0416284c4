r"""Proves and times everything on one GPU, without a network, in --minutes (`make gpu`).

    python tests/gpu/run.py                                  the GPU; writes beside this file
    python tests/gpu/run.py --out DIR --only parity world    elsewhere, some sections
    python tests/gpu/run.py --device cpu --out DIR           the dry form: everything small

Needs a checkout and a Python with torch 2.10 or newer, numpy, transformers, accelerate,
safetensors, psutil, pyyaml and pytest; the project need not be installed. What else a section needs
(av for videos; zarr, numcodecs, google-crc32c, webdataset for caches) is looked for, and the
section or test skipped by the package's name. They install beside any torch:

    pip install --no-deps --target DIR 'av<19' zarr numcodecs google-crc32c donfig \
        webdataset braceexpand
    PYTHONPATH=DIR python tests/gpu/run.py

A section is a process of its own with a part of the minutes: one that fails, hangs or kills its
context is reported, and the others run. Exit code 1 if one failed or was out of time.

OUT/report.json          device, driver, versions; every section's tests and figures
OUT/REPORT.md            the same for people
OUT/trace-NAME.json.gz   ten steps each, for chrome://tracing or Perfetto

A report made on a CPU says `dry`: its figures are of toy sizes and are shown nowhere else.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TESTS = "tests/gpu"
LAST_LINES = 30
"""Of what a failed section said, in the report."""


class Section(NamedTuple):
    """A process."""

    share: float
    """Of the minutes (a guess, about seconds)."""
    pytest: tuple[str, ...] = ()
    """Arguments of pytest; none: a function of timings.py."""


ARITHMETICS = tuple(f"--arithmetic={name}" for name in ("float32", "tf32", "bfloat16"))
SECTIONS = {
    "parity": Section(30, ("tests/parity/test_parity_models.py", *ARITHMETICS)),
    "pixels and features": Section(50, (f"{TESTS}/test_extraction.py",)),
    "best of many": Section(25, (f"{TESTS}/test_selection.py",)),
    "training": Section(90, (f"{TESTS}/test_training.py",)),
    "backbone": Section(25),
    "world": Section(30),
    "selection": Section(30),
    "tokenizer": Section(60),
    "extraction": Section(60),
    "traces": Section(50),
    "compiled": Section(80),
}


class Recorder:
    """A plugin of pytest: a line of JSON for every test, as soon as it is done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        figures = dict(report.user_properties) if report.when == "teardown" else {}
        if not (report.when == "call" or report.outcome != "passed" or figures):
            return
        line = {"name": report.nodeid.rpartition("::")[2], "figures": figures}
        if report.when == "call" or report.outcome != "passed":
            line["outcome"] = report.outcome
        if report.outcome == "skipped":
            line["reason"] = str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.outcome == "failed":
            line["reason"] = str(report.longrepr).strip()[-1500:]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run_section(name: str, *, device: str, out: Path, lines: Path) -> int:
    """In a process of its own: writes `lines`, one of JSON a test, or one with all figures."""
    section = SECTIONS[name]
    if section.pytest:
        import pytest

        # Other versions warn of other things: that is not what is proved here.
        words = [
            "-q",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            "-W",
            "default",
            f"--device={device}",
        ]
        words += [f"--rootdir={ROOT}", *section.pytest]
        return int(pytest.main(words, plugins=[Recorder(lines)]))
    sys.path.append(str(HERE))
    import timings

    with TemporaryDirectory() as folder:
        figures = timings.measure(name, device=device, folder=Path(folder), out=out)
    lines.write_text(json.dumps({"figures": figures}) + "\n", encoding="utf-8")
    return 0


def begin_section(
    name: str, command: list[str], *, folder: Path, limit_s: float, env: dict[str, str]
) -> dict[str, Any]:
    """Runs the command of a section; what became of it: status, seconds, tests or figures, and its
    last words if it failed."""
    lines, said = folder / "lines", folder / "said"
    began_s = time.monotonic()
    with said.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--lines", str(lines)],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it started
                process.wait()
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    text = said.read_text(encoding="utf-8", errors="replace")
    found: dict[str, Any] = {
        "status": "passed" if code == 0 else "failed",
        "seconds": round(time.monotonic() - began_s, 1),
        "limit_s": round(limit_s, 1),
    }
    if SECTIONS[name].pytest:
        found["tests"] = _by_test(rows)
        if code == 0 and all(test["outcome"] == "skipped" for test in found["tests"].values()):
            found["status"] = "skipped"
    elif rows:
        found["figures"] = rows[0]["figures"]
    missing = [line for line in text.splitlines() if line.startswith("ModuleNotFoundError")]
    if code is None:
        found["status"] = "out of time"
    elif code != 0 and missing:
        found |= {"status": "skipped", "reason": missing[-1].partition(": ")[2]}
    if found["status"] in ("failed", "out of time"):
        found["said"] = text.splitlines()[-LAST_LINES:]
    return found


def _by_test(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """name -> outcome, reason, figures."""
    tests: dict[str, dict[str, Any]] = {}
    for row in rows:
        test = tests.setdefault(row["name"], {"outcome": "passed", "figures": {}})
        test["figures"] |= row["figures"]
        if row.get("outcome", "passed") != "passed":
            test |= {"outcome": row["outcome"], "reason": row["reason"]}
    return tests


def describe(device: str) -> dict[str, Any]:
    """What the report begins with."""
    import torch

    names = ("numpy", "transformers", "accelerate", "triton", "zarr", "av", "webdataset")
    versions = {name: _version(name) for name in names}
    found: dict[str, Any] = {
        "device": f"{platform.machine()} cpu",
        "dry": True,
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": _said(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "versions": {name: version for name, version in versions.items() if version},
        "not_installed": [name for name, version in versions.items() if not version],
    }
    if device == "cuda":
        place = torch.device(device)
        driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {
            "device": torch.cuda.get_device_name(place),
            "dry": False,
            "memory_gb": torch.cuda.get_device_properties(place).total_memory / 1e9,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(place))),
            "cudnn": torch.backends.cudnn.version(),
            "driver": _said(driver),
        }
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said(words: list[str]) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(folder: Path) -> dict[str, str]:
    """Of the sections: deltatok is this tree, with a version, installed or not."""
    (folder / "deltatok").symlink_to(ROOT)
    metadata = folder / "deltatok-0.dist-info" / "METADATA"
    if _version("deltatok") is None:
        metadata.parent.mkdir()
        metadata.write_text("Metadata-Version: 2.1\nName: deltatok\nVersion: 0\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def write(report: dict[str, Any], out: Path) -> None:
    """report.json and REPORT.md."""
    sys.path.append(str(HERE))
    from page import markdown

    text = json.dumps(report, indent=1)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    (out / "REPORT.md").write_text(markdown(report), encoding="utf-8")


def run_all(arguments: argparse.Namespace) -> int:
    """All sections that are asked for, each within its share of the time that is left."""
    until_s = time.monotonic() + 60 * arguments.minutes
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    report = {**describe(arguments.device), "sections": {}}
    names = [name for name in SECTIONS if name in (arguments.only or SECTIONS)]
    with TemporaryDirectory() as folder:
        env = environment(Path(folder))
        unit_s = 60 * arguments.minutes / sum(SECTIONS[name].share for name in names)
        for number, name in enumerate(names):
            # Half of what the later ones are to have, at least, is left to them.
            later = sum(SECTIONS[other].share for other in names[number + 1 :])
            limit_s = max(1.0, until_s - time.monotonic() - later * unit_s / 2)
            (work := Path(folder) / str(number)).mkdir()
            print(f"{name} (at most {limit_s:.0f} s) ...", end=" ", flush=True)
            command = [sys.executable, __file__, "--section", name, "--out", str(out)]
            command += ["--device", arguments.device]
            found = begin_section(name, command, folder=work, limit_s=limit_s, env=env)
            report["sections"][name] = found
            print(f"{found['status']} in {found['seconds']:.0f} s", flush=True)
            write(report, out)
    print(f"the report is in {out / 'REPORT.md'}")
    states = [found["status"] for found in report["sections"].values()]
    return int(any(state in ("failed", "out of time") for state in states))


def main() -> int:
    """See above; 2 where there is no such device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the dry form [cuda]"
    )
    parser.add_argument("--out", type=Path, help=f"folder of the report [{TESTS}]")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections [8]")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections [all]")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is seen here (the dry form: --device cpu --out DIR)")
    if arguments.out is None:
        if arguments.device == "cpu":
            parser.error("--device cpu wants --out: tests/gpu holds a GPU's report")
        arguments.out = HERE
    if arguments.section:
        return run_section(
            arguments.section,
            device=arguments.device,
            out=arguments.out,
            lines=arguments.lines,
        )
    return run_all(arguments)


if __name__ == "__main__":
    sys.exit(main())
