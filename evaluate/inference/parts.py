"""The models that make a forecast from pixels: backbone, tokenizer, world model, perhaps a head.

A world model says in its provenance.json which tokenizer and backbone it was trained with, by the
SHA-256 of their weights. So they need not be named: the folders beside it are searched for just
those weights, whatever they are called and wherever the whole was moved.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...extract.backbone import Backbone
from ...extract.pixels import RESIZE_RULE
from ...shards.cache import PCA, compare, pca_of, read_cache_info
from ...shards.errors import DamagedShard, DeltatokError, UsageError
from ...shards.evaluation.geometry import FrameSize, frame_shape
from ...shards.files import make_folder, read_text, write_json
from ...shards.patches.projection import (
    Projection,
    read_agreed_projection,
    write_projection,
)
from ...train.engine.model_folder import (
    SAME_PREPROCESSING,
    check_made_by,
    read_class,
    read_provenance,
    warn_unchecked,
    weights_sha256,
)
from ...train.models.deltatok import DeltaTok
from ...train.models.deltaworld import DeltaWorldNetwork
from ...train.models.heads import DepthHead, SegmentationHead
from ...train.models.rgb_head import RGBHead

logger = logging.getLogger(__name__)

PARTS_FILE = "parts.json"
"""In a bundled folder: {"backbone": hub id or null, "frame_size": pixels, or [height, width]}."""


Head = SegmentationHead | DepthHead | RGBHead
SAME_BACKBONE = ("weights_sha256", "layers", "pca")
"""What of a backbone's identity decides its features; its config is in the weights' names."""
HEADS: dict[str, type[Head]] = {
    "SegmentationHead": SegmentationHead,
    "DepthHead": DepthHead,
    "RGBHead": RGBHead,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Everything a forecast from pixels needs, in eval mode on one device."""

    world: DeltaWorldNetwork
    tokenizer: DeltaTok
    backbone: Backbone
    head: Head | None
    frame_size: FrameSize
    """What whole frames are resized to, pixels: the side of a square, or height and width."""
    black: Tensor
    """(N, D) patch tokens of a black frame."""
    folders: dict[str, Path]
    """Where world, tokenizer, head and backbone came from; no entry for a hub id."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns of a frame."""
        return self.backbone.grid(self.frame_size)

    @contextmanager
    def inference_mode(self) -> Iterator[None]:
        """No gradients, and the backbone's precision for tokenizer and world model too."""
        device, precision = self.backbone.device, self.backbone.autocast
        enabled = precision == "bfloat16"
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            yield

    def save(self, folder: Path) -> None:
        """Copy all parts into one folder, from which `load_parts` takes them back.

        A backbone from the hub is named, not copied.
        """
        make_folder(folder)
        for name, model in (("world", self.world), ("tokenizer", self.tokenizer)):
            model.save_pretrained(folder / name, read_provenance(self.folders[name]))
        if self.head is not None:
            self.head.save_pretrained(folder / "head", read_provenance(self.folders["head"]))
        hub_id = None
        if "backbone" in self.folders:
            _copy_backbone(self.folders["backbone"], folder / "backbone")
        else:
            hub_id = self.backbone.name
        if self.backbone.projection is not None:
            make_folder(folder / "backbone")
            write_projection(folder / "backbone", self.backbone.projection)
        write_json(folder / PARTS_FILE, {"backbone": hub_id, "frame_size": self.frame_size})


