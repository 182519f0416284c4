"""The data sets that `deltatok-extract --dataset` knows, and the extraction of one.

    run_dataset(DatasetConfig(dataset="vspw", root="/data/VSPW", out="cache/vspw"))

To add one: a file like vspw.py with a function config -> Dataset, its name in LOADERS and in
base.DatasetName, and, for labels stored in a new way, a rule in shards/evaluation/labels.py.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from ..backbone import Backbone
from ..run import ExtractionSummary, run_extraction
from ..sources.clip import Clip, check_writable
from ..sources.select import first_clips
from .base import Dataset, DatasetConfig, DatasetName, clips_of_dataset
from .cityscapes import load_cityscapes
from .kitti import load_kitti
from .little_world import load_little_world
from .sequences import load_sequences
from .vspw import load_vspw
from .windows import EvaluationPolicy

NUM_CONTEXT = 4
"""Frames that a forecast sees (paper); of a shorter window all but the target."""

LOADERS: Mapping[DatasetName, Callable[[DatasetConfig], Dataset]] = {
    "vspw": load_vspw,
    "cityscapes": load_cityscapes,
    "kitti": load_kitti,
    "sequences": load_sequences,
    "little-world": load_little_world,
}


def find_targets(config: DatasetConfig) -> tuple[EvaluationPolicy, list[Clip]]:
    """How the windows of a data set are made, and its targets, sorted by key.

    Raises UsageError for another layout than the published one, where no target can be used, and
    for names that cannot be stored.
    """
    dataset = LOADERS[config.dataset](config)
    clips = clips_of_dataset(dataset, Path(config.root).absolute(), split=config.split)
    check_writable(clips)
    if config.limit is not None:
        clips = first_clips(clips, config.limit, seed=config.seed)
    num_frames = config.frames_a_window
    policy = EvaluationPolicy(
        dataset=dataset.name,
        num_frames=num_frames,
        num_context=min(NUM_CONTEXT, num_frames - 1),
        stride_s=dataset.stride / dataset.fps,
        fps=dataset.fps,
        frame_size=config.frame_size,
        region=dataset.region,
        seed=config.seed,
    )
    return policy, clips


def run_dataset(config: DatasetConfig, *, backbone: Backbone | None = None) -> ExtractionSummary:
    """Makes the evaluation cache `config.out`, or goes on with it; see run_extraction."""
    return run_extraction(config.to_extraction(), backbone=backbone, targets=find_targets(config))
