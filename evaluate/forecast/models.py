"""The models of a forecast evaluation, and the proof that they belong to the cache they score.

A model folder's provenance.json says which cache it was trained on. What it says is compared with
the evaluation cache; what it does not say (a model that came without) is listed as not checked.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...shards.cache import CacheInfo
from ...shards.errors import UsageError
from ...train.engine.model_folder import (
    check_features,
    check_made_by,
    check_trained_on,
    read_class,
    read_provenance,
    warn_unchecked,
    weights_sha256,
)
from ...train.models.deltatok import DeltaTok
from ...train.models.deltaworld import DeltaWorldNetwork
from ...train.models.dinoworld import DINOWorld
from ...train.models.heads import DepthHead, SegmentationHead
from ...train.models.rgb_head import RGBHead
from .config import ForecastConfig

logger = logging.getLogger(__name__)

WorldModel = DeltaWorldNetwork | DINOWorld


@dataclass(frozen=True, kw_only=True)
class ForecastModels:
    """Models in eval mode on the device, and what the report says about their origin."""

    tokenizer: DeltaTok
    world: WorldModel | None
    discriminative: WorldModel | None
    dinoworlds: tuple[DINOWorld, ...]
    """At most one with a learned query and one with noise queries."""
    head: SegmentationHead | DepthHead | None
    rgb_head: RGBHead | None
    provenance: dict[str, Any]


def load_models(config: ForecastConfig, info: CacheInfo, device: torch.device) -> ForecastModels:
    """Load what `config` names and check it against the evaluation cache `info`.

    Raises:
        CacheMismatch: a model made for another backbone, preprocessing or tokenizer; names the
            field.
        UsageError: no such model, another class, or another width.
    """
    tokenizer = DeltaTok.from_pretrained(config.tokenizer, device=device)
    check_width("tokenizer", config.tokenizer, tokenizer.config.hidden_size, info)
    tokenizer_sha256 = weights_sha256(tokenizer)
    provenance: dict[str, Any] = {
        "cache": {
            "fingerprint": info.fingerprint,
            "policy": info.identity["sampling"]["policy"],
            "backbone": info.backbone,
            "licence": info.licence,
            "hidden_size": info.shape.hidden_size,
            "counts": info.counts,
        },
        "tokenizer": check_patches("tokenizer", config.tokenizer, info)
        | {"weights_sha256": tokenizer_sha256},
    }
    worlds: dict[str, WorldModel | None] = {"world": None, "discriminative": None}
    for role in worlds:
        folder: str | None = getattr(config, role)
        if folder is not None:
            world = _load_world(role, folder, device)
            check_width(role, folder, world.config.hidden_size, info)
            worlds[role] = world
            if isinstance(world, DeltaWorldNetwork):
                checked = _check_deltas(role, folder, info, config.tokenizer, tokenizer_sha256)
            else:
                checked = check_patches(role, folder, info)
            provenance[role] = checked | {"weights_sha256": weights_sha256(world)}
    dinoworlds = _load_dinoworlds(config.dinoworld, info, device, provenance)
    head = None
    if config.head is not None:
        head = load_head(config.head, device)
        check_width("head", config.head, head.config.in_size, info)
        provenance["head"] = check_patches("head", config.head, info) | {
            "weights_sha256": weights_sha256(head),
            "num_classes": head.config.num_classes if isinstance(head, SegmentationHead) else None,
        }
    rgb_head = None
    if config.rgb_head is not None:
        rgb_head = RGBHead.from_pretrained(config.rgb_head, device=device)
        check_width("rgb_head", config.rgb_head, rgb_head.config.in_size, info)
        provenance["rgb_head"] = check_patches("rgb_head", config.rgb_head, info) | {
            "weights_sha256": weights_sha256(rgb_head)
        }
    return ForecastModels(
        tokenizer=tokenizer,
        world=worlds["world"],
        discriminative=worlds["discriminative"],
        dinoworlds=dinoworlds,
        head=head,
        rgb_head=rgb_head,
        provenance=provenance,
    )


def _load_world(role: str, folder: str, device: torch.device) -> WorldModel:
    world: WorldModel
    if read_class(folder) == "DINOWorld":
        world = DINOWorld.from_pretrained(folder, device=device)
    else:
        world = DeltaWorldNetwork.from_pretrained(folder, device=device)
    if world.config.use_bom != (role == "world"):
        kind = "noise queries" if world.config.use_bom else "a learned query"
        other = "world" if world.config.use_bom else "discriminative"
        raise UsageError(f"--{role} {folder}: a world model with {kind}; give it as --{other}")
    return world


def _load_dinoworlds(
    folders: Sequence[str], info: CacheInfo, device: torch.device, provenance: dict[str, Any]
) -> tuple[DINOWorld, ...]:
    """The models of `--dinoworld`; their origin goes into `provenance` under their rows' names."""
    found: dict[str, DINOWorld] = {}
    for folder in folders:
        world = DINOWorld.from_pretrained(folder, device=device)
        check_width("dinoworld", folder, world.config.hidden_size, info)
        role = "dinoworld_best" if world.config.use_bom else "dinoworld"
        if role in found:
            kind = "noise queries" if world.config.use_bom else "a learned query"
            raise UsageError(
                f"--dinoworld {folder}: a second model with {kind}; wanted at most one with noise "
                "queries and one with a learned query"
            )
        found[role] = world
        provenance[role] = check_patches("dinoworld", folder, info) | {
            "weights_sha256": weights_sha256(world)
        }
    return tuple(found.values())


def load_head(folder: str, device: torch.device) -> SegmentationHead | DepthHead:
    """A segmentation or a depth head, whichever the folder holds; UsageError for anything else."""
    kinds: dict[str, type[SegmentationHead] | type[DepthHead]] = {
        "SegmentationHead": SegmentationHead,
        "DepthHead": DepthHead,
    }
    name = read_class(folder)
    if name not in kinds:
        raise UsageError(
            f"--head {folder}: holds a {name}, wanted a SegmentationHead or a DepthHead"
        )
    return kinds[name].from_pretrained(folder, device=device)


def check_width(role: str, folder: str, hidden_size: int, info: CacheInfo) -> None:
    """Raises UsageError unless a model's channels D are those of the cache."""
    if hidden_size != info.shape.hidden_size:
        raise UsageError(
            f"--{role} {folder}: {hidden_size} channels, the cache's tokens have "
            f"{info.shape.hidden_size}; give a {role} trained on this backbone"
        )


def check_patches(role: str, folder: str, info: CacheInfo) -> dict[str, Any]:
    """Compare the cache a tokenizer or head was trained on with the evaluation cache."""
    return {
        "trained_on_fingerprint": read_provenance(folder).get("patches_fingerprint"),
        "checked": check_trained_on(folder, info, what=f"--{role} {folder}"),
    }


def _check_deltas(
    role: str, folder: str, info: CacheInfo, tokenizer: str, tokenizer_sha256: str
) -> dict[str, Any]:
    """Compare the delta cache a world model was trained on: its tokenizer and its backbone."""
    what, provenance = f"--{role} {folder}", read_provenance(folder)
    deltas = provenance.get("deltas")
    if isinstance(deltas, Mapping):
        check_made_by(tokenizer_sha256, deltas, what_got=f"--tokenizer {tokenizer}", what=what)
        if isinstance(deltas.get("patches"), Mapping):
            check_features(info, deltas["patches"], what=what)
    else:
        warn_unchecked(what, "deltas")
    return {
        "trained_on_fingerprint": provenance.get("deltas_fingerprint"),
        "checked": isinstance(deltas, Mapping),
    }
