"""The frozen backbone: uint8 frames to the patch tokens that the caches hold; and its device.

A vision model of transformers (architectures.py has which), with the mean and standard deviation of
its preprocessor_config.json. Its output is the last hidden state after the final LayerNorm, without
the class token and the register tokens; with `layers`, the states after those blocks, each through
the final LayerNorm too, side by side.

A hub id is downloaded (or found in the hub's cache) as config.json, preprocessor_config.json and
safetensors files only; nothing pickled is ever read.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HFValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from ..shards.errors import DeltatokError, UsageError
from ..shards.evaluation.geometry import FrameSize, frame_shape
from ..shards.files import local_path, read_text
from ..shards.patches.projection import Projection
from ..shards.running.devices import choose_device, precision_name
from .architectures import (
    Architecture,
    architecture_of,
    check_layers,
    hidden_tokens,
    model_inputs,
    num_tokens_before,
    patch_size_of,
    width_of,
)
from .config import ExtractConfig

_LOGGER = logging.getLogger(__name__)
_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
_PREPROCESSOR = "preprocessor_config.json"

Autocast = Literal["float32", "bfloat16"]

_CONFIG_FIELDS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "patch_size", "num_channels", "num_register_tokens", "hidden_act"),
    *("layer_norm_eps", "rope_theta", "use_gated_mlp", "query_bias", "key_bias", "value_bias"),
    *("proj_bias", "mlp_bias"),
)
"""What of a config decides the output: named one by one, because a whole config changes with the
version of transformers that wrote it. The rest (depths and widths, which position embeddings) the
names and shapes of the weights tell, and those are in their hash."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Backbone:
    """A frozen network on one device. Made by `Backbone.load`."""

    name: str
    """The hub id, or the name of the local folder. No part of the identity."""
    model: nn.Module
    config: Any
    """The transformers config of `model`."""
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    device: torch.device
    autocast: Autocast
    compile: bool = False
    layers: tuple[int, ...] = ()
    """The blocks (1 is the first) whose states are put side by side; none: the last state alone."""
    projection: Projection | None = None
    """What the features go through at last: principal components. By `dataclasses.replace`."""

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str | torch.device = "cpu",
        autocast: Autocast = "float32",
        compile: bool = False,
        layers: Sequence[int] = (),
    ) -> "Backbone":
        """The backbone of a local folder or a hub id, float32 weights, frozen, on `device`.

        autocast: precision of the products; `bfloat16` keeps norms and softmax in float32.
        compile: batches go through torch.compile, once for every shape; equal but for rounding.
        layers: blocks whose states are put side by side, each through the final norm.
        No network for a local folder. Raises UsageError if it cannot be had or is of another kind.
        """
        folder = find_folder(name)
        image_mean, image_std = read_preprocessor(folder)
        model, config = load_frozen_model(folder)
        architecture = architecture_of(config.model_type, where=str(folder))
        check_layers(architecture, config, layers, where=name)
        place = torch.device(device)
        return cls(
            name=folder.resolve().name if Path(name).is_dir() else name,
            model=model.to(place),
            config=config,
            image_mean=image_mean,
            image_std=image_std,
            device=place,
            autocast=autocast,
            compile=compile,
            layers=tuple(layers),
        )

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return patch_size_of(self.config)

    @property
    def hidden_size(self) -> int:
        """Numbers in a token, D."""
        if self.projection is not None:
            return len(self.projection.components)
        return self._width

    @property
    def _width(self) -> int:
        """Channels of the features, before a projection."""
        return width_of(self.config) * max(1, len(self.layers))

    @cached_property
    def _architecture(self) -> Architecture:
        return architecture_of(self.config.model_type, where=self.name)

    def grid(self, frame_size: FrameSize) -> tuple[int, int]:
        """Patch rows and columns of a frame; their product is N.

        Raises UsageError if a side of it is no multiple of the patch size.
        """
        height, width = frame_shape(frame_size)
        return self._num_patches(height), self._num_patches(width)

    @torch.inference_mode()
    def tokens(self, frames: Tensor) -> Tensor:
        """Post-norm patch tokens float32 (B, N, D), row-major patches, on the backbone's device;
        with a projection, their principal components.

        frames: uint8 (B, 3, H, W), RGB, 0-255, any device. Raises UsageError for sides that are
        no multiple of the patch size.
        """
        num_patches = self._num_patches(frames.shape[-2]) * self._num_patches(frames.shape[-1])
        pixels = self.normalise(frames.to(self.device))
        with ExitStack() as precision:
            if self.device.type == "cuda":
                # float32 means float32: convolutions would use TF32 otherwise.
                precision.enter_context(
                    torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
                )
            if self.autocast == "bfloat16":
                precision.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            hidden = self._hidden(pixels)
        num_before = num_tokens_before(self._architecture, self.config)
        if hidden.shape[1:] != (num_before + num_patches, self._width):
            raise UsageError(
                f"backbone {self.name}: gave tokens of shape {tuple(hidden.shape[1:])}, wanted "
                f"{num_before} tokens and then {num_patches} patch tokens of {self._width}: "
                f"its config.json is not that of a {self._architecture.model}"
            )
        features = hidden[:, num_before:].float()
        if self._rows is None:
            return features
        mean, deviation, components = self._rows
        return (features - mean) / deviation @ components

    def _hidden(self, pixels: Tensor) -> Tensor:
        inputs = model_inputs(self._architecture, self.config, pixels, layers=self.layers)
        if not self.compile or len(pixels) == 1:  # the black frame is not worth a compilation
            output = self.model(**inputs)
        else:
            try:
                output = self._compiled(**inputs)
            except RuntimeError as error:
                lines = [line for line in str(error).splitlines() if line.strip()]
                raise DeltatokError(
                    f"compile: the compiled backbone failed ({' '.join(lines[:2])}): "
                    "leave --compile out, or install a C++ compiler (CPU) or Triton (GPU)"
                ) from error
        return hidden_tokens(self._architecture, self.model, output, layers=self.layers)

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self.model, dynamic=False)

    def normalise(self, frames: Tensor) -> Tensor:
        """float32 (B, 3, H, W): uint8 frames * (1/255), minus mean, over standard deviation."""
        mean, std = (constant.to(frames.device) for constant in self._mean_and_std)
        return frames.to(torch.float32).mul_(1 / 255).sub_(mean).div_(std)

    def black_tokens(self, frame_size: FrameSize) -> Tensor:
        """float32 (N, D) on the CPU: the patch tokens of an all-zero frame.

        Every sequence of delta tokens starts from it, so a cache computes it once.
        """
        black = torch.zeros((1, 3, *frame_shape(frame_size)), dtype=torch.uint8)
        return self.tokens(black)[0].cpu()

    def identity(self) -> dict[str, Any]:
        """`config` (what decides the output), `weights_sha256`, and `layers` and `pca` where there
        are any; equal across transformers' versions, devices and file layouts."""
        config = {
            field: getattr(self.config, field)
            for field in _CONFIG_FIELDS
            if hasattr(self.config, field)
        }
        identity: dict[str, Any] = {"config": config, "weights_sha256": self._weights_sha256}
        if self.layers:
            identity["layers"] = list(self.layers)
        if self.projection is not None:
            identity["pca"] = self.projection.identity()
        return identity

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Mean (F,), deviation (F,) and components (F, D) on the device."""
        if self.projection is None:
            return None
        found = self.projection
        mean, deviation, components = (
            torch.tensor(value, device=self.device)
            for value in (found.mean, found.deviation, found.components.T)
        )
        return mean, deviation, components

    @cached_property
    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Taken to the device once: a GPU would have to be waited for at every batch."""
        mean, std = (torch.tensor(v, device=self.device) for v in (self.image_mean, self.image_std))
        return mean[:, None, None], std[:, None, None]

    @cached_property
    def _weights_sha256(self) -> str:
        # transformers 5.0 names its tensors `layer.N`, later versions `model.layer.N`; towers of
        # CLIP and SigLIP were in a module of their own.
        tensors = {
            name.removeprefix("model.").removeprefix("vision_model."): tensor
            for name, tensor in self.model.state_dict().items()
        }
        digest = hashlib.sha256()
        for name in sorted(tensors):
            array = tensors[name].detach().cpu().contiguous().numpy()
            digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def _num_patches(self, side: int) -> int:
        patch = self.patch_size
        if side < patch or side % patch:
            below = max(patch, side // patch * patch)
            sizes = sorted({below, side // patch * patch + patch})
            raise UsageError(
                f"frame size {side}: wanted a multiple of the backbone's patch size {patch}: "
                f"use {' or '.join(map(str, sizes))}"
            )
        return side // patch


def load_backbone(config: ExtractConfig) -> Backbone:
    """The backbone of `config` on its device; UsageError if it cannot be had there."""
    device = choose_device(config.device)
    autocast = cast(Autocast, precision_name(config.autocast, device))
    return Backbone.load(
        config.backbone,
        device=device,
        autocast=autocast,
        compile=config.compile,
        layers=config.layers,
    )


def find_folder(name: str) -> Path:
    """The local folder of a backbone: `name` itself, or where the hub's files were put.

    Raises UsageError if it is neither a folder nor a hub id that can be downloaded here.
    """
    if local_path(name).is_dir():
        for file in Path(name).iterdir():
            if file.exists() and not (file.is_file() or file.is_dir()):
                raise UsageError(f"backbone {name}: {file.name} is a pipe or a device, no file")
        return Path(name)
    if Path(name).is_absolute() or name.startswith(".") or Path(name).exists():
        raise UsageError(f"backbone {name}: no such folder: pass a folder with {_FILES[0]}")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
    except GatedRepoError as error:
        raise UsageError(
            f"backbone {name}: its licence has not been accepted by this account: open "
            f"https://huggingface.co/{name}, accept it and log in (hf auth login), or pass a "
            "local folder that holds the weights"
        ) from error
    except (HFValidationError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"backbone {name}: neither a folder nor found on the hub ({reason}): check the name "
            "(owner/name) and the network, or pass a local folder that holds the weights"
        ) from error


def read_preprocessor(
    folder: Path,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """`image_mean` and `image_std` of preprocessor_config.json, red first, for pixels in 0-1.

    Raises UsageError if the file is missing or says something else than x/255, (x-mean)/std.
    """
    path = folder / _PREPROCESSOR
    try:
        settings = json.loads(read_text(path))
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

    Of two towers the vision tower. Raises UsageError if the weights are missing, incomplete or of
    a model whose patch tokens are not known.
    """
    architecture = architecture_of(_model_type(folder), where=str(folder))
    model_class = getattr(transformers, architecture.model)
    with _quiet_transformers():
        try:
            model, report = model_class.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UsageError(
                f"backbone {folder}: cannot be loaded ({error}): wanted config.json and "
                f"model.safetensors of a {architecture.model} as transformers saves them"
            ) from error
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise UsageError(
            f"backbone {folder}: the weights lack {len(missing)} tensors of the right shape, "
            f"{missing[0]} first: the file belongs to another config.json"
        )
    _LOGGER.debug("loaded %s from %s", type(model).__name__, folder)
    return model.eval().requires_grad_(False), model.config


def _model_type(folder: Path) -> object:
    path = folder / _FILES[0]
    try:
        settings = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise UsageError(
            f"backbone {folder}: no {_FILES[0]}: give a folder as transformers saves one"
        ) from error
    except ValueError as error:
        raise UsageError(f"{path}: no JSON ({error}): copy it again") from error
    return settings.get("model_type") if isinstance(settings, dict) else None


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
