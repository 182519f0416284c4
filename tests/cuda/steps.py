"""A step of every shipped config at its full size: launches, FLOPs and memory.

    python tests/cuda/steps.py                     # all of configs/, into tests/cuda/steps.json
    python tests/cuda/steps.py world/one-24gb

and of some with other settings, MORE.

The trainers' own step (train/engine/loop.py) on a pretended device without numbers; for an
extraction, a batch through a backbone of ViT-B's size. Launches are operators that run a kernel;
memory is the most that lies in live tensors at once, in bytes: weights, gradients, optimizer,
activations and the chunks of the selection, without what CUDA itself and the allocator's gaps take.
Of many portions two are counted, the others are as the second.

The GPU is the one that the config's header names: "N GPUs of M GB".
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import DINOv3ViTConfig, DINOv3ViTModel

sys.path.append(str(Path(__file__).parent))
from pretended import PretendedDevice, pretend_cuda

from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.datasets.base import DatasetConfig
from deltatok.pipeline.cli import read_yaml
from deltatok.shards.schema import load
from deltatok.train.config import (
    DINOWorldTrainConfig,
    HeadTrainConfig,
    TokenizerTrainConfig,
    TrainConfig,
    WorldTrainConfig,
)
from deltatok.train.data.batches import Batch
from deltatok.train.dinoworld import DINOWorldObjective
from deltatok.train.engine.devices import make_accelerator
from deltatok.train.engine.logs import Meter
from deltatok.train.engine.loop import Trainer, parameter_groups
from deltatok.train.heads.train import DepthTask, HeadObjective, SegmentationTask
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.selection.selector import Selector
from deltatok.train.tokenizer import TokenizerObjective
from deltatok.train.world import DeltaWorldObjective

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TRAINED: dict[str, tuple[type[TrainConfig], dict[str, str]]] = {
    "tokenizer": (TokenizerTrainConfig, {"patches": "cache", "out": "run"}),
    "world": (WorldTrainConfig, {"deltas": "cache", "out": "run"}),
    "dinoworld": (DINOWorldTrainConfig, {"patches": "cache", "out": "run"}),
    "head": (HeadTrainConfig, {"patches": "cache", "labels": "data", "out": "run"}),
}
HIDDEN_SIZE, NUM_FRAMES = 768, 8
"""Of the caches that configs/extract makes, with the default backbone (ViT-B)."""
LABEL = (480, 853)
"""Height and width of a label: VSPW's; Cityscapes' and KITTI's enlarge no more at a time."""
VIT_B = DINOv3ViTConfig(
    patch_size=16,
    hidden_size=HIDDEN_SIZE,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_register_tokens=4,
)
MORE: dict[str, dict[str, Any]] = {
    "world/one-24gb --winners 4": {"num_winners": 4},
    "world/one-h200 --winners 8": {"num_winners": 8},
    "dinoworld/best-of-many-256 --winners 2": {"num_winners": 2},
}
"""A config with flags -> the settings that they change."""
PORTIONS = 2
LAUNCH_S = 5e-6
"""Seconds of the host for a launch from Python (a usual figure, not measured here)."""
SHARE_OF_PEAK = 0.4
PEAK_FLOPS = {24: 165e12, 80: 312e12, 141: 989e12}
"""Dense bfloat16, by GB: RTX 4090, A100, H200 (their data sheets)."""


def gpus_of(path: Path) -> tuple[int, int]:
    """How many GPUs of how many GB a config's header names."""
    (hardware,) = re.findall("^# Hardware: (.*)$", path.read_text(), flags=re.MULTILINE)
    found = re.match(r"(one|\d+) GPUs? of (\d+) GB", hardware)
    if found is None:
        raise ValueError(f"{path}: wanted `# Hardware: N GPUs of M GB`, got {hardware}")
    return 1 if found[1] == "one" else int(found[1]), int(found[2])


def grid_of(path: Path) -> tuple[int, int]:
    """The patches of a frame: 512 px where the file or the cache in its command says so."""
    side = 32 if "512" in path.read_text().partition("# Hardware")[0] else 16
    return side, side


