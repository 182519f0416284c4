"""Training windows from a `uniform` patch cache: drawn among the stored frames, and said so."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from deltatok.pipeline.commands.extract import main as extract
from deltatok.pipeline.commands.train import main as train
from deltatok.shards import DeltaShards, PatchShards, UsageError
from deltatok.shards.files import sha256_file
from deltatok.shards.sampling import KINETICS_STRIDE_RANGE_S, UniformDraws
from deltatok.shards.tools.verify import verify_cache
from deltatok.train.config import TokenizeConfig
from deltatok.train.encode import write_deltas
from deltatok.train.models.deltatok import DeltaTok

Fails = Callable[..., None]


@pytest.fixture(scope="module")
def uniform(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training clips of 3 s at 10 frames a second: seven windows of 4 frames each. A shard
    for every clip, and one for a broken file, that has no windows."""
    clips = tmp_path_factory.mktemp("uniform") / "clips"
    shutil.copytree(tiny_inputs / "world" / "train", clips)
    (clips / "broken.mp4").write_bytes(b"no video")
    out = clips.with_name("patches")
    words = ["--videos", str(clips), "--frame-size", "32", "--max-quarantined", "0.5"]
    words += ["--backbone", str(tiny_inputs / "backbone"), "--workers", "1", "--out", str(out)]
    words += ["--sampling", "uniform", "--fps", "10", "--num-frames", "4"]
    assert extract([*words, "--frames-per-shard", "16"]) == 0
    return out


@pytest.fixture
def words(uniform: Path, tiny_run: Path) -> list[str]:
    """Flags that encode `uniform`, without --out."""
    return ["--patches", str(uniform), "--tokenizer", str(tiny_run / "tokenizer")]


@pytest.fixture
def drawn(words: list[str], tmp_path: Path) -> DeltaShards:
    """Three windows of 6 frames a clip, seed 5."""
    out = str(tmp_path / "drawn")
    flags = ["--windows", "3", "--num-frames", "6", "--seed", "5", "--batch-windows", "2"]
    assert extract([*words, *flags, "--out", out]) == 0
    return DeltaShards(out)


def stored_times(cache: PatchShards, key: str) -> dict[int, float]:
    """Frame index -> seconds of all stored frames of a clip."""
    own = np.flatnonzero(cache.clip_index == cache.keys.index(key))
    index, times = cache.frame_index(own).ravel(), cache.timestamps_s(own).ravel()
    return dict(zip(index.tolist(), times.tolist(), strict=True))


def test_windows_are_drawn_among_all_stored_frames_of_the_clip(
    uniform: Path, drawn: DeltaShards
) -> None:
    cache = PatchShards(uniform)
    assert drawn.shape == (6, cache.shape[2])
    assert len(drawn) == 3 * len(cache.keys)
    assert drawn.info.counts["quarantined"] == 1
    spans = []
    for number in range(len(drawn)):
        window = drawn.window(number)
        times = stored_times(cache, window["clip"])
        own = np.array([times[frame] for frame in window["frames"]])  # all of them are stored
        assert np.allclose(own - own[0], drawn.timestamps_s([number])[0], atol=1e-6)
        half_step = 0.051
        gaps = np.diff(own)
        assert (gaps > KINETICS_STRIDE_RANGE_S[0] - 2 * half_step).all()
        assert (gaps < KINETICS_STRIDE_RANGE_S[1] + 2 * half_step).all()
        assert window["flipped"] is False
        assert window["crop"][:2] == [0, 0]
        spans.append(own[-1] - own[0])
    assert max(spans) > 0.3  # further than a stored window of 4 frames reaches


