"""Where a backbone's files lie, and what is read from them: the network and its mean and std.

Called by backbone.py. A hub id is downloaded (or found in the hub's cache) as config.json,
preprocessor_config.json and safetensors files only; nothing pickled is ever read.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HFValidationError
from safetensors import SafetensorError
from torch import nn

from ..shards.errors import UsageError

_LOGGER = logging.getLogger(__name__)
_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
_PREPROCESSOR = "preprocessor_config.json"


def find_folder(name: str) -> Path:
    """The local folder of a backbone: `name` itself, or where the hub's files were put.

    Raises UsageError if it is neither a folder nor a hub id that can be downloaded here.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or name.startswith(".") or Path(name).exists():
        raise UsageError(f"backbone {name}: no such folder: pass a folder with {_FILES[0]}")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
    except HFValidationError as error:
        raise UsageError(
            f"backbone {name}: neither a folder nor a hub id (owner/name): {error}"
        ) from error
    except GatedRepoError as error:
        raise UsageError(
            f"backbone {name}: its licence has not been accepted by this account: open "
            f"https://huggingface.co/{name}, accept it and log in (hf auth login), or pass a "
            "local folder that holds the weights"
        ) from error
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"backbone {name}: not a folder, and not found on the hub ({reason}): check the name "
            "and the network, or pass a local folder that holds the weights"
        ) from error


def read_preprocessor(
    folder: Path,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """`image_mean` and `image_std` of preprocessor_config.json, red first, for pixels in 0-1.

    Raises UsageError if the file is missing or says something else than x/255, (x-mean)/std.
    """
    path = folder / _PREPROCESSOR
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder}: no {_PREPROCESSOR}, which says how pixels are normalised: copy it from "
            "where the backbone's weights come from"
        ) from error
    except ValueError as error:
        raise UsageError(f"{path}: no JSON ({error}): copy it again") from error
    triples = []
    for field in ("image_mean", "image_std"):
        values = settings.get(field) if isinstance(settings, dict) else None
        if not isinstance(values, list) or len(values) != 3:
            raise UsageError(f"{path}: {field} is {values!r}, wanted three numbers, red first")
        triples.append((float(values[0]), float(values[1]), float(values[2])))
    scale = settings.get("rescale_factor", 1 / 255)
    if settings.get("do_normalize", True) is not True or abs(scale * 255 - 1) > 1e-6:
        raise UsageError(
            f"{path}: wanted pixels times 1/255, then normalised, got rescale_factor {scale}, "
            f"do_normalize {settings.get('do_normalize')}: this backbone needs other code"
        )
    return triples[0], triples[1]


def load_frozen_model(folder: Path) -> tuple[nn.Module, Any]:
    """The network (float32, evaluation mode, no gradients, on the CPU) and its config.

    Raises UsageError if the weights are missing, incomplete or of an architecture that does not
    name its register tokens.
    """
    with _quiet_transformers():
        try:
            model, report = transformers.AutoModel.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UsageError(
                f"backbone {folder}: cannot be loaded ({error}): wanted config.json and "
                "model.safetensors of a DINOv3 ViT as transformers saves them"
            ) from error
    wanted = ("num_register_tokens", "patch_size", "hidden_size")
    if not all(isinstance(getattr(model.config, field, None), int) for field in wanted):
        raise UsageError(
            f"backbone {folder}: {type(model).__name__} does not say {', '.join(wanted)}: "
            "use a DINOv3 ViT"
        )
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise UsageError(
            f"backbone {folder}: the weights lack {len(missing)} tensors of the right shape, "
            f"{missing[0]} first: the file belongs to another config.json"
        )
    _LOGGER.debug("loaded %s from %s", type(model).__name__, folder)
    return model.eval().requires_grad_(False), model.config


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no loading report of transformers; errors still raise."""
    logs = transformers.utils.logging
    verbosity, had_bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if had_bars:
            logs.enable_progress_bar()
