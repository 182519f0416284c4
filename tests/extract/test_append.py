"""New clips join a finished cache as new shards; nothing old is touched."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.run import run_extraction
from deltatok.shards import CacheMismatch, PatchShards, read_cache_info
from deltatok.shards.plan import Plan
from deltatok.shards.tools.verify import verify_cache

ConfigMaker = Callable[..., ExtractConfig]
Digests = Callable[[Path], dict[str, str]]


@pytest.fixture(scope="session")
def more(tmp_path_factory: pytest.TempPathFactory, write_clip: Callable[..., np.ndarray]) -> Path:
    """Three more clips, in a folder of their own."""
    folder = tmp_path_factory.mktemp("more")
    for seed in range(3):
        write_clip(folder / f"n{seed}.mp4", seed=10 + seed)
    return folder


@pytest.fixture
def old(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished cache where `make_config()` writes to."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def appending(make_config: ConfigMaker, more: Path) -> ExtractConfig:
    """Adds `more`, without the old videos."""
    return make_config(videos=(str(more),), append=True)


def _times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_new_clips_become_new_shards_and_old_ones_are_not_touched(
    old: Path, appending: ExtractConfig, backbone: Backbone
) -> None:
    shards, parts = _times(old / "shards"), _times(old / "plan")
    info, tokens = read_cache_info(old), PatchShards(old).load()
    assert run_extraction(appending, backbone=backbone).shards_done_now == 2
    assert shards.items() <= _times(old / "shards").items()
    assert parts.items() < _times(old / "plan").items()
    assert [entry.shard for entry in list(Plan.open(old))[6:]] == [3, 3, 4]
    new = read_cache_info(old)
    assert (new.fingerprint, new.complete) == (info.fingerprint, True)
    assert new.counts == {"clips": 9, "quarantined": 1, "windows": 24, "frames": 96, "shards": 5}
    assert verify_cache(old, deep=True).problems == []
    # Windows keep their numbers.
    assert np.array_equal(PatchShards(old).load()[: len(tokens)], tokens)


def test_appended_shards_are_those_of_a_cache_of_these_clips_alone(
    old: Path, appending: ExtractConfig, make_config: ConfigMaker, backbone: Backbone, more: Path
) -> None:
    run_extraction(appending, backbone=backbone)
    alone = make_config(videos=(str(more),), out=str(old.parent / "alone"))
    run_extraction(alone, backbone=backbone)
    appended, other = PatchShards(old), PatchShards(alone.out)
    assert {appended.keys[clip] for clip in appended.clip_index[15:]} == set(other.keys)
    assert np.array_equal(
        np.sort(appended.tokens(range(15, 24)), axis=0), np.sort(other.tokens(range(9)), axis=0)
    )


def test_appending_again_does_nothing(
    old: Path, appending: ExtractConfig, backbone: Backbone
) -> None:
    run_extraction(appending, backbone=backbone)
    before = _times(old)
    assert run_extraction(appending, backbone=backbone).shards_done_now == 0
    assert _times(old) == before


def test_without_append_other_clips_are_refused(
    old: Path, make_config: ConfigMaker, backbone: Backbone, more: Path, clips: Path
) -> None:
    config = make_config(videos=(str(clips), str(more)))
    with pytest.raises(CacheMismatch, match="asked for but not in the plan"):
        run_extraction(config, backbone=backbone)


def test_append_into_an_empty_folder_makes_the_cache(
    make_config: ConfigMaker, backbone: Backbone, finished: Path, digests: Digests
) -> None:
    config = make_config(append=True)
    run_extraction(config, backbone=backbone)
    assert digests(Path(config.out)) == digests(finished)


def test_run_that_ended_before_the_plan_grew_is_finished_as_it_was(
    old: Path,
    appending: ExtractConfig,
    make_config: ConfigMaker,
    backbone: Backbone,
    finished: Path,
    digests: Digests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Plan, "commit", end)
        run_extraction(appending, backbone=backbone)
    with pytest.raises(CacheMismatch, match="has not finished"):
        PatchShards(old)
    run_extraction(make_config(), backbone=backbone)
    assert digests(old) == digests(finished)


def test_clip_of_an_unfinished_shard_that_is_not_given_is_named(
    old: Path, appending: ExtractConfig, backbone: Backbone
) -> None:
    (old / "shards" / "000001.json").unlink()
    with pytest.raises(CacheMismatch, match=r"clip '.*' is in a shard that is not done, but not"):
        run_extraction(appending, backbone=backbone)


def test_clip_that_changed_its_size_is_refused(
    old: Path, make_config: ConfigMaker, backbone: Backbone, more: Path, tmp_path: Path
) -> None:
    shutil.copytree(more, tmp_path / "other")
    (tmp_path / "other" / "c0.mp4").write_bytes(b"another clip of this name")
    config = make_config(videos=(str(tmp_path / "other"),), append=True)
    before = _times(old)
    with pytest.raises(CacheMismatch, match=r"clip 'c0\.mp4' had .* bytes"):
        run_extraction(config, backbone=backbone)
    assert _times(old).keys() == before.keys()


def test_old_clip_under_another_name_is_refused(
    old: Path, make_config: ConfigMaker, backbone: Backbone, clips: Path, more: Path
) -> None:
    """Two folders instead of one, and all names get the folder's in front."""
    config = make_config(videos=(str(clips), str(more)), append=True)
    with pytest.raises(CacheMismatch, match=r"is in this cache as .* give the new videos alone"):
        run_extraction(config, backbone=backbone)
