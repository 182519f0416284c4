"""float16, bfloat16, int8 and zstd: what is stored is what the backbone gave, and stays so."""

import json
import shutil
import signal
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltatok.extract import int8_calibration as calibration
from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.int8_calibration import fit_channel_scale
from deltatok.extract.run import run_extraction
from deltatok.extract.shard_writer import (
    PatchShardWriter,
    split_int8,
    to_bfloat16_bits,
    to_float16,
    to_int8,
)
from deltatok.extract.sources.find import find_clips
from deltatok.shards import (
    CacheMismatch,
    DamagedShard,
    DeltatokError,
    PatchShards,
    TooManyQuarantined,
)
from deltatok.shards.patches.int8 import (
    agree_on_channel_scale,
    channel_scale_of,
    quantise,
    scale_sha256,
)
from deltatok.shards.patches.layout import to_bfloat16_bits as bits_on_the_host
from deltatok.shards.tools.verify import verify_cache

PROGRAM = Path(__file__).with_name("interrupted_run.py")

ConfigMaker = Callable[..., ExtractConfig]
Digests = Callable[[Path], dict[str, str]]


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """float32 (2, 3, 4, 16), with outlier channels and tokens, and values that do not fit."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 3, 4, 16)) * 10.0 ** rng.uniform(-3, 3, 16)
    values *= 10.0 ** rng.uniform(-8, 2, (2, 3, 4, 1))
    values[0, 0, 0, 0], values[0, 0, 1, 3], values[0, 0, 2, 5] = np.nan, np.inf, -np.inf
    values[1, 1, 1, 1], values[1, 2, 3, 4], values[1, 0] = 1e30, -7e4, 0.0
    return values.astype(np.float32)


@pytest.fixture
def int8_cache(finished_int8: Path, tmp_path: Path) -> Path:
    """A copy that a test may change, where `make_config` writes."""
    return Path(shutil.copytree(finished_int8, tmp_path / "out"))


def test_codes_made_on_the_device_are_those_of_the_format(tokens: np.ndarray) -> None:
    scale = channel_scale_of(
        np.square(np.nan_to_num(tokens[1, 2], posinf=1, neginf=1)).mean(axis=0)
    )
    codes, token_scale = split_int8(
        to_int8(torch.from_numpy(tokens), torch.from_numpy(scale)).numpy()
    )
    wanted_codes, wanted_scale = quantise(tokens, scale)
    np.testing.assert_array_equal(codes, wanted_codes)
    np.testing.assert_array_equal(token_scale, wanted_scale)
    assert np.count_nonzero(codes == -128) == 4


def test_bfloat16_bits_made_on_the_device_are_those_of_the_format(tokens: np.ndarray) -> None:
    bits = to_bfloat16_bits(torch.from_numpy(tokens)).numpy().view(np.uint16)
    finite = np.isfinite(tokens)
    np.testing.assert_array_equal(bits[finite], bits_on_the_host(tokens)[finite])


def test_float16_made_on_the_device_tells_overflow_from_infinity(tokens: np.ndarray) -> None:
    values = to_float16(torch.from_numpy(tokens)).numpy()
    assert np.count_nonzero(np.isnan(values)) == 3
    assert np.count_nonzero(np.isinf(values)) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_cache_holds_the_features_within_the_error_of_its_dtype(
    make_config: ConfigMaker, backbone: Backbone, finished: Path, dtype: str
) -> None:
    config = make_config(dtype=dtype)
    run_extraction(config, backbone=backbone)
    assert verify_cache(config.out, deep=True).problems == []
    reader, reference = PatchShards(config.out), PatchShards(finished)
    np.testing.assert_array_equal(reader.frame_index([3, 4]), reference.frame_index([3, 4]))
    windows = np.arange(len(reference))
    wanted = reference.tokens(windows)
    error = np.linalg.norm(reader.tokens(windows) - wanted) / np.linalg.norm(wanted)
    assert 0 < error < {"bfloat16": 0.003, "int8": 0.015}[dtype]


def test_int8_takes_half_the_bytes_of_float16(int8_cache: Path, finished: Path) -> None:
    sizes = []
    for folder in (int8_cache, finished):
        with zipfile.ZipFile(folder / "shards/000000.zarr.zip") as archive:
            sizes.append(archive.getinfo("tokens/c/0/0/0/0").file_size)
    assert sizes[0] < 0.6 * sizes[1]


def test_identity_names_the_scales_and_every_shard_has_them(int8_cache: Path) -> None:
    scale = np.load(int8_cache / "channel_scale.npy")
    storage = PatchShards(int8_cache).info.identity["storage"]
    assert storage == {"dtype": "int8", "scale_sha256": scale_sha256(scale)}
    for shard in range(3):
        with zipfile.ZipFile(int8_cache / f"shards/00000{shard}.zarr.zip") as archive:
            assert archive.read("channel_scale/c/0")[:-4] == scale.tobytes()


def test_scales_do_not_depend_on_the_order_of_clips_or_the_number_of_workers(
    make_config: ConfigMaker, backbone: Backbone, int8_cache: Path
) -> None:
    config = make_config(dtype="int8", workers=2, num_windows=1)
    policy = config.sampling_policy()
    clips = find_clips(config.videos)[::-1]
    scale = fit_channel_scale(config, policy, backbone, clips)
    np.testing.assert_array_equal(scale, np.load(int8_cache / "channel_scale.npy"))


@pytest.mark.parametrize("moment", ["scales", "agreed", "record"])
def test_killed_int8_run_goes_on_to_the_same_bytes(
    make_config: ConfigMaker,
    backbone: Backbone,
    int8_cache: Path,
    digests: Digests,
    run_program: Callable[..., Any],
    tmp_path: Path,
    moment: str,
) -> None:
    config = make_config(dtype="int8", out=str(tmp_path / "killed"))
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    process = run_program(PROGRAM, tmp_path / "config.json", moment)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (Path(config.out) / "channel_scale.npy").exists() == (moment != "scales")
    run_extraction(config, backbone=backbone)
    assert digests(Path(config.out)) == digests(int8_cache)


@pytest.fixture
def no_fitting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("fits scales")

    monkeypatch.setattr(calibration, "fit_channel_scale", fail)


@pytest.mark.usefixtures("no_fitting")
def test_another_dtype_in_the_folder_is_refused_before_scales_are_fitted(
    make_config: ConfigMaker, backbone: Backbone, finished: Path
) -> None:
    with pytest.raises(CacheMismatch, match=r"storage\.dtype is 'float16', but 'int8'"):
        run_extraction(make_config(dtype="int8", out=str(finished)), backbone=backbone)


@pytest.mark.usefixtures("no_fitting")
def test_a_folder_that_is_no_cache_is_refused_before_scales_are_fitted(
    make_config: ConfigMaker, backbone: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheMismatch, match=r"holds 'notes\.txt'"):
        run_extraction(make_config(dtype="int8", out=str(tmp_path)), backbone=backbone)


def test_a_resumed_run_takes_the_scales_that_are_there(
    make_config: ConfigMaker,
    backbone: Backbone,
    int8_cache: Path,
    digests: Digests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = digests(int8_cache)
    (int8_cache / "shards/000001.json").unlink()
    monkeypatch.setattr(calibration, "fit_channel_scale", None)
    run_extraction(make_config(dtype="int8"), backbone=backbone)
    assert digests(int8_cache) == before


def test_scales_that_another_rank_fitted_meanwhile_are_the_ones(
    make_config: ConfigMaker, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(dtype="int8")
    fit = calibration.fit_channel_scale
    theirs: list[np.ndarray] = []

    def overtaken(*arguments: Any) -> Any:
        mine = fit(*arguments)
        theirs.append(agree_on_channel_scale(config.out, np.nextafter(mine, np.float32(np.inf))))
        return mine

    Path(config.out).mkdir()
    monkeypatch.setattr(calibration, "fit_channel_scale", overtaken)
    run_extraction(config, backbone=backbone)
    stored = np.load(Path(config.out) / "channel_scale.npy")
    np.testing.assert_array_equal(stored, theirs[0])
    named = PatchShards(config.out).info.identity["storage"]["scale_sha256"]
    assert named == scale_sha256(theirs[0])


def test_scales_of_a_run_killed_before_its_cache_json_are_taken(
    make_config: ConfigMaker, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(dtype="int8")
    Path(config.out).mkdir()
    scale = np.full(backbone.hidden_size, 0.5, dtype=np.float32)
    agree_on_channel_scale(config.out, scale)
    monkeypatch.setattr(calibration, "fit_channel_scale", None)
    run_extraction(config, backbone=backbone)
    np.testing.assert_array_equal(np.load(Path(config.out) / "channel_scale.npy"), scale)


def test_changed_scales_stop_a_resumed_run(
    make_config: ConfigMaker, backbone: Backbone, int8_cache: Path
) -> None:
    path = int8_cache / "channel_scale.npy"
    np.save(path, np.load(path) * 2)
    with pytest.raises(DamagedShard, match="channel scales"):
        run_extraction(make_config(dtype="int8"), backbone=backbone)


def test_int8_without_a_clip_that_can_be_decoded_ends_with_3(
    make_config: ConfigMaker, backbone: Backbone, clips: Path
) -> None:
    config = make_config(dtype="int8", videos=(str(clips / "broken.mp4"),), max_quarantined=1.0)
    with pytest.raises(TooManyQuarantined, match=r"none of the 1 clips.*'broken\.mp4'"):
        run_extraction(config, backbone=backbone)
    assert not Path(config.out).exists()


def test_compression_gives_the_same_numbers_and_fingerprint(
    make_config: ConfigMaker, backbone: Backbone, finished: Path
) -> None:
    config = make_config(compression="zstd")
    run_extraction(config, backbone=backbone)
    reader, reference = PatchShards(config.out), PatchShards(finished)
    assert reader.fingerprint == reference.fingerprint
    np.testing.assert_array_equal(reader.load(), reference.load())


class _WildWriter(PatchShardWriter):
    """As if the backbone gave values that float16 cannot hold, and a NaN."""

    def convert(self, tokens: torch.Tensor) -> torch.Tensor:
        wild = tokens.clone()
        wild[0, 0, 0, :2], wild[0, 0, 1, 0] = 1e6, torch.nan
        return super().convert(wild)


def test_values_that_cannot_be_stored_stop_the_run(
    make_config: ConfigMaker, backbone: Backbone
) -> None:
    config = make_config()
    # Six windows in batches of two: three of them have the values.
    words = r"clip 'c\d\.mp4': .*not finite or beyond the range of float16"
    with pytest.raises(DeltatokError, match=words):
        run_extraction(config, backbone=backbone, writer=_WildWriter(seed=config.seed))
