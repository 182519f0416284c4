"""The little world: deterministic, exactly labelled, and its futures are all the futures."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from deltatok.pipeline.little_world import LittleWorldConfig, Walker, futures, simulate, walk
from deltatok.pipeline.world_files import make_little_world
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
    for index in range(config.num_val_clips):
        rng = np.random.default_rng([config.seed, 2, index])
        path = simulate(config, rng, config.labelled_duration_s)
        happened = [walker.position for walker in path[4:7]]
        known = json.loads((world / "futures" / f"{index:04d}.json").read_text())["futures"]
        distances = [np.abs(np.subtract(way["positions_xy"], happened)).max() for way in known]
        assert min(distances) < 1e-9
        assert sum(way["probability"] for way in known) == pytest.approx(1)


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
