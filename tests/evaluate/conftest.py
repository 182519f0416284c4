"""A tiny evaluation: a uniform patch cache, models and labels, all made by code in kilobytes."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from deltatok.evaluate.forecast.config import ForecastConfig
from deltatok.evaluate.forecast.sequences import SequenceScores
from deltatok.evaluate.report import plots
from deltatok.evaluate.report.paper_rows import PaperComparison
from deltatok.evaluate.report.rows import ReportRow
from deltatok.evaluate.report.write import Pictures, Report, report_page
from deltatok.shards.cache import PATCHES, CacheInfo, CacheShape, finish_cache, open_cache
from deltatok.shards.patches.writer import write_black, write_patch_shard
from deltatok.shards.plan import PlanEntry, write_plan
from deltatok.shards.windows import ShardRows
from deltatok.train.engine.model_folder import weights_sha256
from deltatok.train.models.configs import DeltaTokConfig, DeltaWorldConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.heads import SegmentationHead, SegmentationHeadConfig

GRID = (2, 3)
NUM_FRAMES = 7
HIDDEN_SIZE = 32
NUM_CLASSES = 4
LABEL_SIZE = (10, 14)
LATE = np.array([0.0, 0.4, -0.6, 0.0, 0.5, -0.3, 0.0])
"""Frames by which each frame of a window is late: real videos have such times."""
CLIPS = {"a.mp4": 2, "sub/b.mp4": 1, "c.mp4": 2}  # clip -> windows


@dataclass(frozen=True)
class TinyEvaluation:
    """Folders of everything a ForecastConfig names."""

    root: Path

    def path(self, name: str) -> str:
        return str(self.root / name)

    def config(self, **changes: Any) -> ForecastConfig:
        """All models and labels, 6 samples; `changes` replace fields."""
        settings = {
            "patches": self.path("patches"),
            "tokenizer": self.path("tokenizer"),
            "world": self.path("world"),
            "discriminative": self.path("discriminative"),
            "head": self.path("head"),
            "labels": self.path("labels"),
            "out": self.path("report"),
            "dataset": "tiny",
            "num_samples": 6,
            "batch_windows": 2,
            "num_pictures": 0,
            "device": "cpu",
        }
        return ForecastConfig(**settings | changes)


@pytest.fixture(autouse=True, scope="module")
def _no_pixels_of_plots(request: pytest.FixtureRequest) -> Iterator[None]:
    """Laying out the one plot of a tiny evaluation is four fifths of its time. Where pages are
    tested (report/) it is done; elsewhere a plot is drawn and has one pixel."""

    pixel = io.BytesIO()
    Image.new("RGBA", (1, 1)).save(pixel, "png")

    def render(draw: Callable[[Figure, dict[str, str]], None], ink: dict[str, str]) -> bytes:
        draw(Figure(layout="constrained"), ink)
        return pixel.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        if "report" not in request.path.parts:
            patch.setattr(plots, "_render", render)
        yield


@pytest.fixture(scope="session")
def shared_evaluation(tmp_path_factory: pytest.TempPathFactory) -> TinyEvaluation:
    """The tiny evaluation; tests must leave its folders as they are and write elsewhere."""
    tiny = TinyEvaluation(tmp_path_factory.mktemp("tiny"))
    write_cache(tiny.root / "patches", policy="uniform", backbone="aaaa")
    write_models(tiny.root, identity("uniform", "aaaa"))
    write_labels(tiny.root / "labels")
    return tiny


@pytest.fixture
def tiny(shared_evaluation: TinyEvaluation, tmp_path: Path) -> TinyEvaluation:
    """A view of the shared evaluation in a folder of its own: links that a test may replace."""
    for source in shared_evaluation.root.iterdir():
        (tmp_path / source.name).symlink_to(source)
    return TinyEvaluation(tmp_path)


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The helpers below, since tests cannot import a conftest."""
    helpers = (identity, write_cache, write_models, write_labels, change_provenance)
    return SimpleNamespace(**{helper.__name__: helper for helper in helpers})


def identity(policy: str, backbone: str) -> dict[str, Any]:
    """Identity of a patch cache as extract/ writes it."""
    return {
        "backbone": {"config": {"hidden_size": HIDDEN_SIZE}, "weights_sha256": backbone},
        "preprocessing": {"frame_size": 48, "patch_size": 16, "image_mean": [0.5, 0.5, 0.5]},
        "sampling": {"policy": policy, "num_frames": NUM_FRAMES, "seed": 0, "fps": 5.0},
        "storage": {"dtype": "float16"},
        "autocast_dtype": "float32",
    }


