"""Caches that cannot be trained on, or only in part: NaN in a shard, empty splits, one clip."""

import json
import math
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from deltatok.shards import DamagedShard, DeltaShards, DeltatokError, PatchShards, UsageError
from deltatok.shards.cache import finish_cache
from deltatok.shards.files import sha256_file
from deltatok.shards.records import done_bytes
from deltatok.train.config import DINOWorldTrainConfig, HeadTrainConfig
from deltatok.train.data.order import split_windows
from deltatok.train.dinoworld import train_dinoworld
from deltatok.train.heads.train import train_head
from deltatok.train.models.configs import DINOWorldConfig
from deltatok.train.tokenizer import train_tokenizer
from deltatok.train.world import train_world

Make = Callable[..., Any]
WINDOW = 17
NAN = np.float16(math.nan).tobytes()


def plant_in_deltas(folder: Path, window: int = WINDOW) -> None:
    """A NaN in the middle of a window's tokens, in place; the done-record is left as it is."""
    tar = folder / "shards/000000.tar"
    with tarfile.open(tar) as members:
        member = next(m for m in members if m.name.endswith(".tokens.npy"))
    frames, size = DeltaShards(folder).shape
    data = bytearray(tar.read_bytes())
    end = member.offset_data + member.size
    start = end - DeltaShards(folder).num_windows * frames * size * 2
    at = start + (window * frames + 1) * size * 2 + 4
    data[at : at + 2] = NAN
    tar.write_bytes(data)


def plant_in_patches(folder: Path, window: int = WINDOW) -> str:
    """A NaN in one frame of a window, its chunk's checksum made to fit; its clip."""
    shards = PatchShards(folder)
    frame = shards.stored_tokens([window])[0, 1].tobytes()
    for file in (folder / "shards").rglob("*"):
        if file.is_file() and (at := file.read_bytes().find(frame)) >= 0:
            data = bytearray(file.read_bytes())
            data[at : at + 2] = NAN
            chunk = bytes(data[at : at + len(frame)])
            data[at + len(frame) : at + len(frame) + 4] = google_crc32c.value(chunk).to_bytes(
                4, "little"
            )
            file.write_bytes(data)
            return shards.keys[shards.clip_index[window]]
    raise AssertionError("no shard holds that frame")


def make_records_fit(folder: Path) -> None:
    """As if the bytes had been written so: every done-record names its file's true checksum."""
    for record in (folder / "shards").glob("*.json"):
        told = json.loads(record.read_text())
        (data,) = (path for path in record.parent.glob(f"{record.stem}.*") if path != record)
        told["file"]["sha256"] = sha256_file(data)
        record.write_bytes(done_bytes(told))
    finish_cache(folder)


def test_nan_in_a_delta_shard_stops_before_the_first_step(
    world_config: Make, make_deltas: Make, tmp_path: Path
) -> None:
    folder = make_deltas(tmp_path / "deltas")
    plant_in_deltas(folder)
    make_records_fit(folder)
    shards = DeltaShards(folder)
    assert np.isnan(shards.tokens([WINDOW])).sum() == 1
    clip = re.escape(shards.keys[shards.clip_index[WINDOW]])
    config = world_config(deltas=str(folder), batch_size=40, validation_fraction=0)
    with pytest.raises(
        DeltatokError,
        match=rf"step 1: loss nan.* not changed. In the batch of rank 0 \(its own loss is not "
        rf"finite\): window {WINDOW} of clip '{clip}'\. Check",
    ):
        train_world(config)
    assert not list((Path(config.out) / "checkpoints").iterdir())


def test_changed_byte_of_a_delta_shard_is_found_before_training(
    world_config: Make, make_deltas: Make, tmp_path: Path
) -> None:
    folder = make_deltas(tmp_path / "deltas")
    plant_in_deltas(folder)
    with pytest.raises(DamagedShard, match=r"000000.tar"):
        train_world(world_config(deltas=str(folder)))


def test_nan_in_a_patch_shard_stops_before_the_step(
    tokenizer_config: Make, make_patches: Make, tmp_path: Path
) -> None:
    folder = make_patches(tmp_path / "patches")
    clip = re.escape(plant_in_patches(folder))
    make_records_fit(folder)
    config = tokenizer_config(
        patches=str(folder), batch_size=60, validation_fraction=0, residency="map"
    )
    with pytest.raises(DeltatokError, match=rf"step 1: loss nan.*window {WINDOW} of clip '{clip}'"):
        train_tokenizer(config)


