"""Released checkpoints <-> our model folders: DeltaTok, DeltaWorld, DINOWorld and the three heads.

A released file (`pytorch_model.bin`, `last.ckpt`) is a dict of tensors, or holds one under
"state_dict"; names are those of our modules. It is read with weights_only=True, so a pickle that
runs code is refused, and must fit exactly: unlike the released loader, which ignores names it does
not know. The config follows from the names and shapes of the tensors; what they do not tell is the
released default: 64 channels a head, the rotary axes, a delta (not frame) tokenizer, DeltaWorld
rather than DINOWorld. The caller overrides it where it is wrong.
"""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..shards.errors import DeltatokError, UsageError
from ..shards.files import partial_path, publish, sha256_file
from ..shards.schema import load, read_json
from .engine.model_folder import Pretrained, compare_tensors, load_weights, read_class, read_tensors
from .models.deltatok import DeltaTok
from .models.deltaworld import DeltaWorldNetwork
from .models.dinoworld import DINOWorld
from .models.heads import DepthHead, SegmentationHead
from .models.rgb_head import RGBHead

Tensors = Mapping[str, Tensor]

CLASSES: dict[str, type[Pretrained]] = {
    cls.saved_as: cls
    for cls in (DeltaTok, DeltaWorldNetwork, DINOWorld, SegmentationHead, DepthHead, RGBHead)
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
        values = _infer(class_name, tensors) | dict(overrides)
    except (KeyError, IndexError) as error:
        raise DeltatokError(
            f"this is no {class_name}: {error} is missing or has too few dimensions; "
            "pass another file or class"
        ) from error
    constants = {"feature_weight", "feature_bias"}
    if class_name == "RGBHead" and not constants <= values.keys():
        raise UsageError(
            f"RGBHead: {sorted(constants - values.keys())} are not in the checkpoint; pass them "
            "(rgb_constants gives them from the backbone's folder)"
        )
    return load(CLASSES[class_name].config_class, values, where=class_name)


def rgb_constants(backbone_folder: Path | str) -> dict[str, Any]:
    """The RGB head's config fields that come from a backbone's folder (Hugging Face layout)."""
    folder = Path(backbone_folder)
    tensors = read_tensors(folder / "model.safetensors")
    try:
        weight, bias = tensors["norm.weight"], tensors["norm.bias"]
        preprocessor = read_json(folder / "preprocessor_config.json")
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


def _infer(class_name: str, tensors: Tensors) -> dict[str, Any]:
    if class_name == "DeltaTok":
        return _infer_tokenizer(tensors)
    if class_name in ("DeltaWorld", "DINOWorld"):
        return _infer_world(tensors)
    if class_name == "RGBHead":
        return _infer_rgb(tensors)
    outputs, size = tensors["head.weight"].shape[:2]
    return {"in_size": size, "num_bins" if class_name == "DepthHead" else "num_classes": outputs}


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


_DAMAGE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)
"""What torch.load raised for 6,000 checkpoints with flipped bytes or a cut-off end."""

RUNNING_STATISTICS = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")


def import_official(
    file: Path | str,
    out: Path | str,
    *,
    class_name: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Pretrained:
    """Write the model folder `out` from a released checkpoint; gives the model, on the CPU.

    class_name, one of CLASSES, is guessed from the tensor names where it is None; overrides are
    config fields that shapes do not tell. DeltatokError lists every tensor that does not fit.
    """
    tensors = read_official(Path(file))
    name = class_name or guess_class(tensors)
    if name not in CLASSES:
        raise UsageError(f"class {name!r}: wanted one of {sorted(CLASSES)}")
    config = infer_config(name, tensors, overrides or {})
    model = build_official(name, config, tensors, source=str(file))
    origin = {"file": Path(file).name, "sha256": sha256_file(Path(file))}
    model.save_pretrained(out, {"imported_from": origin})
    return model


def export_official(model_dir: Path | str, file: Path | str) -> None:
    """Write a model folder's weights as a released checkpoint: {"state_dict": {name: float32}}."""
    name = read_class(model_dir)
    if name not in CLASSES:
        raise UsageError(f"{model_dir} holds a {name}, wanted one of {sorted(CLASSES)}")
    model = CLASSES[name].from_pretrained(model_dir)
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(file)
    try:
        torch.save({"state_dict": state}, partial)
        publish(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def read_official(file: Path) -> dict[str, Tensor]:
    """The tensors of a released checkpoint, on the CPU. Runs no code of the file."""
    if not file.is_file():
        raise UsageError(f"{file}: no such file; download the checkpoint and pass its path")
    if file.suffix == ".safetensors":
        return read_tensors(file)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DeltatokError(
            f"{file}: refused, it holds more than tensors and plain values, or is no checkpoint; "
            "get the file from its publisher again"
        ) from error
    except _DAMAGE as error:
        raise DeltatokError(
            f"{file}: not readable as a PyTorch checkpoint ({_first_line(error)}); "
            "download it again"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise DeltatokError(
            f'{file}: wanted a dict of tensors, or one under "state_dict"; this is another file'
        )
    return state


def build_official(class_name: str, config: Any, tensors: Tensors, *, source: str) -> Pretrained:
    """The model with exactly these tensors; running statistics and the fixed position table, which
    a released file may leave out, stay as in a fresh model."""
    cls = CLASSES[class_name]
    with torch.device("meta"):
        model = cls(config)
    optional = (*RUNNING_STATISTICS, "decoder_pos_embed")
    problems = compare_tensors(model.state_dict(), tensors, optional=optional)
    if problems:
        raise DeltatokError(
            f"{source} does not fit {class_name} with {asdict(config)}:\n  "
            + "\n  ".join(problems)
            + "\npass the class and config fields it was trained with"
        )
    absent = [name for name in model.state_dict() if name not in tensors]
    fresh = cls(config).state_dict() if absent else {}
    load_weights(model, {**tensors, **{name: fresh[name] for name in absent}}, source=source)
    return model.eval()


def _first_line(error: BaseException) -> str:
    """torch's messages go on with advice to switch the safe loading off."""
    return (str(error).splitlines() or [type(error).__name__])[0]
