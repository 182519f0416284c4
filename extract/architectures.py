"""The vision models of transformers that can be a backbone, and where each has its patch tokens.

A model type that is not in `ARCHITECTURES` is refused: which of its tokens are patches would be a
guess. To add one: a line there, and a case in tests/extract/test_architectures.py.

    type             tokens before the patches   position embeddings at another frame size
    dinov3_vit       class, registers            rotary: none to resize
    dinov3_convnext  pooled                      none
    dinov2           class                       bicubic
    dinov2_with_registers  class, registers      bicubic, antialiased
    clip             class                       bicubic
    siglip           none                        bicubic
    siglip2          none                        bilinear, antialiased (NaFlex)

They are resized as transformers resizes them, so every frame size that is a multiple of the patch
is possible. SigLIP 2 of fixed resolution is of type siglip. Of CLIP and SigLIP the vision tower
alone is loaded, from a folder of both towers or of that one.

B frames, F tokens before the patches, N patches, D channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..shards.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model type."""

    model: str
    """The class in transformers."""
    norm: str
    """Name of the final LayerNorm among the model's modules."""
    num_class_tokens: int = 1
    """Before the patch tokens, with the registers that the config counts behind them."""
    is_normed: bool = True
    """Whether `last_hidden_state` is behind the final norm. CLIP norms its class token alone."""
    takes: Literal["pixels", "pixels and interpolation", "patches"] = "pixels"
    """What `forward` wants; without asking for it, some refuse other sizes than their own."""
    is_pyramid: bool = False
    """Blocks of other grids than the last one's, which cannot be put beside it."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "dinov3_vit": Architecture(model="DINOv3ViTModel", norm="norm"),
    "dinov3_convnext": Architecture(
        model="DINOv3ConvNextModel", norm="layer_norm", is_pyramid=True
    ),
    "dinov2": Architecture(model="Dinov2Model", norm="layernorm"),
    "dinov2_with_registers": Architecture(model="Dinov2WithRegistersModel", norm="layernorm"),
    "clip": Architecture(
        model="CLIPVisionModel",
        norm="post_layernorm",
        is_normed=False,
        takes="pixels and interpolation",
    ),
    "siglip": Architecture(
        model="SiglipVisionModel",
        norm="post_layernorm",
        num_class_tokens=0,
        takes="pixels and interpolation",
    ),
    "siglip2": Architecture(
        model="Siglip2VisionModel", norm="post_layernorm", num_class_tokens=0, takes="patches"
    ),
}


def architecture_of(model_type: object, *, where: str) -> Architecture:
    """That of a config.json's `model_type`; UsageError, naming those there are, for another."""
    name = str(model_type).removesuffix("_vision_model")
    if name not in ARCHITECTURES:
        raise UsageError(
            f"backbone {where}: model_type is {model_type!r}, wanted one whose patch tokens are "
            f"known: {', '.join(ARCHITECTURES)}: give one of these"
        )
    return ARCHITECTURES[name]


def patch_size_of(config: Any) -> int:
    """Side of a patch in pixels; of a ConvNeXt what all stages together make of one: 4, 2, 2, 2."""
    if hasattr(config, "hidden_sizes"):
        return 4 * int(2 ** (len(config.hidden_sizes) - 1))
    return int(config.patch_size)


def width_of(config: Any) -> int:
    """Channels of the last hidden state."""
    sizes = getattr(config, "hidden_sizes", None)
    return int(sizes[-1] if sizes else config.hidden_size)


def num_tokens_before(architecture: Architecture, config: Any) -> int:
    """F: class token and register tokens."""
    return architecture.num_class_tokens + int(getattr(config, "num_register_tokens", 0))


def check_layers(
    architecture: Architecture, config: Any, layers: Sequence[int], *, where: str
) -> None:
    """Raises UsageError unless the model has all these blocks, each named once, in order."""
    if not layers:
        return
    if architecture.is_pyramid:
        raise UsageError(
            f"layers: got {_listed(layers)}, but {where} is a {architecture.model}, whose blocks "
            "have grids of several sizes: leave --layers out, or give a ViT"
        )
    most = int(config.num_hidden_layers)
    if not all(1 <= layer <= most for layer in layers):
        raise UsageError(
            f"layers: got {_listed(layers)}, but {where} has blocks 1 to {most}: give some of these"
        )


def model_inputs(
    architecture: Architecture, config: Any, pixels: Tensor, *, layers: Sequence[int] = ()
) -> dict[str, Any]:
    """The arguments of `forward` for float32 pixels (B, 3, H, W)."""
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if architecture.takes == "pixels and interpolation":
        inputs["interpolate_pos_encoding"] = True
    elif architecture.takes == "patches":
        patch = patch_size_of(config)
        num_frames, height, width = len(pixels), *(side // patch for side in pixels.shape[-2:])
        blocks = pixels.reshape(num_frames, -1, height, patch, width, patch)
        inputs["pixel_values"] = blocks.permute(0, 2, 4, 3, 5, 1).reshape(
            num_frames, height * width, -1
        )  # (B, N, patch * patch * 3), as transformers' convert_image_to_patches
        inputs["pixel_attention_mask"] = None  # no padding: every frame is of one size
        inputs["spatial_shapes"] = torch.tensor([(height, width)] * num_frames)
    if layers:
        inputs["output_hidden_states"] = True
    return inputs


def hidden_tokens(
    architecture: Architecture, model: nn.Module, output: Any, *, layers: Sequence[int] = ()
) -> Tensor:
    """(B, F + N, D): the last hidden state behind the final norm.

    With layers, (B, F + N, len(layers) * D): the states behind those blocks (1 is the first), each
    through the final norm, beside one another in the order given; as DINOv2's
    get_intermediate_layers, which DINO-Foresight uses.
    """
    last = cast(Tensor, output.last_hidden_state)
    if architecture.is_normed and not layers:
        return last
    norm = _module(model, architecture.norm)
    last = last if architecture.is_normed else cast(Tensor, norm(last))
    if not layers:
        return last
    states = output.hidden_states  # the first is the embedding
    num_blocks = len(states) - 1
    return torch.cat([last if n == num_blocks else norm(states[n]) for n in layers], dim=-1)


def _module(model: nn.Module, name: str) -> nn.Module:
    """The outermost module of this name: releases of transformers nest them differently."""
    paths = [path for path, _ in model.named_modules() if path.split(".")[-1] == name]
    return model.get_submodule(min(paths, key=lambda path: path.count(".")))


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))
