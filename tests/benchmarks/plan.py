"""What `--plan` says against what is then written, and against the clock.

    python tests/benchmarks/plan.py --videos PATH --json FILE

Plans an extraction through a random backbone (made by code) into a temporary folder, then does it.
Goals: plan_bytes_over_written in 0.98..1.02, plan_hours_over_clock in 0.75..1.25.

JSON: plan_bytes_over_written, plan_hours_over_clock, and what both are made of.
"""

import argparse
import json
import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deltatok.extract.run import run_extraction
from deltatok.pipeline.commands.extract import VideosConfig
from deltatok.pipeline.cost_plan import plan_extraction, plan_text
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone

BACKBONES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "small": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3},
    "vit-b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}


def main() -> None:
    """Runs the benchmark; prints the result and writes it to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", required=True, nargs="+", help="files, folders or lists")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--backbone", choices=BACKBONES, default="small", help="size [small]")
    parser.add_argument("--frame-size", type=int, default=128, help="pixels a side [128]")
    parser.add_argument("--dtype", default="float16", help="float16, bfloat16 or int8 [float16]")
    parser.add_argument("--compression", default="none", help="none or zstd [none]")
    parser.add_argument("--fps", type=float, help="uniform sampling at this rate [windows]")
    parser.add_argument("--windows", type=int, default=4, help="windows a clip [4]")
    parser.add_argument("--probe-clips", type=int, help="clips that are tried [16 or more]")
    parser.add_argument("--workers", type=int, help="decoding processes [one a core]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with TemporaryDirectory() as folder:
        result = _measure(arguments, Path(folder))
    text = json.dumps(result, indent=1)
    arguments.json.write_text(f"{text}\n")
    print(text)


def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    settings = BACKBONES[arguments.backbone]
    make_tiny_backbone(TinyBackboneConfig(out=str(folder / "backbone"), **settings))
    config = VideosConfig(
        videos=tuple(arguments.videos),
        out=str(folder / "cache"),
        backbone=str(folder / "backbone"),
        frame_size=arguments.frame_size,
        sampling="windows" if arguments.fps is None else "uniform",
        fps=arguments.fps,
        num_windows=arguments.windows,
        dtype=arguments.dtype,
        compression=arguments.compression,
        workers=arguments.workers,
        device=arguments.device,
        max_quarantined=1.0,
    )
    start_s = time.monotonic()
    plan = plan_extraction(config, num_clips=arguments.probe_clips)
    plan_s = time.monotonic() - start_s
    print(plan_text(plan))
    summary = run_extraction(config)
    written = sum(p.stat().st_size for p in (folder / "cache").rglob("*") if p.is_file())
    planned = plan.bytes
    return {
        "plan_bytes_over_written": planned / written,
        "plan_hours_over_clock": plan.clock_hours * 3600 / summary.seconds,
        "plan_bytes": planned,
        "written_bytes": written,
        "plan_clock_s": plan.clock_hours * 3600,
        "clock_s": summary.seconds,
        "planning_s": plan_s,
        "plan_windows": plan.windows,
        "windows": summary.windows,
        "clips": summary.clips,
        "probed": plan.probed,
        "plan_quarantined_share": plan.quarantined_share,
        "quarantined": summary.quarantined,
        "plan_slowest_stage": plan.slowest_stage,
        "slowest_stage": summary.slowest_stage,
        "device": plan.device,
        "backbone": arguments.backbone,
        "frame_size": config.frame_size,
        "sampling": config.sampling,
        "dtype": config.dtype,
        "compression": config.compression,
    }


if __name__ == "__main__":
    main()
