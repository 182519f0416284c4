"""Delta-token caches equal direct encoding, are written once, and belong to their tokenizer."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deltatok.shards import CacheMismatch, DeltaShards, PatchShards
from deltatok.shards.cache import finish_cache, reopen_cache
from deltatok.shards.files import sha256_file
from deltatok.shards.patches.writer import write_patch_shard
from deltatok.shards.plan import Plan, longer_plan
from deltatok.shards.records import Quarantined, done_shards, read_done
from deltatok.shards.tools.verify import verify_cache
from deltatok.shards.windows import ShardRows
from deltatok.train import encode as tokenize
from deltatok.train.config import TokenizeConfig
from deltatok.train.encode import write_deltas
from deltatok.train.models.configs import DeltaTokConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.tokenizer import train_tokenizer

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, patches: Path) -> Path:
    """A random tokenizer that says it was trained on `patches`."""
    folder = tmp_path_factory.mktemp("models") / "tokenizer"
    config = DeltaTokConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        layer_scale_init=0.5,
    )
    model = DeltaTok(config, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder, {"patches": PatchShards(patches).info.identity})
    return folder


def config_of(patches: Path, tokenizer: Path, out: Path, **changed: Any) -> TokenizeConfig:
    fields = {"batch_windows": 4, "device": "cpu", **changed}
    return TokenizeConfig(patches=str(patches), tokenizer=str(tokenizer), out=str(out), **fields)


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timings.jsonl"
    }


def test_cached_deltas_equal_direct_encoding(
    patches: Path, tokenizer: Path, tmp_path: Path
) -> None:
    info = write_deltas(config_of(patches, tokenizer, tmp_path / "deltas"))
    deltas, source = DeltaShards(tmp_path / "deltas"), PatchShards(patches)
    assert len(deltas) == len(source)
    windows = np.arange(len(source))
    x = torch.from_numpy(source.tokens(windows))
    model = DeltaTok.from_pretrained(tokenizer)
    with torch.no_grad():
        black = torch.tensor(source.black).expand(len(x), -1, -1)
        previous = [black, *x.unbind(1)[:-1]]
        pairs = zip(previous, x.unbind(1), strict=True)
        z = torch.stack([model.encode(a, b, grid=source.grid) for a, b in pairs], dim=1)
    assert torch.allclose(torch.from_numpy(deltas.tokens(windows)).float(), z, atol=2e-3)
    assert info.parent_fingerprint == source.fingerprint
    assert info.identity["patches"] == source.info.identity
    assert verify_cache(tmp_path / "deltas", deep=True).problems == []


def test_windows_keep_their_order_and_story(patches: Path, tokenizer: Path, tmp_path: Path) -> None:
    write_deltas(config_of(patches, tokenizer, tmp_path / "deltas"))
    deltas, source = DeltaShards(tmp_path / "deltas"), PatchShards(patches)
    windows = np.arange(len(source))
    assert [deltas.keys[clip] for clip in deltas.clip_index] == [
        source.keys[clip] for clip in source.clip_index
    ]
    times = source.timestamps_s(windows)
    assert np.array_equal(deltas.timestamps_s(windows), times - times[:, :1])
    assert deltas.window(7)["frames"] == source.frame_index([7])[0].tolist()


def test_second_run_writes_nothing(
    patches: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(patches, tokenizer, tmp_path / "deltas")
    write_deltas(config)
    before = bytes_of(tmp_path / "deltas")
    monkeypatch.setattr(tokenize, "write_delta_shard", None)
    write_deltas(config)
    assert bytes_of(tmp_path / "deltas") == before


def append_clip(folder: Path) -> None:
    """A new clip with two windows, in a shard of its own."""
    source = PatchShards(folder)
    windows = np.arange(2)
    rows = ShardRows(
        tokens=source.tokens(windows),
        timestamps_s=source.timestamps_s(windows),
        frame_index=source.frame_index(windows),
        crop=source.crop[windows],
        flipped=source.flipped[windows],
        clip=np.zeros(2, dtype=np.int32),
        keys=["new.mp4"],
    )
    plan = Plan.open(folder)
    reopen_cache(folder)
    clip = SimpleNamespace(key="new.mp4", origin="/videos/new.mp4", size_bytes=1)
    longer_plan(plan, {clip.key: clip}, clips_per_shard=1, seed=0).commit()
    write_patch_shard(folder, plan.num_shards, rows, dtype="float16", seed=0)
    finish_cache(folder)


def test_clips_appended_to_the_patches_join_the_deltas(
    patches: Path, tokenizer: Path, tmp_path: Path
) -> None:
    grown = Path(shutil.copytree(patches, tmp_path / "patches"))
    config = config_of(grown, tokenizer, tmp_path / "deltas")
    write_deltas(config)
    before, num_windows = bytes_of(tmp_path / "deltas"), len(DeltaShards(config.out))
    append_clip(grown)
    assert write_deltas(config).complete
    after, deltas = bytes_of(tmp_path / "deltas"), DeltaShards(config.out)
    old = {name: sha for name, sha in before.items() if name.startswith("shards/")}
    assert {name: after[name] for name in old} == old
    assert len(deltas) == num_windows + 2
    assert deltas.keys[-1] == "new.mp4"
    assert verify_cache(config.out).problems == []
    write_deltas(config_of(grown, tokenizer, tmp_path / "at-once"))
    assert bytes_of(tmp_path / "at-once") == after


def lose_clip(folder: Path) -> None:
    """The first shard as it was while its last clip was in quarantine."""
    source, record = PatchShards(folder), read_done(folder, 0)
    assert record is not None
    keys = source.keys[: record.clips]
    windows = np.flatnonzero(source.clip_index < len(keys) - 1)
    rows = ShardRows(
        tokens=source.tokens(windows),
        timestamps_s=source.timestamps_s(windows),
        frame_index=source.frame_index(windows),
        crop=source.crop[windows],
        flipped=source.flipped[windows],
        clip=source.clip_index[windows].astype(np.int32),
        keys=keys[:-1],
        quarantined=[Quarantined(clip=keys[-1], stage="decode", reason="hung", attempts=2)],
    )
    reopen_cache(folder)
    write_patch_shard(folder, 0, rows, dtype="float16", seed=0)
    finish_cache(folder)


def test_shard_whose_quarantined_clip_came_back_is_encoded_again(
    patches: Path, tokenizer: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(patches, tmp_path / "patches"))
    lose_clip(source)
    config = config_of(source, tokenizer, tmp_path / "deltas")
    write_deltas(config)
    num_windows = len(DeltaShards(config.out))
    shutil.rmtree(source)
    shutil.copytree(patches, source)
    write_deltas(config)
    assert len(DeltaShards(config.out)) > num_windows
    assert verify_cache(config.out, deep=True).problems == []
    write_deltas(config_of(source, tokenizer, tmp_path / "at-once"))
    assert bytes_of(tmp_path / "at-once") == bytes_of(tmp_path / "deltas")


def test_patches_of_other_clips_do_not_join_the_deltas(
    patches: Path, tokenizer: Path, tmp_path: Path
) -> None:
    grown = Path(shutil.copytree(patches, tmp_path / "patches"))
    append_clip(grown)
    write_deltas(config_of(grown, tokenizer, tmp_path / "deltas"))
    before = bytes_of(tmp_path / "deltas")
    with pytest.raises(CacheMismatch, match=r"new\.mp4"):
        write_deltas(config_of(patches, tokenizer, tmp_path / "deltas"))
    assert bytes_of(tmp_path / "deltas") == before


def test_interrupted_run_ends_byte_identical(
    patches: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_deltas(config_of(patches, tokenizer, tmp_path / "whole"))
    config = config_of(patches, tokenizer, tmp_path / "cut")
    write = tokenize.write_delta_shard

    def interrupted(folder: Path, shard: int, *arguments: Any, **named: Any) -> Any:
        if shard == 1:
            raise KeyboardInterrupt
        return write(folder, shard, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "write_delta_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_deltas(config)
    assert read_done(config.out, 0) is not None
    with pytest.raises(CacheMismatch, match="has not finished"):
        DeltaShards(config.out)
    write_deltas(config)
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


def test_longer_plan_that_begins_otherwise_leaves_the_deltas_finished(
    patches: Path, tokenizer: Path, tmp_path: Path, edit_plan: Any
) -> None:
    write_deltas(config_of(patches, tokenizer, tmp_path / "deltas"))
    before = bytes_of(tmp_path / "deltas")
    other = Path(shutil.copytree(patches, tmp_path / "patches"))
    edit_plan(other, lambda lines: lines[0]["clips"][0].update(key="other.mp4"))
    clip = SimpleNamespace(key="new.mp4", origin="/videos/new.mp4", size_bytes=1)
    longer_plan(Plan.open(other), {clip.key: clip}, clips_per_shard=1, seed=0).commit()
    with pytest.raises(CacheMismatch, match=r"mp4"):
        write_deltas(config_of(other, tokenizer, tmp_path / "deltas"))
    assert bytes_of(tmp_path / "deltas") == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("weights_sha256", "f" * 64), ("patch_size", 14), ("image_mean", [0.4, 0.5, 0.5])],
)
def test_tokenizer_of_another_backbone_is_refused(
    patches: Path, tokenizer: Path, tmp_path: Path, name: str, value: Any
) -> None:
    provenance = json.loads((tokenizer / "provenance.json").read_text())
    part = "backbone" if name == "weights_sha256" else "preprocessing"
    provenance["patches"][part][name] = value
    other = tmp_path / "other"
    DeltaTok.from_pretrained(tokenizer).save_pretrained(other, provenance)
    with pytest.raises(CacheMismatch, match=rf"{part}\.{name}"):
        write_deltas(config_of(patches, other, tmp_path / "deltas"))


def test_tokenizer_of_another_frame_size_is_taken(
    make_patches: Make, tokenizer: Path, tmp_path: Path
) -> None:
    larger = make_patches(tmp_path / "larger", grid=(3, 3), num_clips=2)
    write_deltas(config_of(larger, tokenizer, tmp_path / "deltas"))
    assert DeltaShards(tmp_path / "deltas").shape == (4, 16)


def test_tokenizer_of_another_size_is_refused(
    make_patches: Make, tokenizer: Path, tmp_path: Path
) -> None:
    wider = make_patches(tmp_path / "wider", hidden_size=24, num_clips=2)
    with pytest.raises(CacheMismatch, match="hidden_size is 16, the patch tokens have 24"):
        write_deltas(config_of(wider, tokenizer, tmp_path / "deltas"))


def test_deltas_of_another_tokenizer_are_not_added_to(
    patches: Path, tokenizer: Path, tmp_path: Path
) -> None:
    write_deltas(config_of(patches, tokenizer, tmp_path / "deltas"))
    model = DeltaTok(
        DeltaTok.from_pretrained(tokenizer).config, generator=torch.Generator().manual_seed(1)
    )
    model.save_pretrained(
        tmp_path / "other", json.loads((tokenizer / "provenance.json").read_text())
    )
    with pytest.raises(CacheMismatch, match=r"tokenizer\.weights_sha256"):
        write_deltas(config_of(patches, tmp_path / "other", tmp_path / "deltas"))


def test_tokenizer_without_a_story_is_taken_with_a_warning(
    patches: Path, tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DeltaTok.from_pretrained(tokenizer).save_pretrained(tmp_path / "imported", {})
    write_deltas(config_of(patches, tmp_path / "imported", tmp_path / "deltas"))
    assert "does not say what it was trained on" in caplog.text


def test_batch_size_changes_a_token_by_rounding_at_most(
    patches: Path, tokenizer: Path, tmp_path: Path
) -> None:
    for size in (1, 7):
        config = config_of(patches, tokenizer, tmp_path / str(size), batch_windows=size)
        write_deltas(config)
    one, seven = (DeltaShards(tmp_path / str(size)).load()[0] for size in (1, 7))
    assert np.abs(one.astype(np.float32) - seven.astype(np.float32)).max() < 4e-3


def test_training_writes_the_deltas_when_asked(tokenizer_config: Make, tmp_path: Path) -> None:
    config = tokenizer_config(steps=1, deltas=str(tmp_path / "deltas"))
    train_tokenizer(config)
    assert DeltaShards(tmp_path / "deltas").info.complete
    train_tokenizer(dataclasses.replace(config, deltas=str(tmp_path / "again")))
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "deltas")


@pytest.mark.parametrize("by", ["shard_of", "srun"])
def test_runs_that_divide_the_shards_make_the_cache(
    patches: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    write_deltas(config_of(patches, tokenizer, tmp_path / "whole"))
    out = tmp_path / "divided"
    made = []
    for part in (1, 0):
        shard_of = f"{part}/2" if by == "shard_of" else None
        if by == "srun":
            monkeypatch.setenv("SLURM_PROCID", str(part))
            monkeypatch.setenv("SLURM_NTASKS", "2")
        info = write_deltas(config_of(patches, tokenizer, out, shard_of=shard_of))
        assert info.complete == (part == 0)
        made.append(sorted(done_shards(out)))
    assert made[0] == [shard for shard in made[1] if shard % 2]
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
