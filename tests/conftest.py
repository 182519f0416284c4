"""For the whole suite: the --golden option, a check of which deltatok is being tested, what may be
skipped, and a writer of tiny evaluation caches."""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import deltatok
from deltatok.shards.sampling import SamplingPolicy

TREE = Path(__file__).resolve().parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: these models are too small for two

MAY_SKIP = (
    "no ../shared",  # real clips and labelled frames that are not part of the project
    "no real",
    "Could not load libtorchcodec",  # FFmpeg's libraries come from the system
    "is not installed where the GPU is",  # tests/gpu runs where only torch is installed
    "no Chromium here",
    "pip install deltatok[tensorboard]",  # an extra
    "pip install 'deltatok[cloud]'",  # an extra
    "pip install deltatok[ray]",  # an extra
    "needs a GPU",
    "needs a torch without CUDA",
    "C++ compiler",
    "no C compiler",
    "Linux",
)
"""What may be missing where the tests run: part of the reason of every skip that is allowed."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        action="append",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder of golden cases for tests/parity; may be given several times "
        "(default: tests/golden, and ../shared/golden where it is present)",
    )
    parser.addoption(
        "--device",
        default=None,
        help="where tests/gpu and the golden cases compute; cpu is tests/gpu's dry form "
        "(default: tests/gpu cuda, golden cases cpu)",
    )
    parser.addoption(
        "--arithmetic",
        action="append",
        choices=("float32", "tf32", "bfloat16"),
        default=None,
        help="of the golden cases; may be given several times (default: float32)",
    )


def pytest_report_header() -> str:
    """Say whether this tree or an installed wheel is tested; refuse any third thing."""
    imported = Path(deltatok.__file__).resolve().parent
    if imported == TREE:
        return f"deltatok: this tree, {imported}"
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    if imported.parent in installed:
        return f"deltatok: an installed wheel, {imported}"
    raise pytest.UsageError(
        f"the imported deltatok is {imported}, neither this tree ({TREE}) nor an installed wheel; "
        "install this tree with `pip install -e .`"
    )


class SkipCount:
    """Fails a session in which a test was skipped for another reason than those of MAY_SKIP."""

    def __init__(self) -> None:
        self.allowed: Counter[str] = Counter()
        self.others: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._add(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.others and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for reason, count in sorted(self.allowed.items()):
            terminalreporter.write_line(f"skipped {count}: {reason}")
        for line in self.others:
            terminalreporter.write_line(f"skipped, which fails: {line}", red=True)

    def _add(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        assert isinstance(report.longrepr, tuple)
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if any(part in reason for part in MAY_SKIP):
            self.allowed[reason] += 1
        else:
            self.others.append(f"{report.nodeid}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # with xdist the controller sees every report
        config.pluginmanager.register(SkipCount())


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Flushing 30 files a shard is most of the time of a little cache; no test pulls the plug."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def run_program(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """run_program(path, argument, ...): like subprocess.run, in a fork of a process that has
    imported torch (fork_server.py)."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("fork_server.py"))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
            program, *arguments = map(str, words)
            folder = tmp_path_factory.mktemp("said")
            files = [folder / "output", folder / "errors"]
            process.stdin.write(json.dumps([program, *map(str, files), *arguments]) + "\n")
            process.stdin.flush()
            status = int(process.stdout.readline())
            said = [file.read_text() for file in files]
            return subprocess.CompletedProcess(words, status, *said)

        yield run


@pytest.fixture(scope="session")
def write_evaluation_cache() -> Callable[..., dict[str, Any]]:
    """Writes an evaluation cache of random tokens and its labels; see `_write_evaluation_cache`."""
    return _write_evaluation_cache


