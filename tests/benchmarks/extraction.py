"""Extraction end to end against the backbone alone: how much of the device decoding and disk cost.

    python tests/benchmarks/extraction.py --videos PATH --json FILE

Clips go through a random backbone of the size of a ViT-B (made by code) into a float16 cache in a
temporary folder, 8 windows of each (the fewer, the more the start and end of the run weigh). Before
and after, the same backbone runs on frames that are in memory already, in the same process, at the
same batch shape. Goal: end_to_end_over_forward >= 0.95.

JSON: frames_per_s, forward_frames_per_s, end_to_end_over_forward, slowest_stage, device,
frame_size, forward_tflop_per_s, and what else was set or counted.
"""

import argparse
import json
import logging
import platform
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from deltatok.extract.backbone import Backbone, load_backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.run import run_extraction
from deltatok.extract.sources.find import find_clips
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone

BACKBONES = {
    "vit-b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "small": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3},
}
FORWARD_MIN_S = 3.0
FORWARD_S = 600.0
"""At most so long the backbone alone is timed, each time: enough for two full batches anywhere."""


def main() -> None:
    """Runs the benchmark; prints the result and writes it to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", required=True, nargs="+", help="files, folders or lists")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--backbone", choices=BACKBONES, default="vit-b", help="size [vit-b]")
    parser.add_argument("--frame-size", type=int, default=256, help="pixels a side [256]")
    parser.add_argument("--windows", type=int, default=8, help="windows a clip [8]")
    parser.add_argument("--batch-frames", type=int, help="frames in a batch [32 on a CPU]")
    parser.add_argument("--workers", type=int, help="decoding processes [one a core]")
    parser.add_argument("--limit", type=int, help="only the first so many clips [all]")
    parser.add_argument(
        "--forward-seconds",
        type=float,
        default=FORWARD_MIN_S,
        help=f"the backbone alone is timed so long at least, twice [{FORWARD_MIN_S:g}]",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with TemporaryDirectory() as folder:
        result = _measure(arguments, Path(folder))
    text = json.dumps(result, indent=1)
    arguments.json.write_text(f"{text}\n")
    print(text)


def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    settings = BACKBONES[arguments.backbone]
    make_tiny_backbone(TinyBackboneConfig(out=str(folder / "backbone"), **settings))
    clips = find_clips(arguments.videos)[: arguments.limit]
    config = ExtractConfig(
        videos=tuple(str(clip.path) for clip in clips)
        if arguments.limit
        else tuple(arguments.videos),
        out=str(folder / "cache"),
        backbone=str(folder / "backbone"),
        frame_size=arguments.frame_size,
        num_windows=arguments.windows,
        batch_frames=arguments.batch_frames,
        workers=arguments.workers,
        device=arguments.device,
        max_quarantined=1.0,
    )
    backbone = load_backbone(config)
    before = _forward(backbone, config, min_s=arguments.forward_seconds)
    summary = run_extraction(config, backbone=backbone)
    after = _forward(backbone, config, min_s=arguments.forward_seconds)
    forward = 2 / (1 / before + 1 / after)  # the rate of both runs together
    rate = summary.frames / summary.seconds
    return {
        "frames_per_s": rate,
        "forward_frames_per_s": forward,
        "forward_frames_per_s_before_and_after": [before, after],
        "end_to_end_over_forward": rate / forward,
        "slowest_stage": summary.slowest_stage,
        "device": _device(backbone),
        "frame_size": config.frame_size,
        "forward_tflop_per_s": forward * _flop_per_frame(backbone, config.frame_size) / 1e12,
        "backbone": arguments.backbone,
        "batch_frames": config.frames_per_batch(backbone.device.type),
        "workers": config.workers,
        "clips": summary.clips,
        "quarantined": summary.quarantined,
        "frames": summary.frames,
        "seconds": summary.seconds,
        "bytes_per_frame": summary.bytes / max(summary.frames, 1),
    }


@torch.inference_mode()
def _forward(backbone: Backbone, config: ExtractConfig, *, min_s: float) -> float:
    """Frames/s of the backbone alone, the rows copied back as float16."""
    batch_frames = config.frames_per_batch(backbone.device.type)
    num_frames = max(1, batch_frames // config.num_frames) * config.num_frames
    shape = (num_frames, 3, config.frame_size, config.frame_size)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8).to(backbone.device)

    def seconds() -> float:
        start_s = time.monotonic()
        backbone.tokens(frames).half().cpu()  # which waits for the device
        return time.monotonic() - start_s

    seconds()  # the first batch of a shape allocates and chooses kernels
    spent = [seconds()]
    while sum(spent) < min_s and sum(spent) + spent[0] < FORWARD_S:
        spent.append(seconds())
    return num_frames * len(spent) / sum(spent)


def _flop_per_frame(backbone: Backbone, frame_size: int) -> float:
    """Multiply-adds counted twice, in matrix products alone."""
    config, (rows, columns) = backbone.config, backbone.grid(frame_size)
    tokens = rows * columns + 1 + backbone.num_register_tokens
    width = backbone.hidden_size
    products = tokens * (4 * width**2 + 2 * width * config.intermediate_size)
    attention = 2 * tokens**2 * width
    patches = rows * columns * 3 * backbone.patch_size**2 * width
    return float(2 * (config.num_hidden_layers * (products + attention) + patches))


def _device(backbone: Backbone) -> str:
    if backbone.device.type == "cuda":
        return torch.cuda.get_device_name(backbone.device)
    return f"{platform.machine()} cpu, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
