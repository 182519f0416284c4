"""Modes: which futures can be told apart, which a forecast hits, and known recall and precision."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deltatok.evaluate.forecast.modes import (
    NO_MODE,
    Calibration,
    FutureFolder,
    KnownFutures,
    find_modes,
    frequency_parts,
    hits,
    mode_values,
    overlap,
    recall_of_draws,
    reliability,
    write_futures,
)
from deltatok.shards.errors import UsageError

SIZE = 12


def block(left: int, *, shape: int = 1, width: int = 4) -> NDArray[np.uint8]:
    """A class map (SIZE, SIZE) with one block of class `shape` at column `left`."""
    picture = np.zeros((SIZE, SIZE), np.uint8)
    picture[2:8, left : left + width] = shape
    return picture


def futures(*maps: NDArray[np.uint8], probability: list[float]) -> KnownFutures:
    return KnownFutures(probability=np.array(probability), classes=np.stack(maps), background=0)


def test_overlap_is_the_iou_of_the_shape() -> None:
    ours = np.stack([block(0), block(2), block(4), block(0, shape=2)])
    found = overlap(ours, block(0)[None], background=0)
    assert found[:, 0] == pytest.approx([1, 2 / 6, 0, 0])


def test_overlap_without_background_is_the_share_of_equal_pixels() -> None:
    found = overlap(block(0)[None], block(2)[None], background=-1)
    assert found[0, 0] == pytest.approx(1 - 6 * 4 / SIZE**2)


def test_ignored_pixels_do_not_count() -> None:
    ignored = block(0)
    ignored[:, 2:] = 255
    assert overlap(block(0)[None], ignored[None], background=0)[0, 0] == 1


def test_futures_that_look_alike_are_one_mode_with_the_sum_of_their_probabilities() -> None:
    known = futures(block(0), block(8), block(1), probability=[0.3, 0.45, 0.25])
    modes = find_modes(known, threshold=0.5)
    assert modes.probability == pytest.approx([0.55, 0.45])
    assert modes.mode_of.tolist() == [0, 1, 0]


def test_modes_are_begun_by_the_most_probable_futures() -> None:
    known = futures(block(0), block(1), block(2), probability=[0.2, 0.5, 0.3])
    modes = find_modes(known, threshold=0.5)  # the middle one is like both, which differ
    assert modes.mode_of.tolist() == [0, 0, 0]
    rare = futures(block(0), block(1), block(2), probability=[0.5, 0.2, 0.3])
    assert find_modes(rare, threshold=0.5).mode_of.tolist() == [0, 0, 1]


def test_probabilities_are_made_to_add_up_exactly(tmp_path: Path) -> None:
    known = {(3, 6): futures(block(0), block(8), probability=[0.7504, 0.25])}
    write_futures(tmp_path, "a", known, background=0)
    found = FutureFolder(str(tmp_path)).window("a", 3, 6)
    assert found.probability.sum() == pytest.approx(1, 1e-12)


def test_a_forecast_hits_the_future_it_looks_most_like_or_none() -> None:
    known = futures(block(0), block(3), block(8), probability=[0.5, 0.3, 0.2])
    modes = find_modes(known, threshold=0.5)
    samples = np.stack([block(3), block(2), block(1), block(6), block(8, shape=2), block(0)])
    nothing = np.zeros_like(samples[:1])
    found = hits(modes, np.concatenate([samples, nothing]))
    # block(6) lies between two futures: 1 of 7 and 2 of 6 columns shared; a wrong shape is none.
    assert found.tolist() == [1, 1, 0, NO_MODE, NO_MODE, 0, NO_MODE]


def test_hand_made_samples_have_the_recall_and_precision_they_were_made_with() -> None:
    known = futures(block(0), block(4), block(8), probability=[0.7, 0.2, 0.1])
    modes = find_modes(known, threshold=0.5)
    samples = np.stack([block(0), block(1), block(8), block(6)])  # two modes, one sample of none
    recall, precision, weighted = mode_values(modes, hits(modes, samples))
    assert recall == pytest.approx(2 / 3)
    assert precision == pytest.approx(3 / 4)
    assert weighted == pytest.approx(0.8)


def test_samples_of_all_futures_and_nothing_else_are_perfect() -> None:
    known = futures(block(0), block(4), block(8), probability=[0.7, 0.2, 0.1])
    modes = find_modes(known, threshold=0.5)
    assert mode_values(modes, hits(modes, known.classes)) == pytest.approx((1, 1, 1))


def test_the_distance_of_frequencies_is_split_into_impossible_and_too_often() -> None:
    known = futures(block(0), block(4), block(8), probability=[0.7, 0.2, 0.1])
    modes = find_modes(known, threshold=0.5)
    samples = [0, 0, 2, 2, 2, 2, 2, NO_MODE, NO_MODE, NO_MODE]  # q = 0.2, 0, 0.5 and 0.3 of none
    parts = frequency_parts(modes, np.array(samples))
    assert parts["frequency_distance"] == pytest.approx((0.7, 1))
    assert parts["impossible_mass"] == pytest.approx((0.3, 1))
    assert parts["excess_mass"] == pytest.approx((0.4, 1))  # of the third: 0.5 - 0.1
    assert parts["likeliest_share"] == (2, 7)
    assert parts["likeliest_probability"] == pytest.approx((0.7 * 7, 7))


@pytest.mark.parametrize("seed", range(20))
def test_the_distance_is_the_largest_difference_of_any_events_probability(seed: int) -> None:
    """The definition of total variation, over all subsets of {no mode, modes}."""
    rng = np.random.default_rng(seed)
    true = rng.dirichlet(np.ones(3))
    known = futures(block(0), block(4), block(8), probability=true.tolist())
    modes = find_modes(known, threshold=0.5)
    found = rng.integers(NO_MODE, 3, size=rng.integers(1, 12))
    p = np.array([0.0, *modes.probability])
    q = np.bincount(found + 1, minlength=4) / len(found)
    events = [[outcome for outcome in range(4) if event >> outcome & 1] for event in range(16)]
    largest = max(abs(q[event].sum() - p[event].sum()) for event in events)
    parts = frequency_parts(modes, found)
    assert parts["frequency_distance"][0] == pytest.approx(largest)
    assert parts["impossible_mass"][0] + parts["excess_mass"][0] == pytest.approx(largest)
    assert parts["impossible_mass"][0] == pytest.approx(1 - mode_values(modes, found)[1])


def test_hits_that_fall_by_the_probabilities_are_as_often_the_likeliest_as_they_should() -> None:
    """Also where samples of windows with a sure future hit more often than others."""
    rng, share, wanted = np.random.default_rng(0), np.zeros(2), np.zeros(2)
    for window in range(4000):
        true = [0.9, 0.1] if window % 2 else [0.4, 0.35, 0.25]
        maps = [block(4 * number) for number in range(len(true))]
        modes = find_modes(futures(*maps, probability=true), threshold=0.5)
        found = rng.choice(len(true), p=modes.probability, size=20)
        found[rng.random(20) < (0.1 if window % 2 else 0.6)] = NO_MODE
        parts = frequency_parts(modes, found)
        share += parts["likeliest_share"]
        wanted += parts["likeliest_probability"]
    assert wanted[0] / wanted[1] > 0.7  # 0.65 if every window counted alike
    assert share[0] / share[1] == pytest.approx(wanted[0] / wanted[1], abs=0.005)


def test_a_single_forecast_of_the_likeliest_future_is_too_often_what_is_left() -> None:
    modes = find_modes(futures(block(0), block(8), probability=[0.7, 0.3]), threshold=0.5)
    parts = frequency_parts(modes, np.array([0]))
    assert parts["frequency_distance"] == pytest.approx((0.3, 1))
    assert parts["likeliest_share"] == (1, 1)
    nothing = frequency_parts(modes, np.array([NO_MODE]))
    assert nothing["frequency_distance"] == (1, 1)
    assert nothing["likeliest_share"] == (0, 0)


def test_recall_of_draws_is_that_of_draws() -> None:
    probability = np.array([0.7, 0.2, 0.1])
    rng = np.random.default_rng(0)
    counts = rng.multinomial(5, probability, size=20_000)
    plain, weighted = recall_of_draws(probability, 5)
    assert plain == pytest.approx((counts > 0).mean(), abs=0.005)
    assert weighted == pytest.approx(((counts > 0) @ probability).mean(), abs=0.005)


def test_calibration_of_samples_with_known_frequencies() -> None:
    known = futures(block(0), block(8), probability=[0.75, 0.25])
    modes = find_modes(known, threshold=0.5)
    calibration = Calibration()
    calibration.add(modes, np.array([0, 0, 1, NO_MODE]), 0)
    found = calibration.summary()
    assert found["modes_per_window"] == 2
    assert found["frequency_distance"] == pytest.approx((0.25 + 0 + 0.25) / 2)
    assert found["calibration_error"] == pytest.approx(0.25 / 2)
    assert found["one_true_draw"]["mode_recall"] == pytest.approx(0.5)


def test_reliability_bins_hold_every_mode_once() -> None:
    predicted = np.array([0.0, 0.0, 0.05, 0.1, 1.0])
    found = reliability(predicted, np.array([0.1, 0.3, 0.2, 0.4, 0.9]))
    assert [part["modes"] for part in found] == [2, 1, 1, 1]
    assert found[0] == {"modes": 2, "frequency": 0.0, "probability": pytest.approx(0.2)}


def test_futures_are_read_as_they_were_written(tmp_path: Path) -> None:
    one = futures(block(0), block(8), probability=[0.75, 0.25])
    other = futures(block(3), probability=[1.0])
    write_futures(tmp_path, "sub/a.mp4", {(3, 6): one, (5, 6): other}, background=0)
    folder = FutureFolder(str(tmp_path))
    for pair, wanted in (((3, 6), one), ((5, 6), other)):
        found = folder.window("sub/a.mp4", *pair)
        assert (found.classes == wanted.classes).all()
        assert found.probability == pytest.approx(wanted.probability)
        assert found.background == 0


def test_the_same_futures_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        known = {(3, 6): futures(block(0), probability=[1.0])}
        write_futures(tmp_path / name, "clip", known, background=0)
    files = [(tmp_path / name / "clip.npz").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_futures_of_other_frames_are_refused(tmp_path: Path) -> None:
    known = {(3, 6): futures(block(0), probability=[1.0])}
    write_futures(tmp_path, "a", known, background=0)
    with pytest.raises(UsageError, match="no futures of frame 6 after frame 4, only 3 -> 6"):
        FutureFolder(str(tmp_path)).window("a", 4, 6)


def test_probabilities_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    known = {(3, 6): futures(block(0), probability=[0.9])}
    write_futures(tmp_path, "a", known, background=0)
    with pytest.raises(UsageError, match=r"add up to 0\.9"):
        FutureFolder(str(tmp_path)).window("a", 3, 6)


BAD_FUTURES = ("missing", "../outside", "text", "list", "pickled", "other", "flat", "nan")


@pytest.mark.parametrize("key", [*BAD_FUTURES, "negative", "flipped", "array"])
def test_a_file_that_holds_no_futures_is_refused(tmp_path: Path, key: str) -> None:
    folder = tmp_path / "futures"
    folder.mkdir()
    (folder / "text.npz").write_text("no archive")
    np.savez(folder / "list.npz", probability=np.ones(1, np.float32))
    numbers: dict[str, Any] = {
        "context_frame": np.array([3], np.int32),
        "target_frame": np.array([6], np.int32),
        "probability": np.ones(1, np.float32),
        "classes": np.zeros((1, 2, 2), np.int64),
        "background": np.array(0, np.int32),
    }
    np.savez(folder / "other.npz", **numbers)
    np.savez(folder / "pickled.npz", **numbers | {"classes": np.array([{}], object)})
    right = numbers | {"classes": np.ones((1, 40, 40), np.uint8)}
    np.savez(folder / "flat.npz", **right | {"classes": np.ones((1, 0, 40), np.uint8)})
    np.savez(folder / "nan.npz", **right | {"probability": np.full(1, np.nan, np.float32)})
    two = {name: np.repeat(right[name], 2, axis=0) for name in right if name != "background"}
    two |= {"probability": np.array([1.5, -0.5], np.float32), "background": right["background"]}
    np.savez(folder / "negative.npz", **two)
    np.savez_compressed(folder / "flipped.npz", **right)
    data = bytearray((folder / "flipped.npz").read_bytes())
    data[40:90] = bytes(50)  # in the first array's compressed bytes
    (folder / "flipped.npz").write_bytes(data)
    np.save(folder / "array.npy", np.ones(3))
    (folder / "array.npy").rename(folder / "array.npz")
    with pytest.raises(UsageError, match="clip"):
        FutureFolder(str(folder)).window(key, 3, 6)
