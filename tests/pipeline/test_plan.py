"""What --plan says before anything runs, against what is then written."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltatok.extract.shard_writer import PatchShardWriter
from deltatok.pipeline import cost_plan
from deltatok.pipeline.commands.extract import VideosConfig
from deltatok.pipeline.commands.extract import main as extract
from deltatok.pipeline.cost_plan import plan_encoding, plan_extraction, plan_text
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
from deltatok.shards import DeltatokError, UsageError, read_cache_info
from deltatok.train.config import TokenizeConfig
from deltatok.train.models.configs import DeltaTokConfig
from deltatok.train.models.deltatok import DeltaTok

Fails = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clips/: five sound ones in two folders and a broken one; backbone/: 64 channels."""
    root = tmp_path_factory.mktemp("plan")
    (root / "clips" / "more").mkdir(parents=True)
    sound = sorted((tiny_inputs / "world").rglob("*.mp4"))
    for number, clip in enumerate(sound):
        below = "more/" if number % 2 else ""
        (root / "clips" / f"{below}clip-{number}.mp4").write_bytes(clip.read_bytes())
    (root / "clips" / "broken.mp4").write_bytes(b"no video")
    make_tiny_backbone(
        TinyBackboneConfig(
            out=str(root / "backbone"), hidden_size=64, num_hidden_layers=1, num_attention_heads=2
        )
    )
    return root


def config_of(folder: Path, out: Path, **changed: Any) -> VideosConfig:
    fields: dict[str, Any] = {
        "videos": (str(folder / "clips"),),
        "out": str(out),
        "backbone": str(folder / "backbone"),
        "frame_size": 96,
        "num_windows": 3,
        "frames_per_shard": 48,
        "workers": 1,
        "max_quarantined": 0.5,
        "device": "cpu",
    }
    return VideosConfig(**(fields | changed))


def words_of(config: VideosConfig) -> list[str]:
    words = ["--videos", *config.videos, "--out", config.out, "--backbone", config.backbone]
    words += ["--workers", "1", "--max-quarantined", "0.5", "--device", "cpu"]
    words += ["--frame-size", str(config.frame_size), "--num-frames", str(config.num_frames)]
    words += ["--frames-per-shard", str(config.frames_per_shard)]
    if config.sampling == "uniform":
        return [*words, "--sampling", "uniform", "--fps", str(config.fps)]
    return [*words, "--windows", str(config.num_windows)]


