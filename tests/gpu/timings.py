"""What run.py times, a function a section: figures as plain JSON.

Random weights, pixels and tokens of the released sizes; extraction and training go through the real
commands' code, on caches that the real writers made. The dry form does the same with everything
small, so its figures mean nothing.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from deltatok.extract.backbone import Backbone
from deltatok.pipeline.cli import read_yaml
from deltatok.shards.running.devices import choose_device
from deltatok.shards.schema import load
from deltatok.train.config import TokenizerTrainConfig, WorldTrainConfig
from deltatok.train.engine.loop import Trainer
from deltatok.train.models.configs import DeltaWorldConfig
from deltatok.train.tokenizer import train_tokenizer
from deltatok.train.world import train_world

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import selection as selection_benchmark
from backbone_rate import flop_per_frame, frames_per_s, make_backbone
from loaders import make_deltas, make_patches

STEPS, LOG_EVERY = 6, 2
"""Of a timed run. The first LOG_EVERY warm up and count FLOPs; the last are reported."""
TRACED, WARM = 10, 2
KERNELS = 15
KEPT = ("tflop_per_s", "peak_memory_gb", "loader_wait_share", "selection_share")
SMALL_TOKENIZER = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SMALL_WORLD = {
    "predictor_hidden_size": 32,
    "predictor_num_hidden_layers": 2,
    "predictor_num_heads": 2,
    "rope_axis_sizes": [12],
    "num_samples_train": 8,
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a section computes and writes."""

    device: torch.device
    folder: Path
    """For caches and runs; gone afterwards."""
    out: Path
    """For what is kept."""

    @property
    def dry(self) -> bool:
        """Everything small."""
        return self.device.type != "cuda"


def backbone(place: Place) -> dict[str, Any]:
    """Frames/s, TFLOP/s and peak memory of a ViT-B by frame size and batch."""
    sizes, batches = ((32,), (8,)) if place.dry else ((256, 512), (64, 256))
    autocast = "float32" if place.dry else "bfloat16"
    made = make_backbone(place.folder / "backbone", "small" if place.dry else "vit-b")
    model = Backbone.load(str(made), device=place.device, autocast=autocast)  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for size in sizes:
        for batch in batches:
            _forget_peak(place)
            rate = frames_per_s(
                model, num_frames=batch, frame_size=size, min_s=0.1 if place.dry else 2.0
            )
            found[f"{size} px, batch {batch}"] = {
                "frames_per_s": rate,
                "tflop_per_s": rate * flop_per_frame(model, size) / 1e12,
                "peak_memory_gb": _peak_gb(place),
            }
    return found


def extraction(place: Place) -> dict[str, Any]:
    """Videos to a float16 cache beside the backbone alone, at two frame sizes, the start included;
    and a trace of ten batches."""
    from extraction import measure

    from deltatok.extract.features import WindowFeatures

    found: dict[str, Any] = {}
    for size, count in ((32, 2),) if place.dry else ((256, 320), (512, 80)):
        folder = place.folder / str(size)
        arguments = argparse.Namespace(
            videos=[str(make_clips(folder / "clips", count, small=place.dry))],
            backbone="small" if place.dry else "vit-b",
            frame_size=size,
            windows=2 if place.dry else 8,
            batch_frames=None,
            workers=1 if place.dry else None,
            limit=None,
            forward_seconds=0.1 if place.dry else 2.0,
            device=str(place.device),
        )
        found[f"{size} px"] = measure(arguments, folder)
        print(f"{size} px: {found[f'{size} px']['frames_per_s']:.4g} frames/s", flush=True)
        shutil.rmtree(folder)
    folder = place.folder / "traced"
    make_clips(folder / "clips", 1 if place.dry else 32, small=place.dry)
    traced_arguments = vars(arguments) | {
        "videos": [str(folder / "clips")],
        "frame_size": 32 if place.dry else 256,
        "windows": WARM + TRACED + 1 if place.dry else 8,
        "batch_frames": 8 if place.dry else None,
    }
    with traced(place, "extraction", WindowFeatures, "_run") as figures:
        measure(argparse.Namespace(**traced_arguments), folder)
    return found | {"trace": figures}


