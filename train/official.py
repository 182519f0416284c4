"""Released checkpoints <-> our model folders: DeltaTok, DeltaWorld, DINOWorld and the three heads.

A released file (`pytorch_model.bin`, `last.ckpt`) is a dict of tensors, or holds one under
"state_dict"; names are those of our modules. It is read with weights_only=True, so a pickle that
runs code is refused, and must fit exactly: unlike the released loader, which ignores names it does
not know. What shapes do not tell (class, head counts, rotary axes) is the released default, or
given. Used by the import-official and export-official commands.
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
from .official_configs import CLASSES, Tensors, guess_class, infer_config
from .pretrained import Pretrained, compare_tensors, load_weights, read_class, read_tensors

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
