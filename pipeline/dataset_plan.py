"""`deltatok-extract --dataset ... --plan`: the targets of a data set and what they would take.

The data set is looked through as an extraction does; of the backbone one batch is timed.
"""

import time

import torch

from ..extract.backbone import load_backbone
from ..extract.datasets.base import DatasetConfig
from ..extract.datasets.registry import find_targets
from ..extract.sources.clip import Unreadable
from .plan_probe import synchronise
from .plan_text import hours_text

SHOWN = 10
"""Incomplete targets that are named."""
BYTES = {"float16": 2, "bfloat16": 2, "int8": 1}


def dataset_plan(config: DatasetConfig) -> str:
    """Lines for people; UsageError as an extraction would."""
    policy, clips = find_targets(config)
    bad = [(clip.key, clip.source.reason) for clip in clips if isinstance(clip.source, Unreadable)]
    targets = [clip.target for clip in clips if not isinstance(clip.source, Unreadable)]
    squares = sum(t is not None and t.label_size[0] == t.label_size[1] for t in targets)
    windows = 2 * len(targets) - squares
    frames = windows * policy.num_frames
    backbone = load_backbone(config.to_extraction())
    height, width = backbone.grid(config.frame_size)
    size = frames * height * width * backbone.hidden_size * BYTES[config.dtype]
    batch = config.frames_per_batch(backbone.device.type)
    pixels = torch.zeros(
        (batch, 3, config.frame_size, config.frame_size), dtype=torch.uint8, device=backbone.device
    )
    with torch.inference_mode():
        for _ in range(2):  # the first one warms up
            synchronise(backbone.device)
            begin_s = time.perf_counter()
            backbone.tokens(pixels)
            synchronise(backbone.device)
    hours = (time.perf_counter() - begin_s) * frames / batch / 3600
    lines = [
        f"targets              {len(targets)} complete, {len(bad)} incomplete",
        f"windows              {windows} (two crops a target, one where its label is square)",
        f"frames               {frames}, {policy.num_frames} a window, "
        f"{policy.stride_s:g} s apart ({policy.fps:g} a second)",
        f"bytes of tokens      {size:,} ({config.dtype})",
        f"backbone             {hours_text(hours)} on {backbone.device.type}, from one batch of "
        f"{batch}",
    ]
    lines += [f"incomplete           {key}: {reason}" for key, reason in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"                     and {len(bad) - SHOWN} more")
    return "\n".join(lines)