def dino_config(folder: Path, out: Path, **changed: Any) -> DINOWorldTrainConfig:
    model = DINOWorldConfig(
        hidden_size=16,
        predictor_hidden_size=16,
        predictor_num_hidden_layers=1,
        predictor_num_heads=1,
        rope_axis_sizes=(4, 4, 4),
    )
    fields: dict[str, Any] = {"steps": 2, "batch_size": 1, "save_every": 1, "device": "cpu"}
    return DINOWorldTrainConfig(patches=str(folder), out=str(out), model=model, **fields | changed)


def test_cache_without_windows_is_refused(
    tokenizer_config: Make, make_patches: Make, tmp_path: Path
) -> None:
    folder = make_patches(tmp_path / "empty", windows_per_clip=0)
    with pytest.raises(UsageError, match=r"0 training windows .* one batch takes 3"):
        train_tokenizer(tokenizer_config(patches=str(folder)))
    with pytest.raises(UsageError, match=r"0 training windows .* one batch takes 1"):
        train_dinoworld(dino_config(folder, tmp_path / "dino"))


def test_world_cache_without_windows_is_refused(
    world_config: Make, make_deltas: Make, tmp_path: Path
) -> None:
    folder = make_deltas(tmp_path / "empty", num_clips=0)
    with pytest.raises(UsageError, match=r"0 training windows .* one batch takes 8"):
        train_world(world_config(deltas=str(folder)))


def test_one_clip_trains_without_validation_and_says_so(
    tokenizer_config: Make,
    world_config: Make,
    make_patches: Make,
    make_deltas: Make,
    tmp_path: Path,
    log_lines: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    patches = make_patches(tmp_path / "patches", num_clips=1, num_shards=1)
    deltas = make_deltas(tmp_path / "deltas", num_clips=1)
    outs = [
        train_tokenizer(
            tokenizer_config(patches=str(patches), batch_size=3, out=str(tmp_path / "t"))
        ),
        train_world(world_config(deltas=str(deltas), batch_size=1, out=str(tmp_path / "w"))),
        train_dinoworld(dino_config(patches, tmp_path / "d", log_every=1)),
    ]
    assert caplog.text.count("no validation windows") == 3
    for out in outs:
        assert log_lines(out, ["train"])
        assert log_lines(out, ["validation"]) == []
        assert not (out / "best.json").exists()


def head_config(folder: Path, out: Path, **changed: Any) -> HeadTrainConfig:
    """Of whole frames, in which every pixel has class 0."""
    for key in PatchShards(folder).keys:
        np.save(out.parent / f"{key}.npy", np.zeros((8, 32, 48), np.uint8))
    fields: dict[str, Any] = {"labels": str(out.parent), "num_classes": 2, "batch_size": 4}
    fields |= {"steps": 2, "eval_every": 1, "validation_fraction": 0.2, "device": "cpu"}
    return HeadTrainConfig(patches=str(folder), out=str(out), **fields | changed)


def test_head_cache_without_windows_is_refused(make_patches: Make, tmp_path: Path) -> None:
    folder = make_patches(tmp_path / "empty", windows_per_clip=0, policy="uniform")
    with pytest.raises(UsageError, match=r"0 training windows .* one batch takes 4"):
        train_head(head_config(folder, tmp_path / "run"))


def test_nan_in_a_validation_window_of_deltas_is_named_before_training(
    world_config: Make, make_deltas: Make, tmp_path: Path
) -> None:
    """Else no evaluation would say anything, and no checkpoint would ever be the best."""
    folder = make_deltas(tmp_path / "deltas")
    shards = DeltaShards(folder)
    window = int(split_windows(shards.keys, shards.clip_index, 0.2).validation[1])
    plant_in_deltas(folder, window)
    make_records_fit(folder)
    clip = re.escape(shards.keys[shards.clip_index[window]])
    config = world_config(deltas=str(folder))
    with pytest.raises(DamagedShard, match=rf"validation: window {window} of clip '{clip}': holds"):
        train_world(config)
    assert not (Path(config.out) / "checkpoints").exists()


def test_nan_in_a_validation_window_of_patches_is_named(
    tokenizer_config: Make, make_patches: Make, tmp_path: Path
) -> None:
    folder = make_patches(tmp_path / "patches", policy="uniform", windows_per_clip=1)
    shards = PatchShards(folder)
    window = int(split_windows(shards.keys, shards.clip_index, 0.2).validation[0])
    clip = re.escape(plant_in_patches(folder, window))
    make_records_fit(folder)
    words = rf"validation: window {window} of clip '{clip}': holds"
    with pytest.raises(DamagedShard, match=words):
        train_tokenizer(tokenizer_config(patches=str(folder)))
    with pytest.raises(DamagedShard, match=words):
        train_dinoworld(dino_config(folder, tmp_path / "dino", validation_fraction=0.2))
    with pytest.raises(DamagedShard, match=words):
        train_head(head_config(folder, tmp_path / "head"))
