"""How many actors fit into a cluster, and what each of them has."""

import pytest

from deltatok.pipeline.fleet.options import FleetOptions, Share, share_of
from deltatok.shards import UsageError

GPU_NODE = {"CPU": 64.0, "GPU": 8.0}
CPU_NODE = {"CPU": 16.0}
HEAD = {"memory": 1e9}  # started with --num-cpus 0


@pytest.mark.parametrize(
    ("nodes", "options", "device", "share"),
    [
        ([GPU_NODE, HEAD, CPU_NODE], {}, "auto", Share(gpus=1, cpus=8, actors=8)),
        ([GPU_NODE, {"CPU": 32.0, "GPU": 8.0}], {}, "cuda", Share(gpus=1, cpus=4, actors=16)),
        ([GPU_NODE], {"gpus_per_actor": 0.5}, "auto", Share(gpus=0.5, cpus=4, actors=16)),
        ([GPU_NODE], {"cpus_per_actor": 16}, "auto", Share(gpus=1, cpus=16, actors=4)),
        ([CPU_NODE, {"CPU": 4.0}, HEAD], {}, "auto", Share(gpus=0, cpus=4, actors=5)),
        ([CPU_NODE, CPU_NODE], {}, "auto", Share(gpus=0, cpus=16, actors=2)),
        ([GPU_NODE], {}, "cpu", Share(gpus=0, cpus=64, actors=1)),
        ([GPU_NODE], {"actors": 3}, "auto", Share(gpus=1, cpus=8, actors=3)),
    ],
)
def test_share(
    nodes: list[dict[str, float]], options: dict[str, float], device: str, share: Share
) -> None:
    assert share_of(nodes, FleetOptions(**options), device=device) == share  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "options", "device", "text"),
    [
        ([CPU_NODE], {"gpus_per_actor": 1}, "auto", "room for 0 actors of 1 GPUs and 1 CPUs"),
        ([CPU_NODE], {}, "cuda", "room for 0 actors"),
        (
            [GPU_NODE, CPU_NODE],
            {"actors": 9},
            "auto",
            "room for 8 actors .*, wanted 9: its 2 nodes",
        ),
        ([CPU_NODE], {"cpus_per_actor": 17}, "cpu", "room for 0 actors of 0 GPUs and 17 CPUs"),
        ([HEAD], {}, "auto", "room for 0 actors"),
        ([GPU_NODE], {}, "cuda:3", "got 'cuda:3' for actors with 0 GPUs, wanted auto or cpu"),
        ([GPU_NODE], {"gpus_per_actor": 1}, "cpu", "got 'cpu' for actors with 1 GPUs"),
    ],
)
def test_fewer_devices_than_asked(
    nodes: list[dict[str, float]], options: dict[str, float], device: str, text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        share_of(nodes, FleetOptions(**options), device=device)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{"actors": 0}, {"cpus_per_actor": 0}, {"gpus_per_actor": -1}, {"gpus_per_actor": 1.5}],
)
def test_what_cannot_be_meant(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        FleetOptions(**options)  # type: ignore[arg-type]
