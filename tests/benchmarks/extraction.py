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
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from deltatok.extract.backbone import Backbone, load_backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.run import run_extraction
from deltatok.extract.sources.find import find_clips

sys.path.append(str(Path(__file__).parent))
from backbone_rate import BACKBONES, flop_per_frame, frames_per_s, make_backbone

FORWARD_MIN_S = 3.0


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
        result = measure(arguments, Path(folder))
    text = json.dumps(result, indent=1)
    arguments.json.write_text(f"{text}\n")
    print(text)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The result; `arguments` as `main` parses them, `folder` for what is made."""
    make_backbone(folder / "backbone", arguments.backbone)
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
    batch_frames = config.frames_per_batch(backbone.device.type)
    alone = partial(
        frames_per_s,
        backbone,
        num_frames=max(1, batch_frames // config.num_frames) * config.num_frames,
        frame_size=config.frame_size,
        min_s=arguments.forward_seconds,
    )
    before = alone()
    summary = run_extraction(config, backbone=backbone)
    after = alone()
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
        "forward_tflop_per_s": forward * flop_per_frame(backbone, config.frame_size) / 1e12,
        "backbone": arguments.backbone,
        "batch_frames": batch_frames,
        "workers": config.workers,
        "clips": summary.clips,
        "quarantined": summary.quarantined,
        "frames": summary.frames,
        "seconds": summary.seconds,
        "bytes_per_frame": summary.bytes / max(summary.frames, 1),
    }


def _device(backbone: Backbone) -> str:
    if backbone.device.type == "cuda":
        return torch.cuda.get_device_name(backbone.device)
    return f"{platform.machine()} cpu, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