def load_parts(
    folder: Path,
    *,
    tokenizer: str | Path | None,
    backbone: str | Path | None,
    head: str | Path | None,
    frame_size: FrameSize | None,
    load_backbone: Callable[..., Backbone],
) -> Parts:
    """The parts of the world model in `folder`; those not given are looked for beside it.

    Raises:
        UsageError: no world model there, or a part that is neither given nor found.
        CacheMismatch: a part that the world model was not trained with; names both fingerprints.
    """
    world_folder = find_world(folder)
    provenance = read_provenance(world_folder)
    deltas = _object(provenance, "deltas")
    patches = _object(deltas, "patches")
    searched = _roots(folder, world_folder)
    places = nearby(searched)

    wanted = _object(deltas, "tokenizer").get("weights_sha256")
    if tokenizer is None:
        tokenizer = find_part(
            "tokenizer",
            world_folder,
            wanted,
            [place for place in places if _class_of(place) == "DeltaTok"],
            hash_weights=lambda place: weights_sha256(DeltaTok.from_pretrained(place)),
        )
    loaded_tokenizer = DeltaTok.from_pretrained(tokenizer)
    world_name = f"the world model {world_folder}"
    if wanted is None:
        warn_unchecked(world_name, "tokenizer")
    else:
        sha256 = weights_sha256(loaded_tokenizer)
        check_made_by(sha256, deltas, what_got=f"tokenizer {tokenizer}", what=world_name)

    wanted = _object(patches, "backbone").get("weights_sha256")
    if backbone is None:
        backbone = find_part(
            "backbone",
            world_folder,
            wanted,
            [place for place in places if (place / "preprocessor_config.json").is_file()],
            hash_weights=lambda place: load_backbone(str(place)).identity()["weights_sha256"],
            hub_id=_recorded_hub_id(world_folder),
        )
    layers = _object(patches, "backbone").get("layers", ())
    loaded_backbone = load_backbone(str(backbone), layers=layers)
    if pca := pca_of(patches):
        projection = find_projection(pca, world_folder, [Path(backbone), *searched])
        loaded_backbone = replace(loaded_backbone, projection=projection)
    if patches:
        check_same_features(
            loaded_backbone,
            patches,
            what_got=f"backbone {backbone}",
            what_wanted=f"the provenance of {world_name}",
        )
    else:
        warn_unchecked(world_name, "backbone")

    if head is None:
        head = find_head(wanted, places)
    elif read_class(head) not in HEADS:
        raise UsageError(f"head {head}: a {read_class(head)}, wanted one of {', '.join(HEADS)}")
    size = frame_size or _object(patches, "preprocessing").get("frame_size")
    size = size or read_parts(world_folder).get("frame_size")
    if size is None:
        raise UsageError(
            f"{world_folder}: its provenance.json does not say its frame size; pass frame_size="
        )
    size = size if isinstance(size, int) else frame_shape(size)
    device = loaded_backbone.device
    found = {"world": world_folder, "tokenizer": Path(tokenizer), "backbone": Path(backbone)}
    if head is not None:
        found["head"] = Path(head)
    parts = Parts(
        world=DeltaWorldNetwork.from_pretrained(world_folder, device=device),
        tokenizer=loaded_tokenizer.to(device),
        backbone=loaded_backbone,
        head=None if head is None else HEADS[read_class(head)].from_pretrained(head, device=device),
        frame_size=size,
        black=loaded_backbone.black_tokens(size).to(device),
        folders={name: path for name, path in found.items() if path.is_dir()},
    )
    widths = {
        "tokenizer": parts.tokenizer.config.hidden_size,
        "world model": parts.world.config.hidden_size,
    }
    if parts.head is not None:
        widths["head"] = parts.head.config.in_size
    for name, got in widths.items():
        if got != parts.backbone.hidden_size:
            raise UsageError(
                f"the {name} has {got} channels, the backbone's tokens have "
                f"{parts.backbone.hidden_size}"
            )
    return parts


def check_same_features(
    backbone: Backbone, patches: Mapping[str, Any], *, what_got: str, what_wanted: str
) -> None:
    """CacheMismatch if frames would give other features than the patch cache of this identity
    holds: of other weights, layers or components, or another preprocessing but for the size."""
    identity = backbone.identity()
    got = {
        "backbone": {name: identity[name] for name in SAME_BACKBONE if name in identity},
        "preprocessing": {
            "patch_size": backbone.patch_size,
            "image_mean": list(backbone.image_mean),
            "image_std": list(backbone.image_std),
            "resize": RESIZE_RULE,
        },
    }
    compare(
        got,
        patches,
        what_got=what_got,
        what_wanted=what_wanted,
        fields=[*(f"backbone.{name}" for name in SAME_BACKBONE), *SAME_PREPROCESSING],
        advice="give the backbone that made them",
    )


