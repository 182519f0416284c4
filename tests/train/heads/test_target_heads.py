"""Heads on evaluation caches: both crops learn from their halves of labels, depth as well."""

from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from deltatok.shards.cache import PATCHES, CacheInfo, CacheShape, finish_cache, open_cache
from deltatok.shards.errors import CacheMismatch, DamagedShard, UsageError
from deltatok.shards.evaluation.targets import cut_of_crops, load_label, windows_of_clips
from deltatok.shards.patches.reader import PatchShards
from deltatok.shards.plan import write_plan
from deltatok.train.config import HeadTrainConfig
from deltatok.train.engine.model_folder import read_provenance
from deltatok.train.heads.crops import cut_labels, upsample_predictions
from deltatok.train.heads.labels import TargetLabels
from deltatok.train.heads.train import DepthTask, SegmentationTask, train_head
from deltatok.train.models.heads import DepthHead, SegmentationHead, feature_map


@pytest.fixture
def made(tmp_path, write_evaluation_cache):
    """Writes an evaluation cache; gives cache, labels, targets."""

    def make(**changes):
        settings = {"sequences": tuple("abcdef"), "num_frames": 1}
        targets = write_evaluation_cache(
            tmp_path / "cache", tmp_path / "data", **settings | changes
        )
        return PatchShards(tmp_path / "cache"), tmp_path / "data", targets

    return make


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        settings = {
            "patches": str(tmp_path / "cache"),
            "labels": str(tmp_path / "data"),
            "out": str(tmp_path / "head"),
            "steps": 3,
            "batch_size": 8,
            "warmup_steps": 1,
            "validation_fraction": 0.2,
            "device": "cpu",
        }
        return HeadTrainConfig(**settings | changes)

    return make


