"""The two stages that only the quickstart has: its world and its random backbone."""

from collections.abc import Sequence

from .command import parse_config, run_command
from .little_world import LittleWorldConfig
from .tiny_backbone import TinyBackboneConfig, make_tiny_backbone
from .world_files import make_little_world


def world(words: Sequence[str]) -> int:
    """Write the little world; exit code."""

    def body() -> None:
        config = parse_config(
            LittleWorldConfig,
            words,
            prog="little-world",
            summary="Write clips of a shape that turns unforeseeably, with labels and futures.",
            example="a stage of configs/quickstart.yaml",
        )
        make_little_world(config)

    return run_command(body)


def backbone(words: Sequence[str]) -> int:
    """Write the random backbone; exit code."""

    def body() -> None:
        config = parse_config(
            TinyBackboneConfig,
            words,
            prog="tiny-backbone",
            summary="Write a small DINOv3 with fixed random weights as a model folder.",
            example="a stage of configs/quickstart.yaml",
        )
        make_tiny_backbone(config)

    return run_command(body)
