"""A small DINOv3 with fixed random weights, saved as an ordinary model folder.

The quickstart needs a backbone and cannot fetch one; `deltatok-extract --backbone DIR` loads this
folder exactly as it loads a downloaded DINOv3.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from ...shards.files import partial_path, publish, write_json


@dataclass(frozen=True, kw_only=True)
class TinyBackboneConfig:
    """Size of the random backbone."""

    out: str
    """Folder for the model: config.json, model.safetensors, preprocessor_config.json."""
    hidden_size: int = 96
    """Width D of the patch tokens."""
    num_hidden_layers: int = 3
    """Transformer blocks."""
    num_attention_heads: int = 4
    """Attention heads; hidden_size / heads must be a multiple of 4 (2-D rotary positions)."""
    patch_size: int = 16
    """Side of a patch, pixels."""
    seed: int = 0
    """Seed of the weights."""


def make_tiny_backbone(config: TinyBackboneConfig) -> Path:
    """Write the model folder (once) and give its path."""
    out = Path(config.out)
    if (out / "config.json").exists():
        return out
    settings = DINOv3ViTConfig(
        hidden_size=config.hidden_size,
        intermediate_size=4 * config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        patch_size=config.patch_size,
        num_register_tokens=4,
        layerscale_value=1.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = DINOv3ViTModel(settings)
    partial = partial_path(out)
    model.save_pretrained(partial)
    mean_std = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    processor = {"image_processor_type": "DINOv3ViTImageProcessorFast", "rescale_factor": 1 / 255}
    write_json(partial / "preprocessor_config.json", processor | mean_std)
    publish(partial, out)
    return out
