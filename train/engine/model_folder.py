"""Model folders: config.json, model.safetensors, provenance.json; saved and loaded strictly.

folder/config.json        {"class": "DeltaTok", every field of its config}; written last
folder/model.safetensors  the weights under the released parameter names
folder/provenance.json    what the weights were trained on
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...shards.errors import DeltatokError, UsageError
from ...shards.files import local_path, partial_path, publish, write_json
from ...shards.schema import Strictness, load

MODEL = Strictness(
    UsageError,
    is_typed=False,
    needs_all=True,
    advice=": it was written by another version, or edited; write the model folder again",
)
"""config.json has every field of the model's config, and nothing else."""
CONFIG, WEIGHTS, PROVENANCE = "config.json", "model.safetensors", "provenance.json"


class Pretrained(nn.Module):
    """A module that is built from one frozen config and lives in a model folder."""

    config_class: ClassVar[type[Any]]
    saved_as: ClassVar[str]
    """The class that config.json states; the name of the Python class, unless it says otherwise."""
    config: Any

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "saved_as" not in cls.__dict__:
            cls.saved_as = cls.__name__

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def save_pretrained(self, folder: Path | str, provenance: Mapping[str, Any]) -> None:
        """Write the model folder; existing files of a model are replaced, others left alone."""
        save_model(self, folder, provenance)

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, device: torch.device | str = "cpu") -> Self:
        """The model of a folder, in eval mode. DeltatokError if anything does not fit exactly."""
        fields = _read_config(local_path(folder), cls.saved_as)
        config = load(cls.config_class, fields, where=str(Path(folder) / CONFIG), how=MODEL)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, read_tensors(Path(folder) / WEIGHTS), source=str(folder))
        return model.to(device).eval()


def save_model(model: Pretrained, folder: Path | str, provenance: Mapping[str, Any]) -> None:
    """Write weights, provenance and, last, config.json; each under a partial name first."""
    folder = local_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = partial_path(folder / WEIGHTS)
    try:
        save_tensors(
            {name: t.detach().contiguous() for name, t in model.state_dict().items()}, partial
        )
        publish(partial, folder / WEIGHTS)
    finally:
        partial.unlink(missing_ok=True)
    write_json(folder / PROVENANCE, dict(provenance))
    write_json(folder / CONFIG, config_json(model))


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a .safetensors file; OSError where the disk refuses."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # it wraps what the system said
        raise OSError(str(error)) from error


def config_json(model: Pretrained) -> dict[str, Any]:
    """What config.json says of a model."""
    return {"class": model.saved_as, **asdict(model.config)}


def read_class(folder: Path | str) -> str:
    """The class name that a model folder states, e.g. "DeltaTok"."""
    name = _read_json(Path(folder) / CONFIG).get("class")
    if not isinstance(name, str):
        raise DeltatokError(
            f'{Path(folder) / CONFIG}: no "class"; this is no deltatok model folder'
        )
    return name


def read_provenance(folder: Path | str) -> dict[str, Any]:
    """provenance.json of a model folder."""
    return _read_json(Path(folder) / PROVENANCE)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. DeltatokError if it is absent or damaged."""
    if not file.is_file():
        raise UsageError(f"{file}: no such file; pass a folder that save_pretrained has written")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise DeltatokError(
            f"{file}: not readable as safetensors ({error}); copy or train it again"
        ) from error


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Put tensors in a module, which may be on the meta device. Names and shapes must be equal.

    Values are converted to the module's dtypes. DeltatokError lists every missing, left-over and
    misshapen tensor at once.
    """
    wanted = model.state_dict()
    problems = compare_tensors(wanted, tensors)
    if problems:
        raise DeltatokError(
            f"{source} does not fit {type(model).__name__}:\n  "
            + "\n  ".join(problems)
            + "\ncheck that its config belongs to these weights"
        )
    converted = {name: tensors[name].to(wanted[name].dtype) for name in wanted}
    model.load_state_dict(converted, assign=True)


def compare_tensors(
    wanted: Mapping[str, Tensor],
    got: Mapping[str, Tensor],
    *,
    optional: Sequence[str] = (),
    dtypes: bool = False,
) -> list[str]:
    """One line for every difference in names, shapes and kinds; empty if there is none.

    dtypes: they must be equal; else whole numbers must not stand for others, or the reverse.
    """
    problems = [f"missing: {n}" for n in wanted if n not in got and n not in optional]
    problems += [f"left over: {n}" for n in sorted(got) if n not in wanted]
    for name in wanted:
        if name not in got:
            continue
        ours, theirs = wanted[name], got[name]
        if ours.shape != theirs.shape:
            problems.append(
                f"misshapen: {name}: got {tuple(theirs.shape)}, wanted {tuple(ours.shape)}"
            )
        elif ours.is_floating_point() != theirs.is_floating_point() or (
            dtypes and ours.dtype != theirs.dtype
        ):
            problems.append(f"mistyped: {name}: got {theirs.dtype}, wanted {ours.dtype}")
    return problems


def weights_sha256(module: nn.Module) -> str:
    """Hex SHA-256 over all parameters and saved buffers: name, dtype, shape and bytes, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        dtype = str(value.dtype).removeprefix("torch.")
        digest.update(f"{name} {dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """The fields in config.json, after its class was checked."""
    got = read_class(folder)
    if got != class_name:
        raise UsageError(f"{folder} holds a {got}, wanted a {class_name}; pass another folder")
    values = _read_json(folder / CONFIG)
    del values["class"]
    return values


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UsageError(f"{file}: no such file; pass a folder that save_pretrained has written")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DeltatokError(f"{file}: not readable as JSON ({error}); write it again") from error
    if not isinstance(value, dict):
        raise DeltatokError(
            f"{file}: got a {type(value).__name__}, wanted an object; write it again"
        )
    return value