def write_cache(
    folder: Path, *, policy: str, backbone: str, tokens: np.ndarray[Any, Any] | None = None
) -> None:
    """Five windows of three clips in two shards; features drift, as those of a video do, or are
    `tokens` (5, T, N, D)."""
    rng = np.random.default_rng(0)
    num_tokens = GRID[0] * GRID[1]
    shape = CacheShape(
        num_frames=NUM_FRAMES, num_tokens=num_tokens, grid=GRID, hidden_size=HIDDEN_SIZE
    )
    open_cache(folder, CacheInfo(format=PATCHES, identity=identity(policy, backbone), shape=shape))
    keys = list(CLIPS)
    entries = [
        PlanEntry(key=key, source=key, size_bytes=1, shard=i // 2) for i, key in enumerate(keys)
    ]
    write_plan(folder, entries)
    write_black(folder, rng.normal(size=(num_tokens, HIDDEN_SIZE)).astype(np.float32))
    for shard, names in enumerate((keys[:2], keys[2:])):
        clip = np.repeat(np.arange(len(names)), [CLIPS[name] for name in names])
        first = rng.normal(size=(len(clip), 1, num_tokens, HIDDEN_SIZE))
        drift = rng.normal(size=(len(clip), NUM_FRAMES, num_tokens, HIDDEN_SIZE)).cumsum(axis=1)
        index = np.stack([np.arange(NUM_FRAMES) * 6 + 3 * i for i in range(len(clip))])
        features = first + 0.3 * drift
        if tokens is not None:
            features, tokens = tokens[: len(clip)], tokens[len(clip) :]
        rows = ShardRows(
            tokens=features.astype(np.float16),
            timestamps_s=((index + LATE) / 30).astype(np.float32),
            frame_index=index.astype(np.int32),
            crop=np.tile(np.array([0, 0, 90, 160], np.float32), (len(clip), 1)),
            flipped=np.zeros(len(clip), bool),
            clip=clip.astype(np.int32),
            keys=names,
        )
        write_patch_shard(folder, shard, rows, dtype="float16", seed=0)
    finish_cache(folder)


def write_models(root: Path, patches: dict[str, Any]) -> None:
    """A tokenizer, a generative and a discriminative world model and a head, random weights."""
    generator = torch.Generator().manual_seed(1)
    tokenizer = DeltaTok(
        DeltaTokConfig(
            hidden_size=HIDDEN_SIZE,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            layer_scale_init=0.7,
            initializer_range=0.2,
        ),
        generator=generator,
    ).eval()
    tokenizer.save_pretrained(root / "tokenizer", {"patches": patches})
    deltas = {
        "patches": patches,
        "tokenizer": {"config": {}, "weights_sha256": weights_sha256(tokenizer)},
    }
    for name, use_bom in (("world", True), ("discriminative", False)):
        config = DeltaWorldConfig(
            hidden_size=HIDDEN_SIZE,
            predictor_hidden_size=24,
            predictor_num_hidden_layers=1,
            predictor_num_heads=2,
            rope_axis_sizes=(8,),
            use_bom=use_bom,
            layer_scale_init=1.0,
            initializer_range=0.5,
        )
        world = DeltaWorldNetwork(config, generator=generator)
        world.save_pretrained(root / name, {"deltas": deltas})
    head = SegmentationHead(
        SegmentationHeadConfig(in_size=HIDDEN_SIZE, num_classes=NUM_CLASSES), generator=generator
    )
    head.bn.running_mean.normal_(generator=generator)
    head.save_pretrained(root / "head", {"patches": patches})


def write_labels(folder: Path) -> None:
    """Labels of 40 frames a clip, in blocks, with a strip of ignored pixels."""
    rng = np.random.default_rng(2)
    for key in CLIPS:
        path = folder / f"{key}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = rng.integers(0, NUM_CLASSES, size=(50, 2, 2), dtype=np.uint8)
        maps = blocks.repeat(LABEL_SIZE[0] // 2, axis=1).repeat(LABEL_SIZE[1] // 2, axis=2)
        maps[:, :, 0] = 255
        np.save(path, maps)


def change_provenance(folder: Path, change: dict[str, Any]) -> None:
    """Copy a linked model folder and replace fields of its provenance.json."""
    source = folder.resolve()
    folder.unlink()
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    provenance = json.loads((folder / "provenance.json").read_text())
    (folder / "provenance.json").write_text(json.dumps(provenance | change))
    (folder / "checksums.json").unlink()


@pytest.fixture(scope="session")
def small_page() -> Callable[..., str]:
    """Makes the page of a report that has little more than its rows, of steps of 0.2 s."""

    def make(
        rows: Sequence[ReportRow],
        *,
        pictures: Pictures | None = None,
        num_samples: int = 1,
        probes: dict[str, Any] | None = None,
        diagnosis: Sequence[dict[str, Any]] = (),
        paper: PaperComparison | None = None,
    ) -> str:
        settings = {"dataset": "d", "num_context": 4, "short_steps": 1, "mid_steps": 3, "seed": 0}
        report = Report(
            rows=list(rows),
            probes=probes or {},
            best_of_k=[],
            per_class_iou=[],
            provenance={"cache": {"policy": "uniform"}},
            seconds={},
            config=settings | {"num_samples": num_samples, "num_seeds": 1, "class_names": ()},
            num_windows=1,
            num_clips=1,
            step_s=0.2,
            diagnosis=list(diagnosis),
            paper=paper,
        )
        return report_page(report, pictures or Pictures(), SequenceScores())

    return make