def test_tokens_are_those_of_the_frames_named(
    uniform: Path, tiny_run: Path, drawn: DeltaShards
) -> None:
    cache = PatchShards(uniform)
    model = DeltaTok.from_pretrained(tiny_run / "tokenizer")
    for number in (0, len(drawn) - 1):
        window = drawn.window(number)
        own = np.flatnonzero(cache.clip_index == cache.keys.index(window["clip"]))
        frames = cache.frame_index(own)
        places = [np.argwhere(frames == frame)[0] for frame in window["frames"]]
        x = np.stack([cache.tokens([own[place[0]]])[0, place[1]] for place in places])
        with torch.no_grad():
            z = model.encode_sequence(
                torch.from_numpy(x)[None], torch.tensor(cache.black), grid=cache.grid
            )
        assert np.allclose(drawn.tokens([number])[0], z[0].half().numpy(), atol=2e-3)


def test_identity_records_the_deviation(uniform: Path, drawn: DeltaShards) -> None:
    sampling = drawn.info.identity["sampling"]
    assert sampling["policy"] == "windows from uniform"
    assert (sampling["num_windows"], sampling["num_frames"], sampling["seed"]) == (3, 6, 5)
    assert sampling["time_stride_range"] == pytest.approx(KINETICS_STRIDE_RANGE_S)
    assert drawn.info.identity["patches"]["sampling"]["policy"] == "uniform"
    assert drawn.info.parent_fingerprint == PatchShards(uniform).fingerprint
    assert verify_cache(drawn.folder, deep=True).problems == []


def digest(folder: Path) -> str:
    return hashlib.sha256(
        "".join(sha256_file(path) for path in sorted(folder.glob("shards/*.tar"))).encode()
    ).hexdigest()


def test_same_seed_same_bytes_another_seed_others(words: list[str], tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert extract([*words, "--seed", seed, "--out", str(tmp_path / name)]) == 0
        digests.append(digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]


def test_draws_do_not_depend_on_other_clips() -> None:
    draws = UniformDraws(num_windows=2, num_frames=5, seed=0)
    times = np.arange(40) * 0.1
    assert np.array_equal(draws.rows("a", times), draws.rows("a", times))
    assert not np.array_equal(draws.rows("a", times), draws.rows("b", times))
    more = UniformDraws(num_windows=3, num_frames=5, seed=0)
    assert np.array_equal(more.rows("a", times)[:2], draws.rows("a", times))


def test_clip_shorter_than_the_window_repeats_frames() -> None:
    rows = UniformDraws(num_windows=1, num_frames=8, seed=0).rows("a", np.array([0.0, 0.2]))
    assert rows.tolist() == [[0, *sorted(rows[0, 1:].tolist())]]
    assert set(rows[0].tolist()) == {0, 1}


@pytest.mark.parametrize("flag", ["--windows", "--num-frames", "--seed"])
def test_flags_are_refused_where_windows_are_drawn_already(
    tiny_run: Path, tmp_path: Path, flag: str, fails: Fails
) -> None:
    words = ["--patches", str(tiny_run / "patches"), "--tokenizer", str(tiny_run / "tokenizer")]
    words += ["--out", str(tmp_path / "o"), flag, "2"]
    fails(extract, words, 2, "drawn already", "'windows'")
    assert not (tmp_path / "o").exists()


def test_training_with_deltas_from_uniform_is_refused_before_it_starts(
    uniform: Path, tmp_path: Path, fails: Fails
) -> None:
    words = ["tokenizer", "--patches", str(uniform), "--out", str(tmp_path / "t")]
    words += ["--deltas", str(tmp_path / "d"), "--steps", "1", "--batch-size", "4"]
    fails(train, words, 2, "deltatok-extract --patches")
    assert not (tmp_path / "t").exists()


def test_uniform_cache_without_draws_is_refused(
    uniform: Path, tiny_run: Path, tmp_path: Path
) -> None:
    config = TokenizeConfig(
        patches=str(uniform), tokenizer=str(tiny_run / "tokenizer"), out=str(tmp_path / "o")
    )
    with pytest.raises(UsageError, match="have to be drawn"):
        write_deltas(config)
