"""deltatok-train: tokenizer, world, dinoworld or head, from cached shards only."""

import sys
from collections.abc import Sequence

from ..cli import parse_config, run_command, run_subcommand

USAGE = """usage: deltatok-train {tokenizer,world,dinoworld,head} [--help] ...

  tokenizer  DeltaTok on patch-token shards
  world      DeltaWorld on delta-token shards
  dinoworld  DINO-world, the baseline, on patch-token shards
  head       a linear segmentation or depth head on patch-token shards and labels

examples:
  deltatok-train tokenizer --patches cache/patches --out runs/tokenizer
  deltatok-train world --deltas cache/deltas --out runs/world
  deltatok-train dinoworld --patches cache/patches --out runs/dinoworld
  deltatok-train head --patches cache/uniform --labels labels/ --num-classes 19 --out runs/head"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-train`."""
    words = list(sys.argv[1:] if argv is None else argv)
    kinds = {"tokenizer": _tokenizer, "world": _world, "dinoworld": _dinoworld, "head": _head}
    try:
        return run_command(lambda: run_subcommand("deltatok-train", kinds, USAGE, words))
    finally:
        if "torch" in sys.modules:  # it takes seconds to import: not for --help
            from ...train.engine.devices import leave_group

            leave_group()


def _tokenizer(words: list[str]) -> None:
    from ...train.config import TokenizerTrainConfig

    config = parse_config(
        TokenizerTrainConfig,
        words,
        prog="deltatok-train tokenizer",
        summary="Train DeltaTok on patch-token shards: one delta token a frame pair.",
        example="deltatok-train tokenizer --patches cache/patches --out runs/tokenizer",
    )
    from ...train.tokenizer import train_tokenizer

    train_tokenizer(config)
    print(f"tokenizer: {config.out}")


def _world(words: list[str]) -> None:
    from ...train.config import WorldTrainConfig

    config = parse_config(
        WorldTrainConfig,
        words,
        prog="deltatok-train world",
        summary="Train DeltaWorld on delta-token shards.",
        example="deltatok-train world --deltas cache/deltas --out runs/world",
    )
    from ...train.world import train_world

    train_world(config)
    print(f"world model: {config.out}")


def _dinoworld(words: list[str]) -> None:
    from ...train.config import DINOWorldTrainConfig

    config = parse_config(
        DINOWorldTrainConfig,
        words,
        prog="deltatok-train dinoworld",
        summary="Train DINO-world, the baseline without delta tokens, on patch-token shards.",
        example="deltatok-train dinoworld --patches cache/patches --out runs/dinoworld",
    )
    from ...train.dinoworld import train_dinoworld

    train_dinoworld(config)
    print(f"world model: {config.out}")


def _head(words: list[str]) -> None:
    from ...train.config import HeadTrainConfig

    config = parse_config(
        HeadTrainConfig,
        words,
        prog="deltatok-train head",
        summary="Train a linear segmentation or depth head on cached patch tokens.",
        example="deltatok-train head --patches cache/vspw_train --labels VSPW --out runs/head",
    )
    from ...train.heads.train import train_head

    train_head(config)
    print(f"head: {config.out}")


if __name__ == "__main__":  # for launchers: accelerate launch -m deltatok.pipeline.commands.train
    raise SystemExit(main())
