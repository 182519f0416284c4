"""deltatok-extract --dataset: a labelled data set -> an evaluation cache."""

import argparse
import logging

from .command import Parser, add_config_flags, config_from_arguments

EXAMPLE = """examples:
  deltatok-extract --dataset vspw --root VSPW --out cache/vspw
  deltatok-extract --dataset cityscapes --root cityscapes --out cache/cityscapes
  deltatok-extract --dataset kitti --root kitti --split-file eigen_test.txt --out cache/kitti
  deltatok-extract --dataset sequences --name davis --root DAVIS \\
      --images "JPEGImages/480p/*/*.jpg" --labels "Annotations/480p/*/*.png" --binary --fps 24 \\
      --out cache/davis
  deltatok-extract --dataset sequences --name scene --root scene --images "*.color.png" \\
      --labels "*.depth.png" --kind depth --steps-per-m 1000 --ignore 65535 --fps 30 --out cache/d
  deltatok-extract --dataset vspw --root VSPW --split train --out cache/vspw_train

The cache refers to the labels, which stay where they are: deltatok-evaluate and deltatok-train head
read them from --labels ROOT.

exit codes: 0 done; 2 bad usage, or another layout; 3 finished, but too many targets are incomplete;
4 the cache does not match; 75 stopped by SIGTERM or --time-limit, run again to go on; 1 other"""


def run_dataset_command(words: list[str]) -> None:
    """`deltatok-extract` with words that name a data set."""
    from ..extract.dataset_config import DatasetConfig

    parser = Parser(
        prog="deltatok-extract",
        description="Run a frozen DINOv3 over the labelled targets of a data set: their context "
        "and the target itself, in the crops of the forecasting benchmark.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_flags(parser, DatasetConfig)
    parser.add_argument(
        "--plan",
        action="store_true",
        help="say which targets there are and what they would take, and exit; writes nothing",
    )
    arguments = parser.parse_args(words)
    config = config_from_arguments(DatasetConfig, arguments)
    if arguments.plan:
        from .dataset_plan import dataset_plan

        print(dataset_plan(config))
        return
    from ..extract.datasets import run_dataset

    logging.info("%s", run_dataset(config).summary_line())
    print(f"evaluation cache: {config.out}")
