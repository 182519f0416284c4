"""The flags of `--engine ray`, and how many actors fit into a cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...extract.config import check, check_count, positive
from ...shards.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """Where the actors run, and what each one has."""

    ray_address: str | None = None
    """Of a cluster, or "auto"; None: that of RAY_ADDRESS or of this machine's cluster, and Ray on
    this machine alone where there is none."""
    actors: int | None = None
    """None: as many as fit."""
    gpus_per_actor: float | None = None
    """None: 1 where the cluster has GPUs and the device is not cpu, else 0."""
    cpus_per_actor: int | None = None
    """None: the machine's cores, shared by as many actors as it has GPUs for."""

    def __post_init__(self) -> None:
        check_count("actors", self.actors)
        check_count("cpus_per_actor", self.cpus_per_actor)
        gpus = self.gpus_per_actor
        valid = gpus is None or gpus == 0 or (positive(gpus) and (gpus < 1 or gpus % 1 == 0))
        check("gpus_per_actor", gpus, valid, "a whole number, or a part of one GPU")


@dataclass(frozen=True, kw_only=True)
class Share:
    """What an actor has, and how many there are."""

    gpus: float
    cpus: int
    actors: int

    def fits(self, resources: Mapping[str, Any]) -> int:
        """How many such actors fit into a node with Ray's `resources`."""
        places = int(resources.get("CPU", 0) // self.cpus)
        return min(places, int(resources.get("GPU", 0) / self.gpus)) if self.gpus else places


def share_of(nodes: Sequence[Mapping[str, Any]], options: FleetOptions, *, device: str) -> Share:
    """What each actor gets. nodes: Ray's resources of each living node. device: as the user gave
    it: auto, cuda or cpu.

    UsageError for more actors, or larger ones, than fit.
    """
    has_gpus = any(node.get("GPU", 0) for node in nodes)
    gpus = options.gpus_per_actor
    if gpus is None:
        gpus = 1.0 if device == "cuda" or (device == "auto" and has_gpus) else 0.0
    if device not in ("auto", "cuda" if gpus else "cpu"):
        wanted = "auto or cuda" if gpus else "auto or cpu"
        raise UsageError(
            f"device: got {device!r} for actors with {gpus:g} GPUs, wanted {wanted}: Ray tells "
            "each actor which device it has"
        )
    cpus = options.cpus_per_actor
    if cpus is None:
        cores = [
            int(node.get("CPU", 0) // max(1, int(node.get("GPU", 0) / gpus) if gpus else 1))
            for node in nodes
            if node.get("CPU", 0) >= 1 and (not gpus or node.get("GPU", 0) >= gpus)
        ]
        cpus = max(1, min(cores, default=1))
    share = Share(gpus=gpus, cpus=cpus, actors=options.actors or 1)
    places = sum(map(share.fits, nodes))
    if places < share.actors:
        have = "; ".join(
            f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes
        )
        raise UsageError(
            f"the cluster has room for {places} actors of {gpus:g} GPUs and {cpus} CPUs, wanted "
            f"{share.actors}: its {len(nodes)} nodes have {have}: add nodes, or lower --actors, "
            "--gpus-per-actor or --cpus-per-actor"
        )
    return Share(gpus=gpus, cpus=cpus, actors=options.actors or places)