def make_objective(config: TrainConfig, grid: tuple[int, int], device: torch.device) -> Any:
    """An objective as a run would have it, without caches: model and losses only."""
    if isinstance(config, TokenizerTrainConfig):
        objective: Any = TokenizerObjective.__new__(TokenizerObjective)
        network: Any = (DeltaTok, config.model)
    elif isinstance(config, WorldTrainConfig):
        objective = DeltaWorldObjective.__new__(DeltaWorldObjective)
        network = (DeltaWorldNetwork, config.model)
    elif isinstance(config, DINOWorldTrainConfig):
        objective = DINOWorldObjective.__new__(DINOWorldObjective)
        network = (DINOWorld, config.model)
    else:
        assert isinstance(config, HeadTrainConfig)
        objective = HeadObjective.__new__(HeadObjective)
        task: Any = (
            SegmentationTask(in_size=HIDDEN_SIZE, num_classes=config.num_classes)
            if config.num_classes
            else DepthTask(in_size=HIDDEN_SIZE, max_depth=config.max_depth)
        )
        network = (task.head_class, task.head_config)
        objective._task = task
        objective._labels = SimpleNamespace(
            size=lambda window: LABEL,
            enlarge=lambda output, window: torch.nn.functional.interpolate(output, size=LABEL),
        )
    with torch.device("meta"):
        objective.model = network[0](network[1])
    objective.model.to(device)
    objective._config, objective._device = config, device
    objective._shards = SimpleNamespace(grid=grid)
    if isinstance(config, WorldTrainConfig | DINOWorldTrainConfig):
        patches = grid if isinstance(config, DINOWorldTrainConfig) else None
        objective._grid = {} if patches is None else {"grid": patches}
        objective.selector = Selector(objective.model, config, device=device, grid=patches)
    return objective


def make_batch(config: TrainConfig, count: int, grid: tuple[int, int], device: Any) -> Batch:
    """`count` samples as the cache would give them, float16."""
    patches = math.prod(grid)
    half = {"dtype": torch.float16, "device": device}
    windows = count
    if isinstance(config, TokenizerTrainConfig):
        windows = math.ceil(count / (NUM_FRAMES - 1))
        tensors = {
            "frames": torch.empty(windows, NUM_FRAMES, patches, HIDDEN_SIZE, **half),
            "pairs": torch.empty(count, 3, dtype=torch.int64, device=device),
        }
    elif isinstance(config, HeadTrainConfig):
        tensors = {
            "features": torch.empty(count, patches, HIDDEN_SIZE, **half),
            "labels": torch.empty(
                count, *LABEL, dtype=torch.uint8 if config.num_classes else torch.float32
            ).to(device),
        }
    else:
        shape = (NUM_FRAMES,) if isinstance(config, WorldTrainConfig) else (NUM_FRAMES, patches)
        tensors = {
            "tokens": torch.empty(count, *shape, HIDDEN_SIZE, **half),
            "timestamps": torch.empty(count, NUM_FRAMES, device=device),
        }
    numbers = np.arange(count)
    return Batch(tensors=tensors, samples=numbers, windows=numbers)


def counting_flops() -> FlopCounterMode:
    """Products only, 2 a multiply-add; attention, too, by the CPU's kernel, which runs here."""
    aten = torch.ops.aten
    attention = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        attention: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


class Step:
    """A step of a config on a device of its own."""

    def __init__(self, config: TrainConfig, grid: tuple[int, int], cuda: PretendedDevice) -> None:
        device = torch.device("cuda", 0)
        self.cuda, self.config, self.grid, self.device = cuda, config, grid, device
        precision = "bfloat16" if config.precision == "auto" else config.precision
        trainer: Any = Trainer.__new__(Trainer)
        trainer.config = config
        trainer.accelerator = make_accelerator("cuda", precision)
        trainer.objective = make_objective(config, grid, device)
        trainer.forward = trainer.objective.model
        trainer.meter = Meter("samples", device)
        groups = parameter_groups(trainer.objective.model, config.weight_decay)
        trainer.raw_optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        self.trainer = trainer
        self.weights_bytes = cuda.clocks.live_bytes

    def run(self, count: int) -> dict[str, int]:
        """Of a step of this many samples: launches, of which for the selection, and FLOPs."""
        counts = self.cuda.counts
        batch = make_batch(self.config, count, self.grid, self.device)
        counts.clear()
        with counting_flops() as flops, self._selection() as selection:
            self.trainer._forward_backward(batch, 1)  # not logged: nothing is measured
            self.trainer._clip()
            self.trainer.raw_optimizer.step()
            self.trainer.raw_optimizer.zero_grad()
        return {
            "launches": counts.num_launches,
            "selection_launches": selection[0],
            "waits": counts.num_waits,
            "flops": flops.get_total_flops(),
        }

    @contextmanager
    def _selection(self) -> Iterator[list[int]]:
        """Launches within the selector, added up."""
        found = [0]
        selector = getattr(self.trainer.objective, "selector", None)
        if selector is None:
            yield found
            return
        train = type(selector).train

        def counted(*given: Any, **named: Any) -> Any:
            before = self.cuda.counts.num_launches
            result = train(selector, *given, **named)
            found[0] += self.cuda.counts.num_launches - before
            return result

        selector.train = counted
        yield found
        del selector.train


