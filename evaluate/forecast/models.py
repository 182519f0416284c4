"""The models of a forecast evaluation, and the proof that they belong to the cache they score.

A model folder's provenance.json says which cache it was trained on. What it says is compared with
the evaluation cache; what it does not say (a model that came without) is listed as not checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...shards.cache import CacheInfo
from ...shards.errors import CacheMismatch, UsageError
from ...shards.patches.reader import PatchShards
from ...train.engine.model_folder import (
    Pretrained,
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
from ...train.models.selfattention import SelfAttentionWorld
from .config import ForecastConfig

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
    black: Tensor
    """(N, D) patch tokens of a black frame, the cache's."""
    grid: tuple[int, int]
    """Patch rows and columns of the cache's frames."""
    provenance: dict[str, Any]


def load_models(config: ForecastConfig, cache: PatchShards, device: torch.device) -> ForecastModels:
    """Load what `config` names and check it against the evaluation cache.

    Raises:
        CacheMismatch: a model made for another backbone, preprocessing or tokenizer; names the
            field.
        UsageError: no such model, another class, or another width.
    """
    info = cache.info
    provenance: dict[str, Any] = {
        "cache": {
            "fingerprint": info.fingerprint,
            "policy": info.identity["sampling"]["policy"],
            "backbone": info.backbone,
            "licence": info.licence,
            "hidden_size": info.shape.hidden_size,
            "counts": info.counts,
        }
    }
    tokenizer = DeltaTok.from_pretrained(config.tokenizer, device=device)
    provenance["tokenizer"] = _origin("tokenizer", config.tokenizer, tokenizer, info)
    worlds: dict[str, WorldModel | None] = {"world": None, "discriminative": None}
    for role in worlds:
        folder: str | None = getattr(config, role)
        if folder is None:
            continue
        worlds[role] = world = _load_world(role, folder, device)
        if isinstance(world, DINOWorld):
            provenance[role] = _origin(role, folder, world, info)
        else:
            made_by = provenance["tokenizer"]["weights_sha256"]
            checked = _check_deltas(role, folder, world, info, (config.tokenizer, made_by))
            provenance[role] = checked | {"weights_sha256": weights_sha256(world)}
    dinoworlds: dict[str, DINOWorld] = {}
    for folder in config.dinoworld:
        dinoworld = DINOWorld.from_pretrained(folder, device=device)
        row = "dinoworld_best" if dinoworld.config.use_bom else "dinoworld"
        if row in dinoworlds:
            raise UsageError(
                f"--dinoworld {folder}: a second model with {_queries(dinoworld)}; wanted at most "
                "one with noise queries and one with a learned query"
            )
        dinoworlds[row] = dinoworld
        provenance[row] = _origin("dinoworld", folder, dinoworld, info)
    head, rgb_head = None, None
    if config.head is not None:
        head = _load_head(config.head, device)
        provenance["head"] = _origin("head", config.head, head, info) | {
            "num_classes": head.config.num_classes if isinstance(head, SegmentationHead) else None
        }
    if config.rgb_head is not None:
        rgb_head = RGBHead.from_pretrained(config.rgb_head, device=device)
        provenance["rgb_head"] = _origin("rgb_head", config.rgb_head, rgb_head, info)
    return ForecastModels(
        tokenizer=tokenizer,
        world=worlds["world"],
        discriminative=worlds["discriminative"],
        dinoworlds=tuple(dinoworlds.values()),
        head=head,
        rgb_head=rgb_head,
        black=torch.tensor(cache.black, device=device),
        grid=cache.grid,
        provenance=provenance,
    )


def check_model(role: str, folder: str, model: Pretrained, info: CacheInfo) -> dict[str, Any]:
    """Refuse a model whose channels D or training features are not those of the cache; gives what
    the report says of its training cache."""
    checked = check_trained_on(folder, info, what=f"--{role} {folder}")
    _check_width(role, folder, model, info)
    return {
        "trained_on_fingerprint": read_provenance(folder).get("patches_fingerprint"),
        "checked": checked,
    }


def _origin(role: str, folder: str, model: Pretrained, info: CacheInfo) -> dict[str, Any]:
    return check_model(role, folder, model, info) | {"weights_sha256": weights_sha256(model)}


def _check_width(role: str, folder: str, model: Pretrained, info: CacheInfo) -> None:
    config = model.config
    channels = config.in_size if hasattr(config, "in_size") else config.hidden_size
    if channels != info.shape.hidden_size:
        raise CacheMismatch(
            f"--{role} {folder}: hidden_size is {channels}, the cache's tokens have "
            f"{info.shape.hidden_size} channels: give a {role} trained on this backbone"
        )


def _check_deltas(
    role: str, folder: str, world: Pretrained, info: CacheInfo, tokenizer: tuple[str, str]
) -> dict[str, Any]:
    """The same of a DeltaWorld, which was trained on a delta cache: its tokenizer and its backbone.
    tokenizer: the folder given, and its weights' SHA-256."""
    what, provenance = f"--{role} {folder}", read_provenance(folder)
    deltas = provenance.get("deltas")
    if isinstance(deltas, Mapping):
        check_made_by(tokenizer[1], deltas, what_got=f"--tokenizer {tokenizer[0]}", what=what)
        if isinstance(deltas.get("patches"), Mapping):
            check_features(info, deltas["patches"], what=what)
    else:
        warn_unchecked(what, "deltas")
    _check_width(role, folder, world, info)
    return {
        "trained_on_fingerprint": provenance.get("deltas_fingerprint"),
        "checked": isinstance(deltas, Mapping),
    }


def _load_world(role: str, folder: str, device: torch.device) -> WorldModel:
    classes: dict[str, type[WorldModel]]
    classes = {one.saved_as: one for one in (DINOWorld, SelfAttentionWorld)}
    network = classes.get(read_class(folder), DeltaWorldNetwork)
    world = network.from_pretrained(folder, device=device)
    if world.config.use_bom != (role == "world"):
        other = "world" if world.config.use_bom else "discriminative"
        raise UsageError(
            f"--{role} {folder}: a world model with {_queries(world)}; give it as --{other}"
        )
    return world


def _queries(world: WorldModel) -> str:
    return "noise queries" if world.config.use_bom else "a learned query"


def _load_head(folder: str, device: torch.device) -> SegmentationHead | DepthHead:
    name = read_class(folder)
    if name == "SegmentationHead":
        return SegmentationHead.from_pretrained(folder, device=device)
    if name == "DepthHead":
        return DepthHead.from_pretrained(folder, device=device)
    raise UsageError(f"--head {folder}: holds a {name}, wanted a SegmentationHead or a DepthHead")
