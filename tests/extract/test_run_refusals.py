"""run_extraction refuses what it cannot do right: it says why, and leaves alone what is there."""

from collections.abc import Callable
from pathlib import Path

import pytest

from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.run import run_extraction
from deltatok.shards import CacheMismatch, DeltatokError, UsageError


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"frame_size": 48}, r"preprocessing\.frame_size is 32, but 48"),
        ({"seed": 1}, r"sampling\.seed is 0, but 1"),
        ({"dtype": "bfloat16"}, r"storage\.dtype is 'float16', but 'bfloat16'"),
        ({"autocast": "bfloat16"}, r"autocast_dtype is 'float32', but 'bfloat16'"),
    ],
)
def test_out_with_another_cache_names_the_field(
    finished: Path, make_config: Callable[..., ExtractConfig], change: dict, field: str
) -> None:
    with pytest.raises(CacheMismatch, match=field):
        run_extraction(make_config(out=str(finished), **change))


def test_other_clips_than_planned_are_refused(
    finished: Path, make_config: Callable[..., ExtractConfig], clips: Path, backbone: Backbone
) -> None:
    config = make_config(out=str(finished), videos=(str(clips / "c0.mp4"),))
    with pytest.raises(CacheMismatch, match="in the plan of this cache but not asked for"):
        run_extraction(config, backbone=backbone)


def test_out_with_something_else_in_it_is_left_alone(
    make_config: Callable[..., ExtractConfig], backbone: Backbone
) -> None:
    config = make_config()
    Path(config.out).mkdir()
    (Path(config.out) / "thesis.tex").write_text("mine")
    with pytest.raises(CacheMismatch, match=r"thesis\.tex"):
        run_extraction(config, backbone=backbone)
    assert [path.name for path in Path(config.out).iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("out", ["file", "file/out"])
def test_out_that_cannot_be_written_is_a_usage_error(
    make_config: Callable[..., ExtractConfig], backbone: Backbone, tmp_path: Path, out: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        run_extraction(make_config(out=str(tmp_path / out)), backbone=backbone)


def test_frame_size_off_the_patch_grid_writes_nothing(
    make_config: Callable[..., ExtractConfig], backbone: Backbone
) -> None:
    config = make_config(frame_size=40)
    with pytest.raises(UsageError, match="use 32 or 48"):
        run_extraction(config, backbone=backbone)
    assert not Path(config.out).exists()


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_a_usage_error(
    make_config: Callable[..., ExtractConfig], device: str
) -> None:
    with pytest.raises(UsageError, match=f"device {device}"):
        run_extraction(make_config(device=device))


def test_features_beyond_float16_name_the_clip(
    make_config: Callable[..., ExtractConfig],
) -> None:
    config = make_config()
    large = Backbone.load(config.backbone)
    large.model.get_parameter("norm.weight").mul_(1e6)
    with pytest.raises(DeltatokError, match=r"clip 'c\d\.mp4'.*float16"):
        run_extraction(config, backbone=large)
    assert not list((Path(config.out) / "shards").iterdir())


@pytest.mark.parametrize("name", ["decord", "torchcodec"])
def test_decoder_that_is_not_installed_is_refused_before_anything_is_written(
    make_config: Callable[..., ExtractConfig], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    config = make_config(decoder=name)
    with pytest.raises(UsageError, match=f"got {name}, which is not installed"):
        run_extraction(config)
    assert not Path(config.out).exists()
