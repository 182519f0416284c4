"""Golden cases as fixtures: found by reading the folders, compared number for number.

A golden folder has one folder a case (config.json names its kind) and loose function cases
(08_eval, 09_optimizer, 10_checkpoints). Any folder of the same format works, whatever its widths,
depths, grids and seeds: `pytest tests/parity --golden DIR`.

A float may differ from the golden one by 1e-5 of the golden tensor's largest value, or by 4 times
the case's own float32 noise floor where that is larger; integers must be equal. A case passes
only if exactly its outputs were compared, all of them.

`--device cuda --arithmetic tf32 --arithmetic bfloat16` has the models compute there, with the
tolerance of that arithmetic; tests/gpu does.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deltatok.train.models.configs import DeltaTokConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.models.heads import (
    DepthHead,
    DepthHeadConfig,
    SegmentationHead,
    SegmentationHeadConfig,
)
from deltatok.train.models.rgb_head import RGBHead, RGBHeadConfig

RELATIVE_TOLERANCES = {"float32": 1e-5, "tf32": 0.02, "bfloat16": 0.1}
"""Of the golden tensor's largest value. In bfloat16 a CPU differs by at most 0.044 (a gradient);
TF32 has three more bits, and was not tried."""
NOISE_FLOORS = 4.0

KINDS = ("backbone", "deltatok", "world", "losses", "head")

FUNCTION_FILES = {
    "08_eval": {
        "crops.json",
        "cv2_resize.json",
        "kitti.json",
        "label_tables.json",
        "metrics.json",
        "middle_frame_indices.json",
        "resize_sizes.json",
        "sample_frame_indices.json",
    },
    "09_optimizer": {
        "groups_full_size.json",
        "groups_of_the_cases.json",
        "lr_schedule.json",
        "parameter_counts.json",
    },
    "10_checkpoints": {"full_size_head_keys.json", "full_size_keys.json"},
}
"""Folder -> the descriptions in it, each with a test of its own."""


@dataclass
class Comparison:
    """The differences of one test, and what of them is too large."""

    case: str
    arithmetic: str = "float32"
    num_tensors: int = 0
    max_absolute: float = 0.0
    max_relative: float = 0.0
    worst_share: float = 0.0
    """Largest error as a share of its tolerance; the case passes below 1."""
    worst_name: str = "-"
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, got: Tensor, wanted: Tensor, *, noise_floor: float = 0.0) -> None:
        """Compare one tensor: shape, then values."""
        self.num_tensors += 1
        got = got.cpu()
        if got.shape != wanted.shape:
            self.problems.append(f"{name}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}")
            return
        if not wanted.is_floating_point():
            if not torch.equal(got.to(wanted.dtype), wanted):
                self.problems.append(f"{name}: {got.tolist()}, wanted {wanted.tolist()}")
            return
        largest = float(wanted.double().abs().max()) if wanted.numel() else 0.0
        error = float((got.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
        relative = RELATIVE_TOLERANCES[self.arithmetic]
        tolerance = max(relative * largest, NOISE_FLOORS * noise_floor)
        share = error / tolerance if tolerance else (0.0 if error == 0 else float("inf"))
        self.max_absolute = max(self.max_absolute, error)
        self.max_relative = max(self.max_relative, error / largest if largest else error)
        if share > self.worst_share:
            self.worst_share, self.worst_name = share, name
        if not error <= tolerance:  # also NaN
            self.problems.append(f"{name}: off by {error:.3g}, tolerance {tolerance:.3g}")

    def check(self) -> None:
        """Fail with everything that was too large, or if nothing was compared."""
        if self.num_tensors == 0:
            self.problems.append("nothing was compared")
        if self.problems:
            pytest.fail("\n".join(self.problems), pytrace=False)

    def add_all(
        self,
        got: Mapping[str, Tensor],
        wanted: Mapping[str, Tensor],
        noise_floor: Mapping[str, Any],
    ) -> None:
        """Compare every tensor; names must be the same on both sides."""
        missing, extra = sorted(set(wanted) - set(got)), sorted(set(got) - set(wanted))
        if missing or extra:
            self.problems.append(f"not computed: {missing}; not in the case: {extra}")
        for name in sorted(set(wanted) & set(got)):
            floor = noise_floor.get(name, {}).get("max_abs_error_vs_float64", 0.0)
            self.add(name, got[name], wanted[name], noise_floor=floor)


@dataclass(frozen=True)
class Case:
    """One case folder."""

    folder: Path
    device: str = "cpu"
    arithmetic: str = "float32"

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors", device=self.device)

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "outputs.safetensors")

    @cached_property
    def state(self) -> dict[str, Tensor]:
        return load_file(self.folder / "state.safetensors")

    @cached_property
    def noise_floor(self) -> dict[str, Any]:
        return json.loads((self.folder / "noise_floor.json").read_text())

    @cached_property
    def backbone_folder(self) -> Path:
        return self.folder.parent / "backbone"

    @cached_property
    def backbone_config(self) -> dict[str, Any]:
        return json.loads((self.backbone_folder / "config.json").read_text())

    def sibling(self, name: str) -> "Case":
        """Another case of the same golden folder."""
        return replace(self, folder=self.folder.parent / name)


def golden_folders(config: pytest.Config) -> list[Path]:
    """The folders asked for, or those that are there."""
    given: list[Path] | None = config.getoption("--golden")
    if given:
        for folder in given:
            if not folder.is_dir():
                raise pytest.UsageError(f"--golden {folder}: no such folder")
        return given
    tree = Path(__file__).resolve().parents[2]
    defaults = (tree / "tests" / "golden", tree.parent / "shared" / "golden")
    return [folder for folder in defaults if folder.is_dir()]


def cases_of_kind(folders: list[Path], kind: str) -> Iterator[Case]:
    for folder in folders:
        for file in sorted(folder.glob("*/config.json")):
            case = Case(file.parent)
            if case.config.get("kind") == kind:
                yield case


def files_named(folders: list[Path], name: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(file for case in FUNCTION_FILES for file in folder.glob(f"{case}/{name}"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`KIND_case` is every case of that kind, `NAME_file` every NAME.json."""
    folders = golden_folders(metafunc.config)
    device = metafunc.config.getoption("--device") or "cpu"
    arithmetics = metafunc.config.getoption("--arithmetic") or ["float32"]
    for fixture in metafunc.fixturenames:
        stem = fixture.removesuffix("_case")
        if stem in KINDS and fixture != stem:
            cases = [
                replace(case, device=device, arithmetic=arithmetic)
                for arithmetic in arithmetics
                for case in cases_of_kind(folders, stem)
            ]
            ids = [_identifier(c.folder) + _suffix(c.arithmetic) for c in cases]
            metafunc.parametrize(fixture, cases, ids=ids)
        name = f"{fixture.removesuffix('_file')}.json"
        if fixture.endswith("_file"):
            files = list(files_named(folders, name))
            ids = [_identifier(f.parent) for f in files]
            metafunc.parametrize(fixture, files, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A folder that has no case of a kind has nothing to skip: its test is not there."""
    empty = [
        item
        for item in items
        for mark in item.iter_markers("skip")
        if "empty parameter set" in str(mark.kwargs.get("reason", ""))
    ]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]


def _suffix(arithmetic: str) -> str:
    return "" if arithmetic == "float32" else f"-{arithmetic}"


def _identifier(folder: Path) -> str:
    """E.g. shared/golden/06_losses."""
    return "/".join(folder.resolve().parts[-3:])


@pytest.fixture
def build_model() -> Callable[..., torch.nn.Module]:
    """(case's config, backbone's config, further config fields) -> our model, fresh weights."""
    return _build_model


def _build_model(
    case: Mapping[str, Any],
    backbone: Mapping[str, Any],
    constants: Mapping[str, Any] = MappingProxyType({}),
) -> torch.nn.Module:
    model = {k: tuple(v) if isinstance(v, list) else v for k, v in case["model"].items()}
    shared = {name: backbone[name] for name in ("layer_norm_eps", "initializer_range")}
    if case["class"] == "DeltaTok":
        config = DeltaTokConfig(
            hidden_size=case["hidden_size"],
            num_attention_heads=case["num_heads"],
            intermediate_size=backbone["intermediate_size"],
            rope_theta=backbone["rope_theta"],
            pos_embed_rescale=backbone["pos_embed_rescale"],
            **shared,
            **model,
        )
        return DeltaTok(config)
    if case["class"] in ("DeltaWorld", "DINOWorld"):
        cls = {"DeltaWorld": DeltaWorldNetwork, "DINOWorld": DINOWorld}[case["class"]]
        shared["initializer_range"] = case["initializer_range"]
        return cls(cls.config_class(hidden_size=case["backbone_hidden_size"], **shared, **model))
    if case["class"] == "SegHead":
        return SegmentationHead(SegmentationHeadConfig(**model))
    if case["class"] == "DepthHead":
        return DepthHead(DepthHeadConfig(**model))
    return RGBHead(RGBHeadConfig(**model, **constants))


@pytest.fixture
def tested_kinds() -> tuple[str, ...]:
    return KINDS


@pytest.fixture
def tested_files() -> dict[str, set[str]]:
    return FUNCTION_FILES


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> list[Path]:
    """All golden folders of this run."""
    return golden_folders(request.config)


@pytest.fixture(autouse=True)
def arithmetic(request: pytest.FixtureRequest) -> Iterator[str]:
    """What the test's case is computed in."""
    values = getattr(request.node, "callspec", None)
    cases = [v for v in values.params.values() if isinstance(v, Case)] if values else []
    if not cases:
        yield "float32"
        return
    (case,) = cases
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    is_tf32 = case.arithmetic == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_tf32
    with ExitStack() as entered:
        if case.arithmetic == "bfloat16":
            kind = torch.device(case.device).type
            # Without its cache: weights cast without gradient must not serve a pass with one.
            entered.enter_context(torch.autocast(kind, torch.bfloat16, cache_enabled=False))
        yield case.arithmetic
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def comparison(request: pytest.FixtureRequest, arithmetic: str) -> Iterator[Comparison]:
    """Collects differences for the parity table; the test ends with its check()."""
    made = Comparison(case=request.node.name.removeprefix("test_"), arithmetic=arithmetic)
    yield made
    request.node.user_properties.append(("parity", asdict(made)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The parity table."""
    rows = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for key, value in getattr(report, "user_properties", [])
        if key == "parity" and getattr(report, "when", "") == "teardown"
    ]
    if not rows:
        return
    terminalreporter.section("parity with the golden data")
    width = max(len(row["case"]) for row in rows)
    terminalreporter.write_line(
        f"{'case':{width}}  tensors  max abs err  max rel err  of tolerance  worst"
    )
    for row in sorted(rows, key=lambda row: row["case"]):
        terminalreporter.write_line(
            f"{row['case']:{width}}  {row['num_tensors']:7}  {row['max_absolute']:11.2e}  "
            f"{row['max_relative']:11.2e}  {row['worst_share']:12.3f}  {row['worst_name']}"
            + ("  FAILED" if row["problems"] else "")
        )