def _write_evaluation_cache(
    folder: Path,
    labels: Path,
    *,
    kind: str = "segmentation",
    frame_shape: tuple[int, int] = (20, 34),
    label_shape: tuple[int, int] | None = None,
    sequences: tuple[str, ...] = ("a", "town/b"),
    num_targets: int = 2,
    num_frames: int = 7,
    num_classes: int = 4,
    hidden_size: int = 32,
    frame_size: int = 48,
    backbone: str = "aaaa",
    dataset: str = "tiny",
    seed: int = 0,
) -> dict[str, Any]:
    """`num_targets` targets of every sequence, two windows each (one if frames are square), in one
    shard; labels in `labels`/SEQUENCE/NNNNNN.png. Gives read_targets(folder).

    kind: segmentation (classes below num_classes and some 255) or depth (uint16, 256 a metre, some
    0). Times are those of 15 frames a second, a frame every 0.2 s.
    """
    import numpy as np
    from PIL import Image

    from deltatok.shards.cache import PATCHES, CacheInfo, CacheShape, finish_cache, open_cache
    from deltatok.shards.evaluation.geometry import compute_resize_sizes, square_corners
    from deltatok.shards.evaluation.labels import LabelRule, PlanTarget
    from deltatok.shards.evaluation.targets import read_targets
    from deltatok.shards.patches.writer import write_black, write_patch_shard
    from deltatok.shards.plan import PlanEntry, write_plan
    from deltatok.shards.windows import ShardRows

    rng = np.random.default_rng(seed)
    side = frame_size // 16
    shape = CacheShape(
        num_frames=num_frames, num_tokens=side**2, grid=(side, side), hidden_size=hidden_size
    )
    identity = {
        "backbone": {"config": {"hidden_size": hidden_size}, "weights_sha256": backbone},
        "preprocessing": {
            "frame_size": frame_size,
            "patch_size": 16,
            "image_mean": [0.5, 0.5, 0.5],
        },
        "sampling": {
            "policy": "evaluation",
            "dataset": dataset,
            "num_frames": num_frames,
            "num_context": min(4, num_frames - 1),
            "stride_s": 0.2,
            "fps": 15.0,
            "crops": "squares at both ends of the resized frame",
            "seed": 0,
        },
        "storage": {"dtype": "float16"},
        "autocast_dtype": "float32",
    }
    open_cache(folder, CacheInfo(format=PATCHES, identity=identity, shape=shape))
    height, width = label_shape or frame_shape
    entries, numbers = [], []
    for sequence in sequences:
        for number in range(19, 19 + 20 * num_targets, 20):
            key = f"{sequence}/{number:06d}"
            stored = rng.integers(0, num_classes, (-(-height // 4), -(-width // 4)))
            stored = stored.repeat(4, 0).repeat(4, 1)[:height, :width]
            stored[0] = 255
            if kind == "depth":
                stored = np.where(stored == 255, 0, 512 * (1 + stored)).astype(np.uint16)
            path = labels / f"{key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(stored.astype(np.uint16 if kind == "depth" else np.uint8)).save(path)
            rule = LabelRule(name="depth", steps_per_m=256.0) if kind == "depth" else LabelRule()
            target = PlanTarget(
                label=f"{key}.png",
                label_size=(height, width),
                kind="depth" if kind == "depth" else "segmentation",
                sequence=sequence,
                rule=rule,
            )
            entries.append(
                PlanEntry(key=key, source=key, size_bytes=1, shard=0, split="val", target=target)
            )
            numbers.append(number)
    write_plan(folder, entries)
    write_black(folder, rng.normal(size=(side**2, hidden_size)).astype(np.float32))
    resized = compute_resize_sizes(*frame_shape, frame_size)
    scale = np.array([*frame_shape, *frame_shape]) / np.array([*resized, *resized])
    crops = np.array([[*at, frame_size, frame_size] for at in square_corners(*resized)]) * scale
    clip = np.repeat(np.arange(len(entries)), len(crops))
    first = rng.normal(size=(len(clip), 1, side**2, hidden_size))
    drift = rng.normal(size=(len(clip), num_frames, side**2, hidden_size)).cumsum(axis=1)
    index = np.array(numbers)[clip][:, None] + 3 * np.arange(1 - num_frames, 1)
    rows = ShardRows(
        tokens=(first + 0.3 * drift).astype(np.float16),
        timestamps_s=(index / 15).astype(np.float32),
        frame_index=index.astype(np.int32),
        crop=np.tile(crops, (len(entries), 1)).astype(np.float32),
        flipped=np.zeros(len(clip), bool),
        clip=clip.astype(np.int32),
        keys=[entry.key for entry in entries],
    )
    write_patch_shard(folder, 0, rows, dtype="float16", seed=0)
    finish_cache(folder)
    return dict(read_targets(folder))


EditPlan = Callable[[Path, Callable[[list[Any]], object]], None]


@pytest.fixture(scope="session")
def edit_plan() -> EditPlan:
    """Gives edit_plan(folder, edit): `edit` changes the lines of the plan's only part, as parsed
    JSON; plan.json fits them then, and cache.json forgets its hash."""

    def write(folder: Path, edit: Callable[[list[Any]], object]) -> None:
        plan = json.loads((folder / "plan.json").read_text())
        (part,) = plan["parts"]
        path = folder / part["file"]
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        edit(lines)
        path.unlink()
        data = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        digest = hashlib.sha256(data).hexdigest()
        clips = [line.get("clips") if isinstance(line, dict) else None for line in lines]
        counts = {
            "shards": len(lines),
            "clips": sum(len(each) for each in clips if isinstance(each, list)),
        }
        name = f"plan/000000-{digest[:16]}.jsonl"
        part |= {"file": name, "sha256": digest, "bytes": len(data), **counts}
        (folder / name).write_bytes(data)
        (folder / "plan.json").write_text(json.dumps(plan | counts))
        info = json.loads((folder / "cache.json").read_text())
        info["files"].pop("plan.json", None)
        (folder / "cache.json").write_text(json.dumps(info))

    return write


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., SamplingPolicy]:
    """The paper's policy with a few things changed."""

    def make(**changes: Any) -> SamplingPolicy:
        fields: dict[str, Any] = {
            "policy": "windows",
            "num_frames": 8,
            "num_windows": 4,
            "time_stride_range": (1 / 25, 1 / 3),
            "crop_scale": (0.6, 1.0),
            "crop_ratio": (3 / 4, 4 / 3),
            "flip_probability": 0.5,
            "fps": None,
            "seed": 0,
            "min_frames": 2,
        }
        return SamplingPolicy(**(fields | changes))

    return make