def make_clips(folder: Path, count: int, *, small: bool) -> Path:
    """`count` clips of ten seconds, eight different ones, of about Kinetics' size."""
    from deltatok.pipeline.little_world.files import write_mp4

    rng = np.random.default_rng(0)
    height, width, num_frames = (48, 64, 40) if small else (256, 340, 250)
    for number in range(min(count, 8)):
        blocks = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
        still = blocks.repeat(16, 0).repeat(16, 1)[:height, :width]
        frames = np.stack([np.roll(still, (at, 2 * at), (0, 1)) for at in range(num_frames)])
        write_mp4(folder / f"{number:04d}.mp4", frames, 25)
    for number in range(8, count):
        (folder / f"{number:04d}.mp4").hardlink_to(folder / f"{number % 8:04d}.mp4")
    return folder


def tokenizer(place: Place) -> dict[str, Any]:
    """Steps of the shipped configs; that for 512 px in portions that a GPU of 80 GB can take."""
    found = _steps(place, ("tokenizer/one-h200-256", "tokenizer/one-24gb-256"))
    portions = {"batch_size": 256, "micro_batch_size": 16}
    return found | _steps(place, ("tokenizer/released-512",), **portions)


def world(place: Place) -> dict[str, Any]:
    """Steps of the shipped configs."""
    return _steps(place, ("world/one-h200", "world/one-24gb"))


def compiled(place: Place) -> dict[str, Any]:
    """Steps of two of them again, with torch.compile; in the dry form without it."""
    return _steps(place, ("world/one-h200", "tokenizer/one-h200-256"), compile=not place.dry)


def selection(place: Place) -> dict[str, Any]:
    """The search for the best of 256 by dtype: tests/benchmarks/selection.py."""
    small = DeltaWorldConfig(
        hidden_size=64,
        layer_scale_init=1.0,
        **{**SMALL_WORLD, "rope_axis_sizes": (12,)},  # type: ignore[arg-type]
    )
    return selection_benchmark.measure(
        device=place.device,
        counts=(selection_benchmark.REPORTED,),
        rounds=1 if place.dry else 3,
        config=small if place.dry else None,
        memory=not place.dry,
    )


def traces(place: Place) -> dict[str, Any]:
    """Ten steps under torch.profiler: OUT/trace-NAME.json.gz, and what took longest.

    Batches are of one or two portions of the config, so that the files stay small.
    """
    found = {}
    for name, batch_size in (("world/one-h200", 64), ("tokenizer/one-h200-256", 256)):
        config = make_config(place, name, steps=WARM + TRACED + 1, batch_size=batch_size)
        with traced(place, name.partition("/")[0], Trainer, "_fetch") as figures:
            _train(config)
        found[name] = figures | {"batch_size": config.batch_size}
    return found


@contextmanager
def traced(place: Place, name: str, owner: type, method: str) -> Iterator[dict[str, Any]]:
    """Profiles TRACED calls of a method, after WARM others; what it gives is filled at the end."""
    figures: dict[str, Any] = {}
    began: list[float] = []
    original = getattr(owner, method)

    def export(found: profile) -> None:
        path = place.out / f"trace-{name}.json.gz"
        found.export_chrome_trace(str(path))
        wall_s = (began[-1] - began[WARM]) / (len(began) - WARM - 1)
        figures.update(trace=path.name, wall_s_per_step=wall_s, **_summary(place, found, wall_s))

    def counted(*arguments: Any) -> Any:
        if began:
            profiler.step()
        began.append(time.perf_counter())
        return original(*arguments)

    activities = [ProfilerActivity.CPU] + ([] if place.dry else [ProfilerActivity.CUDA])
    profiler = profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=WARM, active=TRACED, repeat=1),
        on_trace_ready=export,
    )
    with mock.patch.object(owner, method, counted), profiler:
        yield figures


