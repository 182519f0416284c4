"""From a labelled data set to a report through the commands, and what they say to bad input."""

import json
from pathlib import Path

import numpy as np
import pytest

from deltatok.pipeline.commands.evaluate import main as evaluate
from deltatok.pipeline.commands.extract import main as extract
from deltatok.pipeline.commands.train import main as train
from deltatok.shards import PatchShards
from deltatok.shards.evaluation.targets import load_label, read_targets


@pytest.fixture(scope="module")
def targets_cache(tiny_inputs: Path, tmp_path_factory) -> Path:
    """The evaluation cache of the tiny little world; not to be changed."""
    out = tmp_path_factory.mktemp("targets") / "cache"
    assert extract(_words(tiny_inputs, out)) == 0
    return out


def _words(tiny_inputs: Path, out: Path) -> list[str]:
    words = ["--dataset", "little-world", "--root", str(tiny_inputs / "world"), "--out", str(out)]
    return [*words, "--backbone", str(tiny_inputs / "backbone"), "--frame-size", "32"]


def test_targets_have_the_tokens_of_the_uniform_cache(
    tiny_inputs: Path, tiny_run: Path, targets_cache: Path
) -> None:
    targets, uniform = PatchShards(targets_cache), PatchShards(tiny_run / "val-patches")
    assert targets.info.identity["sampling"]["stride_s"] == 0.2
    for clip, key in enumerate(targets.keys):
        (window,) = np.flatnonzero(targets.clip_index == clip)
        (other,) = uniform.select(clips=f"{key.split('/')[0]}.mp4")[:1]
        np.testing.assert_array_equal(targets.tokens([window]), uniform.tokens([other]))
        np.testing.assert_array_equal(targets.timestamps_s([window]), uniform.timestamps_s([other]))


def test_labels_are_the_target_frame_of_the_array_file(
    tiny_inputs: Path, targets_cache: Path
) -> None:
    targets = read_targets(targets_cache)
    assert sorted(targets) == ["0000/000030", "0001/000030"]
    maps = np.load(tiny_inputs / "world/labels/val/0001.mp4.npy")
    label = load_label(targets["0001/000030"], tiny_inputs / "world")
    np.testing.assert_array_equal(label, maps[30])


def test_a_head_and_a_report_from_the_targets(
    tiny_inputs: Path, tiny_run: Path, targets_cache: Path, tmp_path: Path, capsys
) -> None:
    labels = str(tiny_inputs / "world")
    words = ["head", "--patches", str(targets_cache), "--labels", labels, "--num-classes", "4"]
    words += ["--out", str(tmp_path / "head"), "--steps", "3", "--batch-size", "1"]
    assert train([*words, "--warmup-steps", "1"]) == 0
    words = ["forecast", "--patches", str(targets_cache), "--labels", labels]
    words += ["--tokenizer", str(tiny_run / "tokenizer"), "--head", str(tmp_path / "head")]
    assert evaluate([*words, "--num-pictures", "0", "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    rows = {(row["row"], row["metric"]) for row in report["rows"]}
    assert {("present", "miou"), ("copy_last", "miou")} <= rows


def test_known_futures_serve_the_targets_as_they_serve_the_uniform_cache(
    tiny_inputs: Path, tiny_run: Path, targets_cache: Path, tmp_path: Path
) -> None:
    """The same clips, futures and features: the same mode scores of every row without noise."""
    world, scores = tiny_inputs / "world", []
    caches = {targets_cache: world, tiny_run / "val-patches": world / "labels" / "val"}
    for number, (cache, labels) in enumerate(caches.items()):
        out = tmp_path / str(number)
        words = ["forecast", "--patches", cache, "--labels", labels, "--out", out]
        words += ["--tokenizer", tiny_run / "tokenizer", "--head", tiny_run / "head"]
        words += ["--futures", world / "futures", "--num-pictures", 0]
        assert evaluate([str(word) for word in words]) == 0
        rows = json.loads((out / "report.json").read_text())["rows"]
        modes = [row for row in rows if row["metric"].startswith("mode")]
        scores.append([(row["horizon"], row["row"], row["metric"], row["value"]) for row in modes])
    assert len(scores[0]) == 3 * 2 * 3  # rows, horizons, metrics
    assert scores[0] == scores[1]


def test_the_command_says_where_the_cache_is(
    tiny_inputs: Path, targets_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract(_words(tiny_inputs, targets_cache)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"evaluation cache: {targets_cache}"


def test_help_names_the_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        extract(["--dataset", "x", "--help"])
    said = capsys.readouterr().out
    assert "cityscapes" in said and "--steps-per-m" in said and "--split-file" in said


def test_a_plan_counts_targets_and_writes_nothing(
    tiny_inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract([*_words(tiny_inputs, tmp_path / "cache"), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "clips      2 " in said
    assert "quarantine 0 %" in said
    assert "windows    2 of 7 frames: 14 frames" in said
    assert "other ways to store them: int8" in said
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "vspv", "--root", "."], "dataset: got 'vspv', wanted one of vspw"),
        (["--dataset", "vspw"], "root not given; add --root"),
        (["--dataset", "vspw", "--root", "."], "has no data; wanted val.txt, data/VIDEO/origin"),
        (["--dataset", "kitti", "--root", "."], "split_file: not given"),
        (["--dataset", "vspw", "--root", ".", "--videos", "x"], "--videos and --dataset"),
        (["--dataset", "vspw", "--root", ".", "--fps", "9"], "fps: got 9.0 with dataset vspw"),
        (["--dataset", "vspw", "--root", ".", "--sampling", "uniform"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_refused(fails, tmp_path, monkeypatch, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    fails(extract, [*words, "--out", str(tmp_path / "out")], 2, message)


def test_an_audit_of_targets_is_refused(fails, targets_cache: Path, tiny_inputs: Path) -> None:
    from deltatok.pipeline.commands.shards import main as shards

    assert shards(["verify", str(targets_cache), "--deep"]) == 0
    words = ["verify", str(targets_cache), "--audit", "1"]
    fails(shards, [*words, "--backbone", str(tiny_inputs / "backbone")], 2, "evaluation cache")
