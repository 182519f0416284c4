"""Crops, labels, masks and metrics: what the golden cases do not say."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltatok.evaluate.forecast.rollout import best_sample, mean_sample, sample_losses
from deltatok.evaluate.forecast.scores import (
    class_counts,
    class_maps,
    confusion_matrix,
    near_depths,
    squared_errors,
)
from deltatok.evaluate.forecast.sequences import values
from deltatok.shards.errors import DeltatokError
from deltatok.shards.evaluation.geometry import compute_resize_sizes, cut_of
from deltatok.shards.evaluation.labels import kb_crop
from deltatok.train.heads.crops import cut_frames, cut_labels
from deltatok.train.models.heads import SegmentationHead, SegmentationHeadConfig

SIDES = st.integers(1, 40)


@given(height=SIDES, width=SIDES)
def test_joined_label_halves_are_the_labels(height, width):
    labels = torch.arange(2 * height * width).reshape(2, 1, height, width)
    cut = cut_of(height, width)
    halves = cut_labels(labels, cut)
    if cut.wide is not None:  # of an odd side the first half is padded
        first, second = halves.chunk(2)
        dim, kept = (-1, width // 2) if cut.wide else (-2, height // 2)
        halves = torch.cat([first.narrow(dim, 0, kept), second], dim=dim)
    assert torch.equal(halves, labels)


@given(height=SIDES, width=SIDES)
def test_frame_crops_are_squares_at_the_two_ends(height, width):
    frames = torch.arange(height * width).reshape(1, 1, height, width)
    crops = cut_frames(frames, cut_of(height, width))
    side = min(height, width)
    assert crops.shape[-2:] == (side, side)
    assert crops[0, 0, 0, 0] == 0
    assert crops[-1, 0, -1, -1] == height * width - 1


@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_resized_frames_have_the_short_side_and_at_most_ratio_2(height, width):
    new_height, new_width = compute_resize_sizes(height, width, 512)
    assert min(new_height, new_width) == 512
    assert max(new_height, new_width) <= 1024
    assert (new_height <= new_width) == (height <= width) or new_height == new_width


def test_padding_of_odd_labels_counts_nowhere():
    cut = cut_of(2, 5)
    assert cut_labels(torch.zeros(1, 2, 5, dtype=torch.int64), cut)[0, 0].tolist() == [0, 0, 255]
    assert cut_labels(torch.ones(1, 2, 5), cut)[0, 0].tolist() == [1, 1, 0]


def test_small_images_cannot_be_cropped_as_kitti_frames():
    with pytest.raises(DeltatokError, match="300 x 1300 pixels cannot be cropped"):
        kb_crop(np.zeros((300, 1300)))


def test_classes_that_never_occur_do_not_count():
    classes = torch.tensor([[[0, 1]]])
    confusion = confusion_matrix(classes, classes, num_classes=9)
    assert values("miou", *class_counts(confusion)) == 1.0


def test_ignored_pixels_do_not_count():
    classes, labels = torch.tensor([[[0, 1]]]), torch.tensor([[[0, 255]]])
    confusion = confusion_matrix(classes, labels, num_classes=3)
    assert values("miou", *class_counts(confusion)) == 1.0
    assert confusion.sum() == 1


def test_depth_error_is_over_all_valid_pixels_of_the_set():
    first = squared_errors(torch.tensor([[[[3.0, 9.0]]]]), torch.tensor([[[1.0, 0.0]]]))
    second = squared_errors(torch.tensor([[[[1.0, 1.0]]]]), torch.tensor([[[1.0, 1.0]]]))
    sums, counts = np.add(first, second)
    assert values("rmse", sums[None], counts[None]) == pytest.approx((4 / 3) ** 0.5)


def test_delta1_counts_depths_within_a_quarter_either_way():
    metres = torch.tensor([[[[1.24, 1.26, 0.81, 0.79, 5.0]]]])
    near, known = near_depths(metres, torch.tensor([[[1.0, 1.0, 1.0, 1.0, 0.0]]]))
    assert (near, known) == (2, 4)
    assert values("delta1", np.array([near]), np.array([known])) == 0.5


def test_class_maps_have_the_asked_size():
    head = SegmentationHead(SegmentationHeadConfig(in_size=4, num_classes=3)).eval()
    with torch.no_grad():
        classes = class_maps(head, torch.randn(2, 6, 4), grid=(2, 3), size=(8, 12))
    assert classes.shape == (2, 8, 12)
    assert classes.max() < 3


def test_best_sample_is_chosen_by_its_last_step_only():
    targets = torch.zeros(1, 2, 1, 1)
    predictions = torch.tensor([[[5.0, 1.0], [0.0, 2.0]]])[..., None, None]
    best, index = best_sample(predictions, targets)
    assert index.tolist() == [0]
    assert best.flatten().tolist() == [5.0, 1.0]
    assert sample_losses(predictions, targets).argmin() == 0


def test_mean_averages_features():
    predictions = torch.tensor([[[1.0], [3.0]]])[..., None, None]
    assert mean_sample(predictions).flatten().tolist() == [2.0]
