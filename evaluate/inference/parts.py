"""The models that make a forecast from pixels: backbone, tokenizer, world model, perhaps a head.

A world model says in its provenance.json which tokenizer and backbone it was trained with, by the
SHA-256 of their weights. So they need not be named: the folders beside it are searched for just
those weights, whatever they are called and wherever the whole was moved. Called by `api.py`.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..extract.backbone import Backbone
from ..extract.describe import RESIZE_RULE
from ..shards.cache import compare
from ..shards.errors import UsageError
from ..shards.files import write_json
from ..train.models.deltatok import DeltaTok
from ..train.models.deltaworld import DeltaWorld
from ..train.models.heads import DepthHead, SegmentationHead
from ..train.models.rgb_head import RGBHead
from ..train.pretrained import read_class, read_provenance, weights_sha256
from .find_parts import (
    HEAD_CLASSES,
    PARTS_FILE,
    find_backbone,
    find_head,
    find_tokenizer,
    find_world,
    nearby,
    read_parts,
)

logger = logging.getLogger(__name__)

Head = SegmentationHead | DepthHead | RGBHead
_HEADS: dict[str, type[Head]] = {
    "SegmentationHead": SegmentationHead,
    "DepthHead": DepthHead,
    "RGBHead": RGBHead,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Everything a forecast from pixels needs, in eval mode on one device."""

    world: DeltaWorld
    tokenizer: DeltaTok
    backbone: Backbone
    head: Head | None
    frame_size: int
    """Side of the square that whole frames are resized to, pixels."""
    black: Tensor
    """(N, D) patch tokens of a black frame."""
    folders: dict[str, Path]
    """Where world, tokenizer, head and backbone came from; no entry for a hub id."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns of a frame."""
        return self.backbone.grid(self.frame_size)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """No gradients, and the backbone's precision for tokenizer and world model too."""
        device, precision = self.backbone.device, self.backbone.autocast
        enabled = precision == "bfloat16"
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            yield

    def save(self, folder: Path) -> None:
        """Copy all parts into one folder, from which `load_parts` takes them back.

        A backbone from the hub is named, not copied.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{folder}: cannot be made ({error.strerror}); give another folder"
            ) from error
        for name, model in (("world", self.world), ("tokenizer", self.tokenizer)):
            model.save_pretrained(folder / name, read_provenance(self.folders[name]))
        if self.head is not None:
            self.head.save_pretrained(folder / "head", read_provenance(self.folders["head"]))
        if "backbone" in self.folders:
            _copy_backbone(self.folders["backbone"], folder / "backbone")
        hub_id = None if "backbone" in self.folders else self.backbone.name
        write_json(folder / PARTS_FILE, {"backbone": hub_id, "frame_size": self.frame_size})


def load_parts(
    folder: Path,
    *,
    tokenizer: str | Path | None,
    backbone: str | Path | None,
    head: str | Path | None,
    frame_size: int | None,
    load_backbone: Callable[[str], Backbone],
) -> Parts:
    """The parts of the world model in `folder`; those not given are looked for beside it.

    Raises:
        UsageError: no world model there, or a part that is neither given nor found.
        CacheMismatch: a part that the world model was not trained with; names both fingerprints.
    """
    world_folder = find_world(folder)
    provenance = read_provenance(world_folder)
    deltas = provenance.get("deltas")
    deltas = deltas if isinstance(deltas, Mapping) else {}
    patches = deltas.get("patches")
    patches = patches if isinstance(patches, Mapping) else {}
    places = nearby(folder, world_folder)

    wanted = deltas.get("tokenizer", {}).get("weights_sha256")
    if tokenizer is None:
        tokenizer = find_tokenizer(world_folder, wanted, places)
    loaded_tokenizer = DeltaTok.from_pretrained(tokenizer)
    check_tokenizer(loaded_tokenizer, tokenizer, world_folder, wanted)

    wanted = patches.get("backbone", {}).get("weights_sha256")
    if backbone is None:
        backbone = find_backbone(world_folder, wanted, places, load_backbone)
    loaded_backbone = load_backbone(str(backbone))
    check_backbone(loaded_backbone, backbone, world_folder, patches)

    if head is None:
        head = find_head(wanted, places)
    elif read_class(head) not in HEAD_CLASSES:
        raise UsageError(
            f"head {head}: a {read_class(head)}, wanted one of {', '.join(HEAD_CLASSES)}"
        )
    size = frame_size or patches.get("preprocessing", {}).get("frame_size")
    size = size or read_parts(world_folder).get("frame_size")
    if size is None:
        raise UsageError(
            f"{world_folder}: its provenance.json does not say its frame size; pass frame_size="
        )
    device = loaded_backbone.device
    found = {"world": world_folder, "tokenizer": Path(tokenizer), "backbone": Path(backbone)}
    if head is not None:
        found["head"] = Path(head)
    parts = Parts(
        world=DeltaWorld.from_pretrained(world_folder, device=device),
        tokenizer=loaded_tokenizer.to(device),
        backbone=loaded_backbone,
        head=None
        if head is None
        else _HEADS[read_class(head)].from_pretrained(head, device=device),
        frame_size=int(size),
        black=loaded_backbone.black_tokens(int(size)).to(device),
        folders={name: path for name, path in found.items() if path.is_dir()},
    )
    _check_widths(parts)
    return parts


def check_tokenizer(
    tokenizer: DeltaTok, given: str | Path, world_folder: Path, wanted: str | None
) -> None:
    """CacheMismatch, with both fingerprints, for a tokenizer the world was not trained with."""
    if wanted is None:
        _warn("tokenizer", given, world_folder)
        return
    compare(
        {"tokenizer": {"weights_sha256": weights_sha256(tokenizer)}},
        {"tokenizer": {"weights_sha256": wanted}},
        what_got=f"tokenizer {given}",
        what_wanted=f"the provenance of the world model {world_folder}",
        advice="pass the tokenizer= it was trained with",
    )


def check_backbone(
    backbone: Backbone, given: str | Path, world_folder: Path, patches: Mapping[str, Any]
) -> None:
    """CacheMismatch, with both fingerprints, for a backbone the world was not trained with."""
    if not patches:
        _warn("backbone", given, world_folder)
        return
    check_same_features(
        backbone,
        patches,
        what_got=f"backbone {given}",
        what_wanted=f"the provenance of the world model {world_folder}",
    )


def check_same_features(
    backbone: Backbone, patches: Mapping[str, Any], *, what_got: str, what_wanted: str
) -> None:
    """CacheMismatch if frames would give other features than the patch cache of this identity
    holds: other weights, mean, standard deviation, patch size or resize rule."""
    got = {
        "backbone": {"weights_sha256": backbone.identity()["weights_sha256"]},
        "preprocessing": {
            "patch_size": backbone.patch_size,
            "image_mean": list(backbone.image_mean),
            "image_std": list(backbone.image_std),
            "resize": RESIZE_RULE,
        },
    }
    fields = ["backbone.weights_sha256", *(f"preprocessing.{n}" for n in got["preprocessing"])]
    compare(
        got,
        patches,
        what_got=what_got,
        what_wanted=what_wanted,
        fields=fields,
        advice="give the backbone that made them",
    )


def _check_widths(parts: Parts) -> None:
    width = parts.backbone.hidden_size
    others = {"tokenizer": parts.tokenizer.config.hidden_size}
    others["world model"] = parts.world.config.hidden_size
    if parts.head is not None:
        others["head"] = parts.head.config.in_size
    for name, got in others.items():
        if got != width:
            raise UsageError(f"the {name} has {got} channels, the backbone's tokens have {width}")


def _copy_backbone(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for pattern in ("config.json", "preprocessor_config.json", "*.safetensors", "*.index.json"):
        for file in source.glob(pattern):
            if file.resolve() != (target / file.name).resolve():
                shutil.copyfile(file, target / file.name)


def _warn(part: str, given: str | Path, world_folder: Path) -> None:
    logger.warning(
        "%s %s: the provenance.json of %s does not say which one it was trained with: not checked",
        part,
        given,
        world_folder,
    )
