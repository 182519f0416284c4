"""Folders of frames and labels by patterns: which frames are targets, and what is missing."""

import pytest

from deltatok.extract.datasets.registry import find_targets
from deltatok.extract.sources.clip import TargetFrames, Unreadable
from deltatok.shards.errors import UsageError

PATTERNS = {"name": "mine", "images": "frames/*/*.jpg", "labels": "masks/*/*.png", "fps": 15.0}


@pytest.fixture
def write_sequence(tmp_path, write_image, write_label):
    """Frames and labels by name; gives the root."""

    def write(sequence, frames, labels):
        root = tmp_path / "set"
        for name in frames:
            write_image(root / "frames" / sequence / f"{name}.jpg")
        for name in labels:
            write_label(root / "masks" / sequence / f"{name}.png")
        return root

    return write


def _names(*numbers):
    return [f"{number:05d}" for number in numbers]


def test_every_labelled_frame_with_a_whole_window_is_a_target(write_sequence, config):
    write_sequence("car", _names(*range(24)), _names(*range(24)))
    root = write_sequence("dog", _names(*range(20)), _names(3, 19))
    policy, clips = find_targets(config("sequences", root, **PATTERNS))
    assert [clip.key for clip in clips] == [
        *(f"car/{name}" for name in _names(*range(18, 24))),
        "dog/00019",
    ]
    assert clips[-1].source == TargetFrames(
        tuple(range(1, 20, 3)), tuple(f"frames/dog/{name}.jpg" for name in _names(*range(1, 20, 3)))
    )
    assert (policy.dataset, policy.fps, policy.stride_s) == ("mine", 15.0, 0.2)


def test_the_stride_is_the_nearest_whole_frame(write_sequence, config):
    root = write_sequence("car", _names(*range(31)), _names(30))
    policy, (clip,) = find_targets(config("sequences", root, **PATTERNS | {"fps": 24.0}))
    assert clip.source.numbers == tuple(range(0, 31, 5))
    assert policy.stride_s == 5 / 24
    policy, _ = find_targets(config("sequences", root, **PATTERNS, stride_s=0.05))
    assert policy.stride_s == 1 / 15


def test_sequence_whose_name_no_cache_can_hold_is_refused(write_sequence, config):
    root = write_sequence("two\nlines", _names(*range(20)), _names(19))
    with pytest.raises(UsageError, match=r"two\\nlines/00019': a name that a cache cannot hold"):
        find_targets(config("sequences", root, **PATTERNS))


def test_numbers_in_names_are_numbers(write_sequence, config):
    root = write_sequence("car", [f"frame{i}" for i in range(1, 20)], ["frame19"])
    _, (clip,) = find_targets(config("sequences", root, **PATTERNS))
    assert clip.source.names[-1] == "frames/car/frame19.jpg"
    assert clip.source.names[0] == "frames/car/frame1.jpg"


def test_even_steps_are_followed_and_a_gap_is_a_missing_frame(write_sequence, config):
    steps = [10 + 2 * i for i in range(21) if i != 5]
    root = write_sequence("car", _names(*steps), _names(48, 50))
    _, clips = find_targets(config("sequences", root, **PATTERNS))
    assert clips[0].source.numbers == (1, 4, 7, 10, 13, 16, 19)
    assert clips[1].source == Unreadable("frame number 5 is missing")


def test_uneven_numbers_count_as_they_come(write_sequence, config):
    names = [f"17.{fraction:06d}" for fraction in range(100, 20 * 33333, 33333)]
    names[4] = "17.140001"
    root = write_sequence("car", names, names[-1:])
    _, (clip,) = find_targets(config("sequences", root, **PATTERNS))
    assert clip.source.numbers == tuple(range(len(names) - 19, len(names), 3))


def test_a_label_without_its_frame_is_a_missing_frame(write_sequence, config):
    root = write_sequence("car", _names(*range(19)), _names(18, 19))
    _, clips = find_targets(config("sequences", root, **PATTERNS))
    assert clips[1].source == Unreadable("frame '00019', which has a label, is missing")


def test_every_chooses_targets_by_place(write_sequence, config):
    root = write_sequence("car", _names(*range(41)), _names(*range(41)))
    _, clips = find_targets(config("sequences", root, **PATTERNS, every=20))
    assert [clip.key for clip in clips] == ["car/00019", "car/00039"]


def test_one_folder_is_one_sequence_named_after_the_root(
    tmp_path, write_image, write_label, config
):
    root = tmp_path / "scene"
    for number in range(0, 57, 3):
        write_image(root / f"frame-{number:06d}.color.png")
        write_label(root / f"frame-{number:06d}.depth.png", high=9, dtype="uint16")
    patterns = PATTERNS | {"images": "frame-*.color.png", "labels": "frame-*.depth.png"}
    depth = {"kind": "depth", "steps_per_m": 1000.0, "ignore": (65535,)}
    _, (clip,) = find_targets(config("sequences", root, **patterns, **depth))
    assert clip.key == "scene/000054"
    assert clip.target.kind == "depth"
    assert (clip.target.rule.steps_per_m, clip.target.rule.ignore) == (1000.0, (65535,))


def test_brackets_in_names_are_no_patterns(tmp_path, write_image, write_label, config):
    for number in range(19):
        write_image(tmp_path / f"set/[a]/{number}.jpg")
        write_label(tmp_path / f"set/b?/{number}.png")
    brackets = PATTERNS | {"images": "[a]/*.jpg", "labels": "b?/*.png"}
    _, (clip,) = find_targets(config("sequences", tmp_path / "set", **brackets))
    assert clip.source.names[-1] == "[a]/18.jpg"


def test_label_options_become_the_rule(write_sequence, config):
    root = write_sequence("car", _names(*range(19)), _names(18))
    _, (clip,) = find_targets(config("sequences", root, **PATTERNS, binary=True, ignore=(7,)))
    assert (clip.target.rule.name, clip.target.rule.ignore) == ("binary", (7,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": "masks/*.png"}, "2 stars, --labels .* 1: wanted as many"),
        ({"images": "pictures/*/*.jpg"}, "has no pictures; wanted pictures.*found frames, masks"),
        ({"images": "frames/*/*.tif"}, "--images .*: no file in"),
        ({"images": "frames/**/*.jpg"}, "one . for every name that changes"),
        ({"images": "../*/*.jpg"}, "one . for every name that changes"),
        ({"images": "/frames/*/*.jpg"}, "one . for every name that changes"),
        ({"images": "frames/car/a.jpg"}, "one . for every name that changes"),
        ({"labels": "masks/*/0*.png"}, "no frame has a label"),
    ],
)
def test_patterns_that_cannot_be_meant(write_sequence, config, changes, message):
    root = write_sequence("car", _names(*range(19)), _names(18))
    with pytest.raises(UsageError, match=message):
        find_targets(config("sequences", root, **PATTERNS | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": None}, "fps: not given"),
        ({"labels": None}, "labels: not given"),
        ({"fps": 0.0}, "fps: got 0"),
        ({"kind": "depth"}, "steps_per_m: not given"),
        ({"steps_per_m": 256.0}, "only for depth"),
        ({"kind": "depth", "steps_per_m": 1.0, "binary": True}, "binary: is for masks"),
        ({"ignore": (-1,)}, "ignore: got"),
        ({"num_frames": 0}, "num_frames: got 0"),
        ({"split_file": "list.txt"}, "split_file: got 'list.txt' with dataset sequences"),
    ],
)
def test_options_that_cannot_be_meant(config, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        config("sequences", tmp_path, **PATTERNS | changes)
