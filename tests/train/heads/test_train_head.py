"""The linear segmentation head learns from labels, and refuses those that do not fit the cache."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltatok.shards import CacheMismatch, UsageError
from deltatok.train.config import HeadTrainConfig
from deltatok.train.engine.devices import check_compiler
from deltatok.train.engine.model_folder import read_provenance, read_tensors
from deltatok.train.heads.train import train_head
from deltatok.train.models.heads import SegmentationHead

Make = Callable[..., Any]
HEIGHT, WIDTH = 32, 48


def change_labels(labels: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = sorted(labels.glob("*.npy"))[3]
    np.save(path, change(np.load(path)))


def test_head_learns_the_labels(head_config: Make, log_lines: Make) -> None:
    out = train_head(head_config(steps=60, lr=0.1, eval_every=60))
    values = log_lines(out, ["validation"])[-1]
    assert values["validation_accuracy"] > 0.8
    head = SegmentationHead.from_pretrained(out)
    assert (head.config.in_size, head.config.num_classes) == (16, 2)
    assert "patches_fingerprint" in read_provenance(out)


def test_whole_frames_do_not_tell_the_number_of_classes(head_config: Make) -> None:
    with pytest.raises(UsageError, match="num_classes: not given"):
        train_head(head_config(num_classes=None))


def test_head_resumed_equals_uninterrupted(head_config: Make, tmp_path: Path) -> None:
    train_head(head_config(steps=2))
    train_head(head_config(steps=5))
    train_head(head_config(steps=5, out=str(tmp_path / "whole")))
    one, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("head", "whole")
    )
    assert one == other


def test_frames_without_labels_train_nothing(
    head_config: Make, labels: Path, log_lines: Make
) -> None:
    for path in labels.glob("*.npy"):
        np.save(path, np.full((8, HEIGHT, WIDTH), 255, np.uint8))
    out = train_head(head_config())
    assert {line["loss"] for line in log_lines(out, ["train"])} == {0.0}


def test_labels_of_different_sizes_share_a_batch(head_config: Make, tmp_path: Path) -> None:
    from deltatok.train.heads.labels import ClipFrameLabels

    class TwoSizes:
        clip_index = np.array([0, 1])
        keys = ("clip00.mp4", "clip01.mp4")
        num_windows = 2
        crop = np.array([[0, 0, 4, 6], [0, 0, 6, 4]], dtype=np.float32)
        flipped = np.array([False, False])

        def frame_index(self, windows: Any) -> Any:
            return np.zeros((2, 1), dtype=np.int32)

    for key, shape in zip(TwoSizes.keys, ((1, 4, 6), (1, 6, 4)), strict=True):
        np.save(tmp_path / f"{key}.npy", np.ones(shape, np.uint8))
    shards: Any = TwoSizes()
    read = ClipFrameLabels(str(tmp_path), shards, num_classes=2).read(
        np.array([0, 1]), np.array([0, 0])
    )
    assert read.shape == (2, 6, 6)
    assert (read[0, :4] == 1).all()
    assert (read[0, 4:] == 255).all()
    assert (read[1, :, 4:] == 255).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.astype(np.int32), "int32 .*wanted uint8"),
        (lambda a: a[0], r"uint8 \(32, 48\), wanted uint8 \(frames, height, width\)"),
        (lambda a: a[:3], "labels have 3 frames, the cache has its frame"),
        (lambda a: a[:, :-1], r"crop \[0.0, 0.0, 32.0, 48.0\].*whole frames of \(31, 48\)"),
        (lambda a: np.where(a == 1, 7, a).astype(np.uint8), "class 7: wanted 0 to 1, or 255"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    head_config: Make, labels: Path, change: Any, words: str
) -> None:
    change_labels(labels, change)
    with pytest.raises(UsageError, match=words):
        train_head(head_config(steps=20))


def test_missing_label_file_is_named(head_config: Make, labels: Path) -> None:
    (labels / "clip04.mp4.npy").unlink()
    with pytest.raises(UsageError, match=r"clip clip04.mp4: no labels"):
        train_head(head_config())


def test_pickled_labels_are_refused(head_config: Make, labels: Path) -> None:
    np.save(labels / "clip04.mp4.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"clip clip04.mp4: .*cannot be read"):
        train_head(head_config())


def test_other_number_of_classes_does_not_go_on(head_config: Make) -> None:
    train_head(head_config(steps=2))
    with pytest.raises(CacheMismatch, match="config num_classes is 2, this run has 3"):
        train_head(head_config(num_classes=3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch's own compiler
def test_head_of_generated_code_equals_the_eager_one(
    head_config: Make, tmp_path: Path, log_lines: Make
) -> None:
    try:
        check_compiler(torch.device("cpu"))
    except UsageError as error:
        pytest.skip(str(error))
    fields = {"steps": 3, "validation_fraction": 0}
    eager = train_head(head_config(out=str(tmp_path / "eager"), **fields))
    compiled = train_head(head_config(compile=True, **fields))
    for line, other in zip(log_lines(eager), log_lines(compiled), strict=True):
        assert line.pop("kind") == other.pop("kind")
        assert line == pytest.approx(other, rel=1e-4)


RANK = """
import json, sys
import torch
torch.set_num_threads(1)
from deltatok.train.config import HeadTrainConfig
from deltatok.train.engine.devices import leave_group
from deltatok.train.heads.train import train_head
for fields in json.loads(sys.argv[1]):
    train_head(HeadTrainConfig(**fields))
    assert torch.distributed.get_world_size() == 2
leave_group()
"""


def test_two_ranks_train_the_head_of_one(head_config: Make, tmp_path: Path) -> None:
    """BatchNorm's statistics are over the batches of all ranks; also of a run that changes from two
    ranks to one, and of one that was stopped."""

    def config(name: str, steps: int) -> HeadTrainConfig:
        return head_config(out=str(tmp_path / name), steps=steps, lr=0.1)

    train_head(config("one", 8))
    runs = [config("two", 8), config("moved", 4), config("paused", 4), config("paused", 8)]
    (tmp_path / "rank.py").write_text(RANK)
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(tmp_path / "rank.py")),
            json.dumps([dataclasses.asdict(run) for run in runs]),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=100,
    )
    train_head(config("moved", 8))
    one, two, moved, paused = (
        read_tensors(tmp_path / name / "model.safetensors")
        for name in ("one", "two", "moved", "paused")
    )
    for name, wanted in one.items():
        assert torch.allclose(two[name], wanted, rtol=1e-4, atol=1e-5), name
        assert torch.allclose(moved[name], wanted, rtol=1e-4, atol=1e-5), name
        assert torch.equal(paused[name], two[name])