def _write_readable_labels(cache, labels, targets, *, kind="segmentation"):
    """Labels that the tokens tell: of each half the sign of channel 0 of its crop's patches."""
    windows = windows_of_clips(cache)
    for key, target in targets.items():
        tokens = torch.from_numpy(cache.tokens(windows[key])[:, -1])
        sign = (feature_map(tokens, grid=cache.grid)[:, :1] > 0).float()
        height, width = target.label_size
        cut = cut_of_crops(cache.crop[windows[key]])
        halves = upsample_predictions(sign, cut, size=(height, width // 2)).round()
        label = torch.cat([halves[0, 0], halves[1, 0]], dim=-1).numpy()
        stored = label.astype(np.uint8) if kind == "segmentation" else 512 + 2048 * label
        dtype = np.uint8 if kind == "segmentation" else np.uint16
        Image.fromarray(stored.astype(dtype)).save(labels / target.label)


def test_a_segmentation_head_learns_from_both_crops(made, config, log_lines):
    cache, labels, targets = made(frame_shape=(24, 40))
    _write_readable_labels(cache, labels, targets)
    out = train_head(config(num_classes=2, steps=80, lr=0.1, eval_every=80, batch_size=16))
    values = log_lines(out, ["validation"])[-1]
    assert values["validation_accuracy"] > 0.8
    head = SegmentationHead.from_pretrained(out)
    assert (head.config.in_size, head.config.num_classes) == (32, 2)
    assert read_provenance(out)["patches"]["sampling"]["policy"] == "evaluation"


def test_a_depth_head_learns_metres(made, config, log_lines):
    cache, labels, targets = made(frame_shape=(24, 40), kind="depth")
    _write_readable_labels(cache, labels, targets, kind="depth")
    out = train_head(config(steps=150, lr=0.1, eval_every=150, max_depth=12.0, batch_size=16))
    values = log_lines(out, ["validation"])[-1]
    assert values["validation_rmse_m"] < 3.0  # depths are 2 m and 10 m: the middle has 4 m
    head = DepthHead.from_pretrained(out)
    assert (head.config.num_bins, head.config.max_depth) == (256, 12.0)


def test_a_depth_head_says_80_m_unless_told(made, config):
    made(kind="depth")
    head = DepthHead.from_pretrained(train_head(config()))
    assert (head.config.min_depth, head.config.max_depth) == (1e-3, 80.0)


@pytest.mark.parametrize(
    ("frame_shape", "label_shape"),
    [
        ((24, 40), (24, 40)),
        ((24, 40), (24, 39)),
        ((40, 24), (41, 24)),
        ((20, 50), None),
        ((9, 9), None),
    ],
)
def test_samples_are_the_halves_that_evaluation_scores(made, frame_shape, label_shape):
    cache, folder, targets = made(frame_shape=frame_shape, label_shape=label_shape)
    labels = TargetLabels(str(folder), cache, num_classes=4)
    for key, windows in windows_of_clips(cache).items():
        cut = cut_of_crops(cache.crop[windows])
        whole = torch.from_numpy(load_label(targets[key], folder))[None]
        halves = cut_labels(whole, cut)
        generator = torch.Generator().manual_seed(0)
        outputs = torch.randn((len(windows), 3, 3, 3), generator=generator)
        enlarged = upsample_predictions(outputs, cut, size=tuple(halves.shape[-2:]))
        for place, window in enumerate(windows):
            assert labels.size(window) == tuple(halves.shape[-2:])
            (half,) = labels.read(np.array([window]), np.array([0]))
            np.testing.assert_array_equal(half, halves[place])
            mine = labels.enlarge(outputs[place : place + 1], window)
            torch.testing.assert_close(mine[0], enlarged[place], rtol=0, atol=0)


def test_only_the_target_frame_is_a_sample(made):
    cache, folder, _ = made(num_frames=7)
    labels = TargetLabels(str(folder), cache, num_classes=4)
    np.testing.assert_array_equal(labels.samples(np.array([0, 3])), [6, 27])


def test_validation_keeps_whole_sequences(made):
    cache, folder, targets = made()
    names, videos = TargetLabels(str(folder), cache, num_classes=4).videos
    assert names == list("abcdef")
    for window, video in enumerate(videos):
        key = cache.keys[int(cache.clip_index[window])]
        assert targets[key].sequence == names[video]


def test_labels_of_several_sizes_share_a_batch(made, edit_plan):
    cache, folder, targets = made(frame_shape=(24, 40))
    Image.fromarray(np.ones((23, 41), np.uint8)).save(folder / targets["a/000019"].label)

    def change(lines):
        for clip in chain.from_iterable(line["clips"] for line in lines):
            if clip["key"] == "a/000019":
                clip["target"]["label_size"] = [23, 41]

    edit_plan(cache.folder, change)
    finish_cache(cache.folder)
    cache = PatchShards(cache.folder)
    labels = TargetLabels(str(folder), cache, num_classes=4)
    windows = windows_of_clips(cache)
    chosen = np.array([*windows["a/000019"], *windows["b/000019"]])
    read = labels.read(chosen, np.zeros(4, int))
    assert read.shape == (4, 24, 21)
    assert (read[0, :23, :20] == 1).all() and (read[0, :, 20] == 255).all()
    assert (read[1, :23] == 1).all() and (read[:2, 23] == 255).all()
    assert (read[2:, :, 20] == 255).all()


def test_the_run_resumed_equals_uninterrupted(made, config, tmp_path):
    made(kind="depth")
    train_head(config(steps=2, save_every=2))
    train_head(config(steps=4))
    train_head(config(steps=4, out=str(tmp_path / "whole")))
    one, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("head", "whole")
    )
    assert one == other


def test_windows_without_a_target_are_a_damaged_plan(made, config, edit_plan):
    cache, _, _ = made()
    edit_plan(cache.folder, lambda lines: lines[0]["clips"][0].pop("target"))
    with pytest.raises(DamagedShard, match="'a/000019' has windows and no target"):
        train_head(config(num_classes=4))


def test_a_cache_without_windows_is_refused(tmp_path, config):
    identity = {"sampling": {"policy": "evaluation"}, "storage": {"dtype": "float16"}}
    shape = CacheShape(num_frames=1, num_tokens=4, grid=(2, 2), hidden_size=8)
    open_cache(tmp_path / "cache", CacheInfo(format=PATCHES, identity=identity, shape=shape))
    write_plan(tmp_path / "cache", [])
    finish_cache(tmp_path / "cache")
    with pytest.raises(UsageError, match="has no windows"):
        train_head(config(num_classes=4))


def test_the_number_of_classes_comes_from_the_data_set(made, config, edit_plan):
    cache, _, _ = made()

    def change(lines):
        for clip in chain.from_iterable(line["clips"] for line in lines):
            clip["target"]["rule"] = {"name": "cityscapes"}

    edit_plan(cache.folder, change)
    with pytest.raises(UsageError, match=r"num_classes 4: .*cityscapes.* have 19 classes"):
        train_head(config(num_classes=4))


def test_an_unknown_number_of_classes_must_be_given(made, config):
    made()
    with pytest.raises(UsageError, match="give --num-classes"):
        train_head(config())


def test_more_classes_than_said_are_refused_by_file(made, config):
    made()
    with pytest.raises(UsageError, match=r"\.png has class 3: wanted 0 to 1"):
        train_head(config(num_classes=2))


def test_starting_from_a_head_of_other_classes_is_refused(made, config, tmp_path):
    made()
    first = train_head(config(num_classes=4))
    with pytest.raises(CacheMismatch, match="num_classes is 4, this run's model has 5"):
        train_head(config(num_classes=5, start_from=str(first), out=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("depth", {"num_classes": 4}, "depth, which has no classes"),
        ("segmentation", {"num_classes": 4, "max_depth": 10.0}, "are classes, no depth"),
    ],
)
def test_options_of_the_other_kind_are_refused(made, config, kind, changes, message):
    made(kind=kind)
    with pytest.raises(UsageError, match=message):
        train_head(config(**changes))


def test_a_missing_label_is_named_before_training(made, config):
    _, labels, targets = made()
    (labels / targets["c/000039"].label).unlink()
    with pytest.raises(UsageError, match=r"c/000039\.png: no such label"):
        train_head(config(num_classes=4))


def test_labels_without_a_labelled_pixel_are_refused(made, config):
    _, labels, targets = made()
    for target in targets.values():
        Image.fromarray(np.full(target.label_size, 255, np.uint8)).save(labels / target.label)
    with pytest.raises(UsageError, match="no labelled pixel in 24 of 24 labels"):
        train_head(config(num_classes=4))


def test_depth_scores_count_valid_pixels_only():
    task = DepthTask(in_size=8, max_depth=10.0)
    prediction = torch.tensor([[[2.0, 4.0, 7.0, 9.0]]])
    label = torch.tensor([[1.0, 8.0, 0.0, 11.0]])
    loss, squares, count = task.score(prediction, label)
    errors = np.log([2.001 / 1.001, 4.001 / 8.001])
    wanted = np.sqrt((errors**2).mean() - 0.85 * errors.mean() ** 2)
    assert loss.item() == pytest.approx(wanted, rel=1e-4)
    assert (squares.item(), count.item()) == (1.0 + 16.0, 2)
    assert task.summary(squares[None], count[None]).item() == pytest.approx(8.5**0.5)


@pytest.mark.parametrize(
    "task", [DepthTask(in_size=8, max_depth=None), SegmentationTask(in_size=8, num_classes=3)]
)
def test_a_frame_without_labels_trains_nothing(task):
    channels = 1 if isinstance(task, DepthTask) else 3
    prediction = torch.full((channels, 2, 2), 5.0, requires_grad=True)
    label = torch.zeros(2, 2) if isinstance(task, DepthTask) else torch.full((2, 2), 255)
    loss, _, count = task.score(prediction, label)
    loss.backward()
    assert count == 0
    assert loss.item() < 1e-3
    assert prediction.grad.abs().max() == 0
