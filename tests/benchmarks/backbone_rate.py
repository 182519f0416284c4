"""The backbone alone, on frames that are in memory already. Used by extraction.py and tests/gpu."""

import time
from pathlib import Path

import torch

from deltatok.extract.backbone import Backbone
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone

BACKBONES = {
    "vit-b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "small": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3},
}
LONGEST_S = 600.0
"""At most so long the backbone is timed, each time: enough for two full batches anywhere."""


def make_backbone(folder: Path, size: str) -> Path:
    """A model folder of random weights; size: one of BACKBONES."""
    return make_tiny_backbone(TinyBackboneConfig(out=str(folder), **BACKBONES[size]))


@torch.inference_mode()
def frames_per_s(backbone: Backbone, *, num_frames: int, frame_size: int, min_s: float) -> float:
    """In batches of num_frames, the rows copied back as float16."""
    shape = (num_frames, 3, frame_size, frame_size)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8).to(backbone.device)

    def seconds() -> float:
        start_s = time.monotonic()
        backbone.tokens(frames).half().cpu()  # which waits for the device
        return time.monotonic() - start_s

    seconds()  # the first batch of a shape allocates and chooses kernels
    spent = [seconds()]
    while sum(spent) < min_s and sum(spent) + spent[0] < LONGEST_S:
        spent.append(seconds())
    return num_frames * len(spent) / sum(spent)


def flop_per_frame(backbone: Backbone, frame_size: int) -> float:
    """Multiply-adds counted twice, in matrix products alone."""
    config, (rows, columns) = backbone.config, backbone.grid(frame_size)
    tokens = rows * columns + 1 + config.num_register_tokens
    width = backbone.hidden_size
    products = tokens * (4 * width**2 + 2 * width * config.intermediate_size)
    attention = 2 * tokens**2 * width
    patches = rows * columns * 3 * backbone.patch_size**2 * width
    return float(2 * (config.num_hidden_layers * (products + attention) + patches))
