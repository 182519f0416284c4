"""The little world: deterministic, exactly labelled, and its futures are all the futures."""

import dataclasses
from pathlib import Path

import av
import numpy as np
import pytest

from deltatok.evaluate.forecast.modes import FutureFolder
from deltatok.pipeline.little_world.files import make_little_world, render, write_mp4
from deltatok.pipeline.little_world.simulation import (
    LittleWorldConfig,
    Walker,
    futures,
    possible_rests,
    seen_futures,
    simulate,
    walk,
)
from deltatok.shards.errors import CacheMismatch
from deltatok.shards.files import sha256_file


def small(out: Path, seed: int = 0) -> LittleWorldConfig:
    return LittleWorldConfig(
        out=str(out), num_train_clips=2, num_head_clips=1, num_val_clips=3, frame_size=32, seed=seed
    )


def files_of(folder: Path) -> dict[str, str]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in found}


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    one = files_of(make_little_world(small(tmp_path / "a")))
    two = files_of(make_little_world(small(tmp_path / "b")))
    assert {k: v for k, v in one.items() if k != "world.json"} == {
        k: v for k, v in two.items() if k != "world.json"
    }
    assert one["train/0000.mp4"] != one["train/0001.mp4"]


@pytest.mark.parametrize("index", [6, 13, 15, 18, 22])  # x264's mbtree made these in two ways
def test_the_same_frames_give_the_same_video_each_time(tmp_path: Path, index: int) -> None:
    config = LittleWorldConfig(out=str(tmp_path))
    rng = np.random.default_rng([0, 1, index])
    frames, _ = render(config, rng, simulate(config, rng, 1.4), 35)
    digests = set()
    for i in range(15):
        path = tmp_path / f"{i}.mp4"
        write_mp4(path, frames, config.fps)
        digests.add(sha256_file(path))
    assert len(digests) == 1


def test_a_world_with_other_settings_is_refused(tmp_path: Path) -> None:
    make_little_world(small(tmp_path / "a"))
    with pytest.raises(CacheMismatch, match="seed 0, wanted 1"):
        make_little_world(small(tmp_path / "a", seed=1))


def test_labels_cover_the_shape_that_the_frames_show(tmp_path: Path) -> None:
    world = make_little_world(small(tmp_path / "a"))
    labels = np.load(world / "labels" / "val" / "0000.mp4.npy")
    with av.open(str(world / "val" / "0000.mp4")) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert labels.shape == frames.shape[:3]
    inside, outside = frames[labels > 0].astype(float), frames[labels == 0].astype(float)
    saturation = [np.ptp(pixels, axis=1).mean() for pixels in (inside, outside)]
    assert saturation[0] > 3 * saturation[1]


def test_the_future_that_happened_is_among_the_possible_ones(tmp_path: Path) -> None:
    config = small(tmp_path / "a")
    world = make_little_world(config)
    known = FutureFolder(str(world / "futures"))
    for key in ("0000.mp4", "0001.mp4", "0002.mp4"):
        happened = np.load(world / "labels" / "val" / f"{key}.npy")[30]
        for seen in (15, 25):
            found = known.window(key, seen, 30)
            assert (found.classes == happened).all(axis=(1, 2)).any()
            assert found.probability.sum() == pytest.approx(1, abs=1e-6)


def test_a_finished_world_without_futures_gets_them(tmp_path: Path) -> None:
    config = small(tmp_path / "a")
    world = make_little_world(config)
    whole = files_of(world)
    (world / "futures" / "0001.mp4.npz").unlink()
    make_little_world(config)
    assert files_of(world) == whole


def test_clips_that_end_before_the_target_have_no_futures(tmp_path: Path) -> None:
    config = dataclasses.replace(small(tmp_path / "a"), labelled_duration_s=0.5)
    assert not (make_little_world(config) / "futures").exists()


def test_a_turn_that_was_seen_rules_further_turns_out(tmp_path: Path) -> None:
    walker = Walker(1, (0.5, 0.5), (1, 0), 0)
    path = [walker, walker, *(Walker(1, (0.5, 0.5), (1, 0), since) for since in (1, 2, 3))]
    found = seen_futures(small(tmp_path), path, first_tick=0, last_tick=3, ticks=1)
    assert len(found.probability) == 1  # turned at tick 1, may turn again at tick 5


def test_a_turn_at_the_first_frame_cannot_be_seen(tmp_path: Path) -> None:
    config = small(tmp_path)
    turn = config.turn_probability
    resting = [Walker(1, (0.5, 0.5), (1, 0), since) for since in (0, 1, 2, 3)]
    rested = [Walker(1, (0.5, 0.5), (1, 0), 99)] * 4
    for path in (resting, rested):  # the frames at ticks 0 to 3 look the same
        rests = possible_rests(config, path, first_tick=0, last_tick=3)
        assert rests == pytest.approx(
            {3: turn / (turn + (1 - turn) ** 3), 4: (1 - turn) ** 3 / (turn + (1 - turn) ** 3)}
        )


def test_a_rested_walker_has_seven_futures_in_three_ticks(tmp_path: Path) -> None:
    config = small(tmp_path)
    ways = list(futures(config, Walker(1, (0.5, 0.5), (1, 0), 99), 3))
    assert len(ways) == 7
    straight = max(ways, key=lambda way: way[1][-1][0])
    assert straight[0] == pytest.approx((1 - config.turn_probability) ** 3)


def test_walls_are_mirrors(tmp_path: Path) -> None:
    config = small(tmp_path)
    after = walk(config, Walker(1, (0.8, 0.5), (1, 0), 0), 0.2)
    assert after.heading == (-1, 0)
    assert after.position[0] == pytest.approx(2 * (1 - config.radius) - 0.9)