def _copy_backbone(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for pattern in ("config.json", "preprocessor_config.json", "*.safetensors", "*.index.json"):
        for file in source.glob(pattern):
            if file.resolve() != (target / file.name).resolve():
                shutil.copyfile(file, target / file.name)


def find_world(folder: Path) -> Path:
    """The folder of the world model: `folder`, or the only one of those in it that holds a
    best-of-many DeltaWorld. UsageError, naming what is there, where it is not one."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; pass that of a trained world model")
    if _class_of(folder) == "DeltaWorld":
        return folder
    if (folder / "config.json").is_file():
        raise UsageError(f"{folder}: holds a {_class_of(folder)}, wanted a DeltaWorld")
    inside = [place for place in _subfolders(folder) if _class_of(place) == "DeltaWorld"]
    worlds = [place for place in inside if _read_json(place / "config.json").get("use_bom")]
    if len(worlds) != 1:
        names = ", ".join(place.name for place in worlds) or "none"
        raise UsageError(
            f"{folder}: wanted the folder of a world model, or one with a single best-of-many world"
            f" model in it; found {names}: pass the folder itself"
        )
    return worlds[0]


def _roots(folder: Path, world_folder: Path) -> list[Path]:
    """Where parts are looked for: in `folder`, beside the world model, and beside the delta cache
    it was trained on, where that is still there."""
    roots = [folder, world_folder.absolute().parent, world_folder.resolve().parent]
    if deltas := _recorded_deltas(world_folder):
        roots.append(deltas.absolute().parent)
    return roots


def nearby(roots: Sequence[Path]) -> list[Path]:
    """The model folders in `roots`."""
    places: dict[Path, Path] = {}
    for root in roots:
        for place in _subfolders(root):
            places.setdefault(place.resolve(), place)
    return list(places.values())


def find_part(
    part: str,
    world_folder: Path,
    wanted: str | None,
    candidates: Sequence[Path],
    *,
    hash_weights: Callable[[Path], str],
    hub_id: str | None = None,
) -> str | Path:
    """The one of `candidates` that holds the weights `wanted` (sha256), else `hub_id`.

    Raises UsageError that names where was looked, if there is neither.
    """
    for place in candidates if wanted is not None else ():
        try:
            if hash_weights(place) == wanted:
                return place
        except UsageError as error:
            logger.info("%s: no %s that can be loaded: %s", place, part, error)
        except DamagedShard as error:  # perhaps of another world model
            logger.warning("%s", error)
    if hub_id is not None:
        return hub_id
    if wanted is None:
        raise UsageError(
            f"{world_folder}: its provenance.json does not say which {part} it was trained with; "
            f"pass {part}="
        )
    looked = ", ".join(map(str, candidates)) or "none there"
    raise UsageError(
        f"{world_folder}: its {part} (weights sha256 {wanted}) is not beside it (looked at: "
        f"{looked}); pass {part}="
    )


def find_projection(
    wanted: Mapping[str, Any], world_folder: Path, roots: Sequence[Path]
) -> Projection:
    """The one with the identity `wanted` among the pca.npy in `roots` and in their folders; that of
    a patch cache, or the copy that `save` made. UsageError if there is none."""
    for root in roots:
        for file in [root / PCA, *sorted(root.glob(f"*/{PCA}"))]:
            if file.is_file():
                found = read_agreed_projection(file.parent)
                if found.identity() == dict(wanted):
                    return found
    raise UsageError(
        f"{world_folder}: was trained on {wanted.get('components')} principal components (SHA-256 "
        f"{wanted.get('sha256')}), and no {PCA} beside it holds these: copy that of the patch "
        "cache into the backbone's folder"
    )


def find_head(backbone_sha256: str | None, places: Sequence[Path]) -> Path | None:
    """The one head beside the world that was trained on the same backbone, if there is one."""
    found = []
    for place in places:
        if _class_of(place) in HEADS and backbone_sha256 is not None:
            trained_on = _object(_read_json(place / "provenance.json"), "patches")
            if _object(trained_on, "backbone").get("weights_sha256") == backbone_sha256:
                found.append(place)
    if len(found) > 1:
        names = ", ".join(str(place) for place in found)
        logger.warning("several heads beside the world model, none is used: pass head= (%s)", names)
    return found[0] if len(found) == 1 else None


def _recorded_deltas(world_folder: Path) -> Path | None:
    """The delta cache that a run folder's train.json names, if it is there."""
    deltas = _object(_read_json(world_folder / "train.json"), "config").get("deltas")
    return Path(deltas) if isinstance(deltas, str) and Path(deltas).is_dir() else None


def _recorded_hub_id(world_folder: Path) -> str | None:
    """The backbone's hub id, from a bundle or from the delta cache."""
    name = read_parts(world_folder).get("backbone")
    if name is None and (deltas := _recorded_deltas(world_folder)):
        try:
            name = read_cache_info(deltas).backbone.get("name")
        except DeltatokError as error:
            logger.info("%s: does not say its backbone: %s", deltas, error)
    return name if isinstance(name, str) and name.count("/") == 1 else None


def read_parts(world_folder: Path) -> dict[str, Any]:
    """What `save_pretrained` wrote down of the parts beside a world model; {} where it did not."""
    return _read_json(world_folder.absolute().parent / PARTS_FILE)


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(place for place in folder.iterdir() if (place / "config.json").is_file())
    except OSError:
        return []


def _class_of(folder: Path) -> str | None:
    """What config.json calls its model; None without one of ours."""
    name = _read_json(folder / "config.json").get("class")
    return name if isinstance(name, str) else None


def _object(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A field that is an object; {} where it is not there, or is something else."""
    value = values.get(name)
    return value if isinstance(value, Mapping) else {}


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object that may be there or not; {} where it is not, or is something else."""
    try:
        value = json.loads(read_text(file))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
