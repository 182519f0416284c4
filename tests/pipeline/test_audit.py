"""An audit makes stored windows again from the videos, and names those that are not the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.pipeline.audit import audit_cache
from deltatok.pipeline.commands.extract import main as extract
from deltatok.pipeline.commands.shards import VerifyConfig
from deltatok.pipeline.commands.shards import main as shards
from deltatok.shards import CacheMismatch, PatchShards, UsageError
from deltatok.shards.patches.writer import write_patch_shard
from deltatok.shards.plan import window_order
from deltatok.shards.windows import ShardRows

Fails = Callable[..., None]


def settings(root: Path, out: Path, *more: str) -> list[str]:
    backbone = ["--backbone", str(root / "backbone"), "--frame-size", "32", "--workers", "1"]
    return ["--out", str(out), *backbone, "--windows", "3", "--num-frames", "4", *more]


@pytest.fixture(scope="module")
def extracted(tiny_inputs: Path) -> Path:
    """A patch cache of three clips, float16."""
    out = tiny_inputs / "audited"
    assert extract(["--videos", str(tiny_inputs / "world/train"), *settings(tiny_inputs, out)]) == 0
    return out


def config(root: Path, cache: Path, **changes: Any) -> VerifyConfig:
    values: dict[str, Any] = {"audit": 2, "videos": (str(root / "world/train"),)}
    values["backbone"] = str(root / "backbone")
    return VerifyConfig(dir=str(cache), **{**values, **changes})


def test_an_audit_of_what_was_extracted_finds_no_difference(
    tiny_inputs: Path, extracted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["verify", str(extracted), "--deep", "--audit", "2", "--json", str(tmp_path / "f.json")]
    words += ["--videos", str(tiny_inputs / "world/train")]
    words += ["--backbone", str(tiny_inputs / "backbone")]
    assert shards(words) == 0
    assert "6 windows of 2 clips made again, 0 clips differ" in capsys.readouterr().out
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["problems"] == []
    assert found["audit"]["largest_error"] < 1e-4


def test_a_process_of_a_launcher_audits_all_it_is_asked_to(
    tiny_inputs: Path, extracted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert audit_cache(config(tiny_inputs, extracted)).differing == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_every_storage_type_is_audited(tiny_inputs: Path, tmp_path: Path, dtype: str) -> None:
    videos = str(tiny_inputs / "world/train")
    words = settings(tiny_inputs, tmp_path / "cache", "--dtype", dtype)
    assert extract(["--videos", videos, *words]) == 0
    report = audit_cache(config(tiny_inputs, tmp_path / "cache"))
    assert report.differing == {}
    assert report.largest_error < 1e-3


def test_delta_tokens_are_audited_with_their_tokenizer(tiny_inputs: Path, tiny_run: Path) -> None:
    cache = tiny_run / "deltas"
    with pytest.raises(UsageError, match="give the --tokenizer"):
        audit_cache(config(tiny_inputs, cache))
    report = audit_cache(config(tiny_inputs, cache, tokenizer=str(tiny_run / "tokenizer")))
    assert report.differing == {}
    assert report.largest_error < report.allowed_error


def test_uniform_windows_are_audited(tiny_inputs: Path, tiny_run: Path) -> None:
    videos = (str(tiny_inputs / "world/val"),)
    report = audit_cache(config(tiny_inputs, tiny_run / "val-patches", videos=videos))
    assert (report.windows, report.clips, report.differing) == (2, 2, {})


def test_deltas_of_other_patch_tokens_are_not_audited(
    tiny_inputs: Path, tiny_run: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    from deltatok.shards import read_cache_info
    from deltatok.shards.cache import finish_cache, open_cache
    from deltatok.shards.plan import write_plan

    info = read_cache_info(tiny_run / "deltas")
    patches = {**info.identity["patches"], "storage": {"dtype": "int8"}}
    made = replace(info, identity={**info.identity, "patches": patches}, complete=False)
    open_cache(tmp_path / "deltas", made)
    write_plan(tmp_path / "deltas", [])
    finish_cache(tmp_path / "deltas")
    with pytest.raises(UsageError, match="was made from int8 patch tokens"):
        audit_cache(config(tiny_inputs, tmp_path / "deltas", tokenizer="x"))


def test_the_plan_tells_where_the_clips_were(tiny_inputs: Path, extracted: Path) -> None:
    report = audit_cache(config(tiny_inputs, extracted, videos=(), audit=100))
    assert (report.windows, report.differing) == (9, {})


def test_clips_of_a_list_and_of_a_tar_are_found_where_the_plan_says(
    tiny_inputs: Path, tmp_path: Path
) -> None:
    import tarfile

    videos = sorted((tiny_inputs / "world/train").rglob("*.mp4"))
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        tar.add(videos[0], "a/first.mp4")
    (tmp_path / "list.txt").write_text(f"{videos[1].name}\n")
    words = ["--videos", str(tmp_path / "clips.tar"), str(tmp_path / "list.txt")]
    words += ["--root", str(videos[1].parent), *settings(tiny_inputs, tmp_path / "cache")]
    assert extract(words) == 0
    report = audit_cache(config(tiny_inputs, tmp_path / "cache", videos=()))
    assert (report.windows, report.clips, report.differing) == (6, 2, {})


def rewrite(cache: Path, out: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy of the cache in which window 4 was changed before it was written."""
    shutil.copytree(cache, out)
    reader = PatchShards(cache)
    windows = np.arange(reader.num_windows)
    columns = {
        "tokens": reader.tokens(windows),
        "timestamps_s": reader.timestamps_s(windows),
        "frame_index": reader.frame_index(windows),
        "crop": reader.crop.copy(),
        "flipped": reader.flipped.copy(),
        "clip": reader.clip_index.astype(np.int32),
    }
    change(columns)
    made = np.argsort(window_order(len(windows), seed=0, shard=0))
    rows = ShardRows(**{name: values[made] for name, values in columns.items()}, keys=reader.keys)
    write_patch_shard(out, 0, rows, dtype="float16", seed=0)
    return out