def count_step(path: Path, changed: dict[str, Any]) -> dict[str, Any]:
    """The row of a training config in the JSON, with `changed` settings."""
    kind, given = TRAINED[path.parent.name]
    config = load(kind, read_yaml(path) | given | changed, where=path.name)
    num_gpus, gigabytes = gpus_of(path)
    count = config.batch_size // num_gpus
    size = min(config.micro_batch_size or count, count)
    portions = math.ceil(count / size)
    with pretend_cuda(has_numbers=False) as cuda:
        step = Step(replace(config, micro_batch_size=size), grid_of(path), cuda)
        step.run(min(size, 2))  # makes the optimizer's state
        kept = cuda.clocks.live_bytes
        one = step.run(size)
        last = one if portions == 1 else step.run(PORTIONS * size)
    total = {
        name: last[name] + (last[name] - one[name]) * max(0, portions - PORTIONS) for name in last
    }
    return {
        "gpus": num_gpus,
        "gpu_gb": gigabytes,
        "samples_per_gpu": count,
        "portion": size,
        **total,
        "weights_bytes": step.weights_bytes,
        "optimizer_bytes": kept - step.weights_bytes,
        "peak_bytes": cuda.clocks.peak_bytes,
        **bound(total, gigabytes),
    }


def bound(counted: dict[str, int], gigabytes: int) -> dict[str, float]:
    """Seconds of launching, and of computing at SHARE_OF_PEAK: the larger one bounds a step."""
    return {
        "launch_s": round(counted["launches"] * LAUNCH_S, 4),
        "compute_s": round(counted["flops"] / (SHARE_OF_PEAK * PEAK_FLOPS[gigabytes]), 4),
    }


def count_batch(path: Path) -> dict[str, Any]:
    """The row of an extraction in the JSON: a batch of frames, the pixels of the next beside it."""
    kind = ExtractConfig if path.parent.name == "extract" else DatasetConfig
    given = {"out": "cache"} | ({"videos": ["v"]} if kind is ExtractConfig else {"root": "data"})
    config = load(kind, read_yaml(path) | given, where=path.name)
    num_gpus, gigabytes = gpus_of(path)
    with torch.device("meta"):
        model = DINOv3ViTModel(VIT_B)
    with pretend_cuda(has_numbers=False) as cuda:
        device = torch.device("cuda", 0)
        backbone = Backbone(
            name="ViT-B",
            model=model.to(device).eval(),
            config=VIT_B,
            image_mean=(0.5, 0.5, 0.5),
            image_std=(0.25, 0.25, 0.25),
            device=device,
            autocast="bfloat16",
        )
        weights = cuda.clocks.live_bytes
        frames = config.frames_per_batch("cuda")
        shape = (frames, 3, config.frame_size, config.frame_size)
        ahead = [torch.empty(shape, dtype=torch.uint8, device=device) for _ in range(2)]
        backbone.tokens(ahead[0])  # makes tables that later batches find
        cuda.counts.clear()
        with counting_flops() as flops:
            backbone.tokens(ahead[1])
        total = {
            "launches": cuda.counts.num_launches,
            "waits": cuda.counts.num_waits,
            "flops": flops.get_total_flops(),
        }
    return {
        "gpus": num_gpus,
        "gpu_gb": gigabytes,
        "samples_per_gpu": frames,
        **total,
        "weights_bytes": weights,
        "peak_bytes": cuda.clocks.peak_bytes,
        **bound(total, gigabytes),
    }


EXTRACTED = ("extract", "targets")


def count(name: str) -> dict[str, Any]:
    """The row of a config, or of one in MORE."""
    path = CONFIGS / f"{name.partition(' ')[0]}.yaml"
    if path.parent.name in TRAINED:
        return count_step(path, MORE.get(name, {}))
    return count_batch(path)


def row_of(name: str, row: dict[str, Any]) -> str:
    """The row of a config in docs/training.md."""
    cells = (
        name,
        f"{row['gpus']} x {row['gpu_gb']} GB",
        f"{row['samples_per_gpu']}, {row['portion']} at a time",
        f"{row['peak_bytes'] / 1e9:.1f} GB",
        f"{row['launches']:,}",
        f"{row['launch_s']:.3g} s",
        f"{row['compute_s']:.3g} s",
    )
    return f"| {' | '.join(cells)} |"


def shipped() -> list[str]:
    """The name of every shipped config, as FOLDER/NAME."""
    kinds = (*TRAINED, *EXTRACTED)
    paths = (path for kind in kinds for path in sorted((CONFIGS / kind).glob("*.yaml")))
    return [f"{path.parent.name}/{path.stem}" for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="FOLDER/NAME of configs; none: all")
    names = parser.parse_args().names
    rows = {}
    for name in (*shipped(), *MORE):
        if not names or name in names:
            rows[name] = count(name)
            print(name, json.dumps(rows[name]), flush=True)
    if not names:
        file = Path(__file__).with_suffix(".json")
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
