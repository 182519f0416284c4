"""No room, no time, no right to write: the run stops cleanly, says so, and can go on."""

import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import Tensor

from deltatok.extract.backbone import Backbone, load_frozen_model
from deltatok.extract.config import ExtractConfig
from deltatok.extract.run import run_extraction
from deltatok.extract.shard_writer import PatchShardWriter
from deltatok.shards import DeltatokError, Stopped, UsageError, plan
from deltatok.shards import records as publishing
from deltatok.shards.records import done_shards
from deltatok.shards.running.interrupts import StopRequest

ConfigMaker = Callable[..., ExtractConfig]
Digests = Callable[[Path], dict[str, str]]


@pytest.fixture
def goes_on(
    make_config: ConfigMaker, backbone: Backbone, finished: Path, digests: Digests
) -> Callable[[], None]:
    """Checks that nothing half-made is left, goes on without limits, and compares the result."""

    def check() -> None:
        out = Path(make_config().out)
        assert not list(out.rglob("*.partial-*"))
        run_extraction(make_config(), backbone=backbone)
        assert digests(out) == digests(finished)

    return check


def test_less_room_than_min_free_stops_with_1(
    make_config: ConfigMaker, backbone: Backbone, goes_on: Callable[[], None]
) -> None:
    config = make_config(min_free="1000000TB")
    with pytest.raises(DeltatokError, match=r"min_free keeps .* make room and run again") as caught:
        run_extraction(config, backbone=backbone)
    assert caught.value.exit_code == 1
    assert done_shards(config.out) == []
    goes_on()


def test_disk_that_is_full_in_the_middle_of_a_file(
    make_config: ConfigMaker, backbone: Backbone, goes_on: Callable[[], None]
) -> None:
    """A limit on the size of a file ends a write half-way, as a full disk does."""
    config = make_config()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # the tokens of a shard are 12 kB
    try:
        with pytest.raises(DeltatokError, match=r"cannot be written \(File too large\)"):
            run_extraction(config, backbone=backbone)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done_shards(config.out) == []
    goes_on()


class _SlowWriter(PatchShardWriter):
    """Needs a quarter of a second for every batch."""

    def convert(self, tokens: Tensor) -> Tensor:
        end_s = time.monotonic() + 0.25
        while time.monotonic() < end_s:
            pass
        return super().convert(tokens)


def test_time_limit_stops_with_75(
    make_config: ConfigMaker, backbone: Backbone, goes_on: Callable[[], None]
) -> None:
    with pytest.raises(Stopped, match=r"time limit of 0\.6 s.*run again") as caught:
        run_extraction(make_config(time_limit="0.6s"), backbone=backbone, writer=_SlowWriter())
    assert caught.value.exit_code == 75
    goes_on()


def test_time_limit_ends_what_only_waits() -> None:
    with StopRequest(time_limit_s=0.01) as stop, pytest.raises(Stopped), stop.at_once():
        os.read(os.pipe()[0], 1)


def test_a_stop_while_the_backbone_loads_is_no_broken_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is caught around the loading, as bad weights, must let a stop through."""

    def load(*_: object, **__: object) -> None:
        os.read(os.pipe()[0], 1)

    (tmp_path / "config.json").write_text('{"model_type": "dinov3_vit"}')
    monkeypatch.setattr(transformers.DINOv3ViTModel, "from_pretrained", load)
    with StopRequest(time_limit_s=0.01) as stop, pytest.raises(Stopped), stop.at_once():
        load_frozen_model(tmp_path)


def test_time_limit_that_is_not_reached_leaves_no_alarm() -> None:
    with StopRequest(time_limit_s=1000):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize(
    "change",
    [{"min_free": "much"}, {"time_limit": "soon"}, {"time_limit": "0s"}],
)
def test_limits_that_are_none_are_refused(make_config: ConfigMaker, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(change))}: got"):
        make_config(**change)


def _refuse(*_: object, **__: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_folder_that_became_read_only(
    make_config: ConfigMaker,
    backbone: Backbone,
    goes_on: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(plan, "create_bytes", _refuse)
        with pytest.raises(DeltatokError, match=r"Read-only file system.*run again"):
            run_extraction(make_config(), backbone=backbone)
    goes_on()


def test_read_only_shard(
    make_config: ConfigMaker,
    backbone: Backbone,
    goes_on: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A leftover that may not be replaced. (Permissions do not bind the administrator, who may be
    running this.)"""
    config = replace(make_config(), max_quarantined=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "publish", _refuse)
        with pytest.raises(DeltatokError, match=r"Read-only file system.*what is finished stays"):
            run_extraction(config, backbone=backbone)
    goes_on()
