"""Where the models that belong to a world model lie: found by the weights that it was trained with.

The folders beside a world model are searched, whatever they are called, so that a run folder that
was moved or renamed as a whole still works. Called by `parts.py`.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..extract.backbone import Backbone
from ..shards.cache import read_cache_info
from ..shards.errors import DeltatokError, UsageError
from ..train.models.deltatok import DeltaTok
from ..train.pretrained import read_provenance, weights_sha256

logger = logging.getLogger(__name__)

HEAD_CLASSES = ("SegmentationHead", "DepthHead", "RGBHead")
PARTS_FILE = "parts.json"
"""In a bundled folder: {"backbone": hub id or null, "frame_size": pixels}."""


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


def nearby(folder: Path, world_folder: Path) -> list[Path]:
    """The folders that are searched for parts: in `folder`, beside the world model, and beside the
    delta cache it was trained on, where that is still there."""
    roots = [folder, world_folder.absolute().parent, world_folder.resolve().parent]
    if deltas := _recorded_deltas(world_folder):
        roots.append(deltas.absolute().parent)
    places: dict[Path, Path] = {}
    for root in roots:
        for place in _subfolders(root):
            places.setdefault(place.resolve(), place)
    return list(places.values())


def find_tokenizer(world_folder: Path, wanted: str | None, places: Sequence[Path]) -> Path:
    """The one of `places` that holds the tokenizer with the weights `wanted` (sha256).

    Raises UsageError that names where was looked, if none does.
    """
    candidates = [place for place in places if _class_of(place) == "DeltaTok"]
    for place in candidates:
        if wanted is not None and weights_sha256(DeltaTok.from_pretrained(place)) == wanted:
            return place
    raise UsageError(_not_found("tokenizer", world_folder, wanted, candidates))


def find_backbone(
    world_folder: Path,
    wanted: str | None,
    places: Sequence[Path],
    load_backbone: Callable[[str], Backbone],
) -> str | Path:
    """The one of `places` that holds the backbone with the weights `wanted` (sha256), or the hub
    id that the world's delta cache names.

    Raises UsageError that names where was looked, if there is neither.
    """
    candidates = [place for place in places if (place / "preprocessor_config.json").is_file()]
    for place in candidates:
        if wanted is not None:
            try:
                found = load_backbone(str(place)).identity()["weights_sha256"]
            except UsageError as error:
                logger.info("%s: no backbone that can be loaded: %s", place, error)
                continue
            if found == wanted:
                return place
    hub_id = _recorded_hub_id(world_folder)
    if hub_id is None:
        raise UsageError(_not_found("backbone", world_folder, wanted, candidates))
    return hub_id


def _not_found(
    part: str, world_folder: Path, wanted: str | None, candidates: Sequence[Path]
) -> str:
    if wanted is None:
        return (
            f"{world_folder}: its provenance.json does not say which {part} it was trained with; "
            f"pass {part}="
        )
    looked = ", ".join(str(place) for place in candidates) or "none there"
    return (
        f"{world_folder}: its {part} (weights sha256 {wanted}) is not beside it (looked at: "
        f"{looked}); pass {part}="
    )


def find_head(backbone_sha256: str | None, places: Sequence[Path]) -> Path | None:
    """The one head beside the world that was trained on the same backbone, if there is one."""
    found = []
    for place in places:
        if _class_of(place) in HEAD_CLASSES and (place / "provenance.json").is_file():
            trained_on = read_provenance(place).get("patches")
            weights = trained_on.get("backbone", {}) if isinstance(trained_on, Mapping) else {}
            if backbone_sha256 is not None and weights.get("weights_sha256") == backbone_sha256:
                found.append(place)
    if len(found) > 1:
        names = ", ".join(str(place) for place in found)
        logger.warning("several heads beside the world model, none is used: pass head= (%s)", names)
    return found[0] if len(found) == 1 else None


def _recorded_deltas(world_folder: Path) -> Path | None:
    """The delta cache that a run folder's train.json names, if it is there."""
    config = _read_json(world_folder / "train.json").get("config")
    deltas = config.get("deltas") if isinstance(config, Mapping) else None
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


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object that may be there or not; {} where it is not, or is something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