def written(folder: Path) -> tuple[int, int]:
    """Bytes and files of a cache folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files), len(files)


def save_tokenizer(folder: Path) -> str:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = DeltaTok(
        DeltaTokConfig(**sizes, intermediate_size=32), generator=torch.Generator().manual_seed(0)
    )
    model.save_pretrained(folder, {})
    return str(folder)


@pytest.mark.parametrize(
    "changed", [{}, {"sampling": "uniform", "fps": 10.0, "num_frames": 4, "frames_per_shard": 32}]
)
def test_plan_of_all_clips_is_what_is_then_written(
    folder: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    config = config_of(folder, tmp_path / "out", **changed)
    plan = plan_extraction(config, num_clips=6)
    assert list(plan.quarantined) == ["broken.mp4"]
    assert not (tmp_path / "out").exists()
    assert extract(words_of(config)) == 0
    num_bytes, num_files = written(tmp_path / "out")
    counts = read_cache_info(tmp_path / "out").counts
    assert (plan.windows, plan.frames, plan.shards) == (
        counts["windows"],
        counts["frames"],
        counts["shards"],
    )
    assert plan.quarantined_share == pytest.approx(1 / 6)
    assert plan.windows_error == 0
    assert plan.files == num_files
    assert plan.bytes == pytest.approx(num_bytes, rel=0.02)


def test_plan_of_a_fused_run_is_what_is_then_written(folder: Path, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    changed = {
        "tokenizer": tokenizer,
        "frame_size": 32,
        "num_windows": 64,
        "frames_per_shard": 1024,
    }
    config = config_of(folder, tmp_path / "out", **changed)
    plan = plan_extraction(config)
    assert extract([*words_of(config), "--tokenizer", tokenizer]) == 0
    num_bytes, num_files = written(tmp_path / "out")
    assert plan.files == num_files
    assert plan.bytes == pytest.approx(num_bytes, rel=0.02)


@pytest.mark.parametrize("sampling", ["windows", "uniform"])
def test_plan_of_encoding_patch_shards_is_what_is_then_written(
    folder: Path, tmp_path: Path, sampling: str
) -> None:
    changed = {"fps": 10.0, "num_frames": 4} if sampling == "uniform" else {}
    patches = tmp_path / "patches"
    assert extract(words_of(config_of(folder, patches, sampling=sampling, **changed))) == 0
    config = TokenizeConfig(
        patches=str(patches),
        tokenizer=save_tokenizer(tmp_path / "tokenizer"),
        out=str(tmp_path / "out"),
        device="cpu",
    )
    plan = plan_encoding(config)
    few = plan_encoding(config, num_clips=2)
    words = ["--patches", config.patches, "--tokenizer", config.tokenizer, "--out", config.out]
    assert extract([*words, "--device", "cpu", "--plan"]) == 0
    assert not (tmp_path / "out").exists()
    assert extract([*words, "--device", "cpu"]) == 0
    num_bytes, _ = written(tmp_path / "out")
    counts = read_cache_info(config.out).counts
    assert (plan.windows, plan.frames) == (counts["windows"], counts["frames"])
    assert plan.bytes == pytest.approx(num_bytes, rel=0.05)
    assert (few.windows, few.probed) == (counts["windows"], 2)
    assert plan.clock_hours > 0


@pytest.mark.parametrize("changed", [{"dtype": "int8"}, {"compression": "zstd"}])
def test_plan_of_each_storage_is_what_is_then_written(
    folder: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    config = config_of(folder, tmp_path / "out", **changed)
    plan = plan_extraction(config, num_clips=6)
    ((name, value),) = changed.items()
    assert extract([*words_of(config), f"--{name}", value]) == 0
    num_bytes, num_files = written(tmp_path / "out")
    assert plan.files == num_files
    assert plan.bytes == pytest.approx(num_bytes, rel=0.02)


def test_few_clips_stand_for_all(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "out")
    plan = plan_extraction(config, num_clips=2)
    assert plan.probed == 2
    assert plan.windows == (9 if plan.quarantined else 18)
    assert plan.windows_error > 0
    assert "give or take" in plan_text(plan)
    assert plan.decode_core_hours > 0
    assert plan.clock_hours > 0


@pytest.mark.parametrize("changed", [{}, {"sampling": "uniform", "fps": 10.0, "num_frames": 4}])
def test_windows_are_counted_where_one_clip_is_tried(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    monkeypatch.setattr(cost_plan, "SAMPLE_CLIPS", 1)
    monkeypatch.setattr(cost_plan, "SAMPLE_CLIPS_PER_WORKER", 1)
    config = config_of(folder, tmp_path / "out", **changed)
    plan = plan_extraction(config)
    assert (plan.probed, plan.counted) == (1, 6)
    assert list(plan.quarantined) == ["broken.mp4"]
    assert plan.windows_error == 0
    assert extract(words_of(config)) == 0
    assert plan.windows == read_cache_info(tmp_path / "out").counts["windows"]


def test_uniform_windows_are_expected_in_proportion_to_the_bytes_of_videos(
    folder: Path, tmp_path: Path
) -> None:
    config = config_of(folder, tmp_path / "out", sampling="uniform", fps=10.0, num_frames=4)
    plan = plan_extraction(config, num_clips=2)
    assert extract(words_of(config)) == 0
    windows = read_cache_info(tmp_path / "out").counts["windows"]
    assert abs(plan.windows - windows) <= 2 * plan.windows_error


def test_command_prints_the_plan_and_writes_only_the_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(folder, tmp_path / "below" / "out")
    flags = ["--plan", "--json", str(tmp_path / "plan.json"), "--probe-clips", "1"]
    assert extract([*words_of(config), *flags]) == 0
    said = capsys.readouterr().out
    for text in ("int8", "deltas", "GB/s", "core", "free in", "epoch"):
        assert text in said
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["bytes"] > plan["other_bytes"]["int8"] > plan["other_bytes"]["deltas"]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("error", [DeltatokError("no room"), KeyboardInterrupt()])
def test_what_ends_a_plan_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(self: object, *_: object) -> None:
        raise error

    monkeypatch.setattr(PatchShardWriter, "write", fail)
    with pytest.raises(type(error)):
        plan_extraction(config_of(folder, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_signal_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    convert = PatchShardWriter.convert

    def asked(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        assert list(tmp_path.rglob("*"))
        os.kill(os.getpid(), signal.SIGTERM)
        return convert(self, tokens)

    monkeypatch.setattr(PatchShardWriter, "convert", asked)
    fails(extract, [*words_of(config_of(folder, tmp_path / "out")), "--plan"], 75, "SIGTERM")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    fails(extract, [*words_of(config_of(folder, tmp_path / "out")), "--plan"], 2, "--out")


@pytest.mark.parametrize(
    ("compute_s", "stored_s", "epochs"),
    [(10.0, 0.0, 2), (10.0, 5.0, 3), (10.0, 9.0, 11), (10.0, 10.0, None)],
)
def test_break_even_is_the_first_pass_that_costs_less(
    compute_s: float, stored_s: float, epochs: int | None
) -> None:
    found = cost_plan._break_even(once_s=10.0, stored_s=stored_s, recompute_s=compute_s)
    assert found == epochs


@pytest.mark.parametrize("flag", [["--json", "x"], ["--probe-clips", "3"]])
def test_flags_of_the_plan_alone_are_refused(
    folder: Path, tmp_path: Path, flag: list[str], fails: Fails
) -> None:
    fails(extract, [*words_of(config_of(folder, tmp_path / "out")), *flag], 2, flag[0], "--plan")


def test_nothing_but_broken_clips_is_said(folder: Path, tmp_path: Path, fails: Fails) -> None:
    config = config_of(folder, tmp_path / "out", videos=(str(folder / "clips" / "broken.mp4"),))
    fails(extract, [*words_of(config), "--plan"], 3, "broken.mp4", "--probe-clips")
    assert not (tmp_path / "out").exists()


def test_no_clip_to_probe_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--probe-clips 0"):
        plan_extraction(config_of(folder, tmp_path / "out"), num_clips=0)
