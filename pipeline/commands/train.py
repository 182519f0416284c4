"""deltatok-train: tokenizer, world, dinoworld or head, from cached shards only."""

import sys
from collections.abc import Sequence

from ..cli import Command, run_table

COMMANDS = {
    "tokenizer": Command(
        help="DeltaTok on patch-token shards",
        summary="Train DeltaTok on patch-token shards: one delta token a frame pair.",
        examples=("deltatok-train tokenizer --patches cache/patches --out runs/tokenizer",),
        config="train.config:TokenizerTrainConfig",
        run="train.tokenizer:train_tokenizer",
        done="tokenizer: {out}",
    ),
    "world": Command(
        help="DeltaWorld on delta-token shards",
        summary="Train DeltaWorld on delta-token shards.",
        examples=("deltatok-train world --deltas cache/deltas --out runs/world",),
        config="train.config:WorldTrainConfig",
        run="train.world:train_world",
        done="world model: {out}",
    ),
    "dinoworld": Command(
        help="DINO-world, the baseline, on patch-token shards",
        summary="Train DINO-world, the baseline without delta tokens, on patch-token shards.",
        examples=("deltatok-train dinoworld --patches cache/patches --out runs/dinoworld",),
        config="train.config:DINOWorldTrainConfig",
        run="train.dinoworld:train_dinoworld",
        done="world model: {out}",
    ),
    "head": Command(
        help="a linear segmentation or depth head on patch-token shards and labels",
        summary="Train a linear segmentation or depth head on cached patch tokens.",
        examples=(
            "deltatok-train head --patches cache/vspw_train --labels VSPW --out runs/head",
            "deltatok-train head --patches cache/uniform --labels labels/ --num-classes 19 "
            "--out runs/head",
        ),
        config="train.config:HeadTrainConfig",
        run="train.heads.train:train_head",
        done="head: {out}",
    ),
}


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of `deltatok-train`."""
    try:
        return run_table("deltatok-train", COMMANDS, words)
    finally:
        if "torch" in sys.modules:  # it takes seconds to import: not for --help
            from ...train.engine.devices import leave_group

            leave_group()


if __name__ == "__main__":  # for launchers: accelerate launch -m deltatok.pipeline.commands.train
    raise SystemExit(main())
