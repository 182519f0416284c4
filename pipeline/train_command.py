"""deltatok-train: tokenizer, world or head, from cached shards only."""

import sys
from collections.abc import Callable, Sequence

from ..shards.errors import UsageError
from .command import parse_config, run_command

USAGE = """usage: deltatok-train {tokenizer,world,head} [--help] ...

  tokenizer  DeltaTok on patch-token shards
  world      DeltaWorld on delta-token shards
  head       a linear segmentation head on patch-token shards and labels

examples:
  deltatok-train tokenizer --patches cache/patches --out runs/tokenizer
  deltatok-train world --deltas cache/deltas --out runs/world
  deltatok-train head --patches cache/uniform --labels labels/ --num-classes 19 --out runs/head"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-train`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(words))


def _run(words: list[str]) -> None:
    kinds: dict[str, Callable[[list[str]], None]] = {
        "tokenizer": _tokenizer,
        "world": _world,
        "head": _head,
    }
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return
    if words[0] not in kinds:
        raise UsageError(f"deltatok-train {words[0]}: wanted one of {', '.join(kinds)}\n{USAGE}")
    kinds[words[0]](words[1:])


def _tokenizer(words: list[str]) -> None:
    from ..train.config import TokenizerTrainConfig

    config = parse_config(
        TokenizerTrainConfig,
        words,
        prog="deltatok-train tokenizer",
        summary="Train DeltaTok on patch-token shards: one delta token a frame pair.",
        example="deltatok-train tokenizer --patches cache/patches --out runs/tokenizer",
    )
    from ..train.tokenizer import train_tokenizer

    train_tokenizer(config)
    print(f"tokenizer: {config.out}")


def _world(words: list[str]) -> None:
    from ..train.config import WorldTrainConfig

    config = parse_config(
        WorldTrainConfig,
        words,
        prog="deltatok-train world",
        summary="Train DeltaWorld on delta-token shards.",
        example="deltatok-train world --deltas cache/deltas --out runs/world",
    )
    from ..train.world import train_world

    train_world(config)
    print(f"world model: {config.out}")


def _head(words: list[str]) -> None:
    from ..train.config import HeadTrainConfig

    config = parse_config(
        HeadTrainConfig,
        words,
        prog="deltatok-train head",
        summary="Train a linear segmentation head on cached patch tokens.",
        example="deltatok-train head --patches cache/uniform --labels labels/ --out runs/head",
    )
    from ..train.head import train_head

    train_head(config)
    print(f"head: {config.out}")