def _summary(place: Place, found: profile, wall_s: float) -> dict[str, Any]:
    """How busy the device was, launches, and the kernels that took longest (operations, dry)."""
    time_of = "self_cpu_time_total" if place.dry else "self_device_time_total"
    kind = DeviceType.CPU if place.dry else DeviceType.CUDA
    every = found.key_averages()
    rows = [
        row for row in every if row.device_type == kind and not row.key.startswith("ProfilerStep")
    ]
    rows.sort(key=lambda row: -getattr(row, time_of))
    busy_s = sum(getattr(row, time_of) for row in rows) / 1e6 / TRACED
    return {
        "device_busy_share": busy_s / wall_s,
        "launches_per_step": sum(r.count for r in every if "LaunchKernel" in r.key) / TRACED,
        "longest": [
            {
                "name": row.key[:100],
                "ms_per_step": getattr(row, time_of) / 1e3 / TRACED,
                "calls_per_step": row.count / TRACED,
            }
            for row in rows[:KERNELS]
        ],
    }


def make_config(place: Place, name: str, **changed: Any) -> TokenizerTrainConfig | WorldTrainConfig:
    """configs/NAME.yaml for a random cache and a few steps; in the dry form everything small."""
    values = read_yaml(Path(f"configs/{name}.yaml"))
    kind = name.partition("/")[0]
    fixed: dict[str, Any] = {
        "steps": STEPS,
        "log_every": LOG_EVERY,
        "validation_fraction": 0.0,
        "device": place.device.type,
        "out": str(place.folder / f"run-{time.monotonic_ns()}"),
    }
    if place.dry:
        small = SMALL_TOKENIZER if kind == "tokenizer" else SMALL_WORLD
        values["model"] = values["model"] | small
        fixed |= {"batch_size": 8, "micro_batch_size": 4, "precision": "float32"}
        changed = {name: changed[name] for name in changed if "batch_size" not in name}
    width = 64 if place.dry else 768
    if kind == "world":
        cache = place.folder / "deltas"
        if not cache.exists():
            make_deltas(cache, 64 if place.dry else 4096, 4096, size=width)
        given: dict[str, Any] = {"deltas": str(cache)}
        return load(WorldTrainConfig, values | fixed | given | changed, where=name)
    side = 2 if place.dry else (32 if "512" in name else 16)
    cache = place.folder / f"patches-{side}"
    if not cache.exists():
        make_patches(cache, side, 1e-4 if place.dry else 1.0, size=width)
    given = {"patches": str(cache)}
    return load(TokenizerTrainConfig, values | fixed | given | changed, where=name)


def _steps(place: Place, names: tuple[str, ...], **changed: Any) -> dict[str, Any]:
    found = {}
    for name in names:
        config = make_config(place, name, **changed)
        shipped = read_yaml(Path(f"configs/{name}.yaml"))
        _forget_peak(place)
        last = _train(config)
        unit = "pairs" if "pairs_per_s" in last else "windows"
        rate = last[f"{unit}_per_s"]
        found[name] = {
            f"{unit}_per_s": rate,
            "ms_per_step": 1e3 * config.batch_size / rate,
            **{key: last[key] for key in KEPT if key in last},
            "batch_size": config.batch_size,
            "micro_batch_size": config.micro_batch_size,
            "precision": config.precision,
            "compile": config.compile,
        }
        if not place.dry:
            samples = shipped["steps"] * shipped["batch_size"]
            found[name]["gpu_hours_of_all_its_steps"] = samples / rate / 3600
        shutil.rmtree(config.out)
        print(f"{name}: {rate:.4g} {unit}/s", flush=True)
    return found


def _train(config: TokenizerTrainConfig | WorldTrainConfig) -> dict[str, float]:
    """The last line of the run's log."""
    if isinstance(config, TokenizerTrainConfig):
        folder = train_tokenizer(config)
    else:
        folder = train_world(config)
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    last: dict[str, float] = json.loads(lines[-1])
    return last


def _forget_peak(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place.device)


def _peak_gb(place: Place) -> float | None:
    if place.device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(place.device) / 1e9


TIMED: dict[str, Callable[[Place], dict[str, Any]]] = {
    "backbone": backbone,
    "extraction": extraction,
    "world": world,
    "tokenizer": tokenizer,
    "selection": selection,
    "traces": traces,
    "compiled": compiled,
}


def measure(name: str, *, device: str, folder: Path, out: Path) -> dict[str, Any]:
    """The figures of a section."""
    return TIMED[name](Place(device=choose_device(device), folder=folder, out=out))