def move_frame(columns: dict[str, np.ndarray]) -> None:
    columns["frame_index"][4, -1] += 1


def move_crop(columns: dict[str, np.ndarray]) -> None:
    columns["crop"][4, 0] += 1


def mirror(columns: dict[str, np.ndarray]) -> None:
    columns["flipped"][4] ^= True


def delay(columns: dict[str, np.ndarray]) -> None:
    columns["timestamps_s"][4, -1] += 0.01


def swap_tokens(columns: dict[str, np.ndarray]) -> None:
    columns["tokens"][4] = columns["tokens"][3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (move_frame, "frame_index"),
        (move_crop, "crop"),
        (mirror, "flipped"),
        (delay, "timestamps_s"),
        (swap_tokens, "relative error"),
    ],
)
def test_a_window_that_the_video_does_not_give_is_named(
    tiny_inputs: Path,
    extracted: Path,
    tmp_path: Path,
    change: Callable[[dict[str, np.ndarray]], None],
    words: str,
) -> None:
    cache = rewrite(extracted, tmp_path / "cache", change)
    ((clip, what),) = audit_cache(config(tiny_inputs, cache, audit=3)).differing.items()
    assert clip == PatchShards(cache).window(4)["clip"]
    assert what.startswith(f"shard 000000: window 4: {words}")


def test_another_backbone_is_refused(
    tiny_inputs: Path, extracted: Path, tmp_path: Path, fails: Fails
) -> None:
    from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone

    make_tiny_backbone(
        TinyBackboneConfig(
            out=str(tmp_path / "other"), hidden_size=16, num_hidden_layers=2, num_attention_heads=2
        )
    )
    with pytest.raises(CacheMismatch, match=r"backbone\.config\.num_hidden_layers"):
        audit_cache(config(tiny_inputs, extracted, backbone=str(tmp_path / "other")))


def test_a_local_backbone_must_be_given(
    extracted: Path, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache says the folder's name and not its place, which is no hub id to look for."""
    monkeypatch.chdir(tmp_path)
    fails(shards, ["verify", str(extracted), "--audit", "1"], 2, "local folder", "give --backbone")


def test_a_changed_or_missing_video_is_named(
    tiny_inputs: Path, extracted: Path, tmp_path: Path, fails: Fails
) -> None:
    videos = tmp_path / "train"
    shutil.copytree(tiny_inputs / "world/train", videos)
    first = min(videos.rglob("*.mp4"))
    first.write_bytes(first.read_bytes() + b"x")
    words = ["verify", str(extracted), "--audit", "3", "--videos", str(videos)]
    words += ["--backbone", str(tiny_inputs / "backbone")]
    fails(shards, words, 1, "1 of 3 clips")
    first.unlink()
    fails(shards, words, 2, f"clip {first.name!r}", "is not among them")


def test_flags_of_the_audit_alone_are_refused(extracted: Path, fails: Fails) -> None:
    fails(shards, ["verify", str(extracted), "--backbone", "x"], 2, "only --audit reads it")
    fails(shards, ["verify", str(extracted), "--audit", "0"], 2, "1 or more")
