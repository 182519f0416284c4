"""The config of a released checkpoint, from the names and shapes of its tensors. For official.py.

What shapes do not tell is the released default: 64 channels a head, the rotary axes, a delta (not
frame) tokenizer, DeltaWorld rather than DINOWorld; the caller overrides it where it is wrong.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..shards.errors import DeltatokError, UsageError
from .models.deltatok import DeltaTok
from .models.deltaworld import DeltaWorld
from .models.dinoworld import DINOWorld
from .models.heads import DepthHead, SegmentationHead
from .models.rgb_head import RGBHead
from .pretrained import Pretrained, read_tensors

Tensors = Mapping[str, Tensor]

CLASSES: dict[str, type[Pretrained]] = {
    cls.__name__: cls
    for cls in (DeltaTok, DeltaWorld, DINOWorld, SegmentationHead, DepthHead, RGBHead)
}
HEAD_DIM = 64  # channels of an attention head in every released model (ViT-B/16: 768 / 12)
RELEASED_DEPTH_BINS = 256


def guess_class(tensors: Tensors) -> str:
    """The class whose names these are; predictors are taken for DeltaWorld, heads of 256 outputs
    for depth heads."""
    if "z_embed.weight" in tensors:
        return "DeltaTok"
    if "predictor.head.weight" in tensors:
        return "DeltaWorld"
    if "decoder_embed.weight" in tensors:
        return "RGBHead"
    if "bn.weight" in tensors and "head.weight" in tensors:
        depth = len(tensors["head.weight"]) == RELEASED_DEPTH_BINS
        return "DepthHead" if depth else "SegmentationHead"
    raise DeltatokError(
        f"no released model has these tensors: {sorted(tensors)[:5]}...; names must have no prefix"
    )


def infer_config(class_name: str, tensors: Tensors, overrides: Mapping[str, Any]) -> Any:
    """The config that tensor shapes tell, with overrides on top."""
    try:
        values = _INFER[class_name](tensors)
    except (KeyError, IndexError) as error:
        raise DeltatokError(
            f"this is no {class_name}: {error} is missing or has too few dimensions; "
            "pass another file or class"
        ) from error
    cls = CLASSES[class_name].config_class
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise UsageError(f"{class_name} has no config field {unknown}; known: {known}")
    values |= {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
    missing = sorted(set(_required(cls)) - set(values))
    if missing:
        raise UsageError(
            f"{class_name}: {missing} are not in the checkpoint; pass them "
            "(rgb_constants gives the RGB head's from the backbone's folder)"
        )
    return cls(**values)


def rgb_constants(backbone_folder: Path | str) -> dict[str, Any]:
    """The RGB head's config fields that come from a backbone's folder (Hugging Face layout)."""
    folder = Path(backbone_folder)
    tensors = read_tensors(folder / "model.safetensors")
    try:
        weight, bias = tensors["norm.weight"], tensors["norm.bias"]
        preprocessor = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        mean, std = preprocessor["image_mean"], preprocessor["image_std"]
    except (KeyError, OSError, ValueError) as error:
        raise UsageError(
            f"{folder}: {error}; wanted a backbone folder with norm.weight, norm.bias and a "
            "preprocessor_config.json with image_mean and image_std"
        ) from error
    return {
        "feature_weight": tuple(weight.float().tolist()),
        "feature_bias": tuple(bias.float().tolist()),
        "image_mean": tuple(mean),
        "image_std": tuple(std),
    }


def _infer_tokenizer(tensors: Tensors) -> dict[str, Any]:
    size = tensors["z_embed.weight"].shape[1]
    block = "encoder_blocks.0."
    use_swiglu = f"{block}mlp.gate_proj.weight" in tensors
    mlp_size = tensors[f"{block}mlp.up_proj.weight"].shape[0]
    values: dict[str, Any] = {
        "hidden_size": size,
        "num_hidden_layers": _count(tensors, "encoder_blocks."),
        "intermediate_size": mlp_size,
        "use_qk_norm": f"{block}attention.q_norm.weight" in tensors,
        "use_gated_attn": f"{block}attention.attn_gate.weight" in tensors,
        "use_swiglu": use_swiglu,
    }
    if use_swiglu:  # the plain width, of which two thirds were built: usually four times the size
        usual = 4 * size
        values["intermediate_size"] = (
            usual if 2 * usual // 3 == mlp_size else (3 * mlp_size + 1) // 2
        )
    if values["use_gated_attn"]:
        values["num_attention_heads"] = tensors[f"{block}attention.attn_gate.weight"].shape[0]
    elif values["use_qk_norm"]:
        values["num_attention_heads"] = size // len(tensors[f"{block}attention.q_norm.weight"])
    else:
        values["num_attention_heads"] = max(1, size // HEAD_DIM)
    return values


def _infer_world(tensors: Tensors) -> dict[str, Any]:
    block = "predictor.blocks.0."
    size, predictor_size = tensors["predictor.head.weight"].shape
    return {
        "hidden_size": size,
        "predictor_hidden_size": predictor_size,
        "predictor_num_hidden_layers": _count(tensors, "predictor.blocks."),
        "predictor_num_heads": max(1, predictor_size // HEAD_DIM),
        "mlp_ratio": tensors[f"{block}mlp.up_proj.weight"].shape[0] // predictor_size,
        "use_bom": "q_embed.weight" not in tensors,
    }


def _infer_segmentation(tensors: Tensors) -> dict[str, Any]:
    classes, size = tensors["head.weight"].shape[:2]
    return {"in_size": size, "num_classes": classes}


def _infer_depth(tensors: Tensors) -> dict[str, Any]:
    bins, size = tensors["head.weight"].shape[:2]
    return {"in_size": size, "num_bins": bins}


def _infer_rgb(tensors: Tensors) -> dict[str, Any]:
    hidden_size, in_size = tensors["decoder_embed.weight"].shape
    patch = round((len(tensors["decoder_pred.weight"]) / 3) ** 0.5)
    values = {
        "in_size": in_size,
        "hidden_size": hidden_size,
        "depth": _count(tensors, "decoder_layers."),
        "mlp_size": len(tensors["decoder_layers.0.intermediate.dense.weight"]),
        "patch": patch,
    }
    if "decoder_pos_embed" in tensors:
        side = round((tensors["decoder_pos_embed"].shape[1] - 1) ** 0.5)
        values["img_size"] = side * patch
    return values


def _count(tensors: Tensors, prefix: str) -> int:
    """How many numbered blocks follow a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def _required(cls: type[Any]) -> list[str]:
    return [
        field.name
        for field in fields(cls)
        if field.default is MISSING and field.default_factory is MISSING
    ]


_INFER = {
    "DeltaTok": _infer_tokenizer,
    "DeltaWorld": _infer_world,
    "DINOWorld": _infer_world,
    "SegmentationHead": _infer_segmentation,
    "DepthHead": _infer_depth,
    "RGBHead": _infer_rgb,
}
