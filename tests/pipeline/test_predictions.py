"""--predictions: frames of any other model, scored by the protocol of the cache's own forecasts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from deltatok.evaluate.forecast import predictions as prediction_rows
from deltatok.evaluate.forecast.config import ForecastConfig
from deltatok.evaluate.forecast.predictions import wanted
from deltatok.evaluate.forecast.windows import EvaluationWindows
from deltatok.evaluate.report.frames import clips_by_key, read_frames
from deltatok.extract.backbone import Backbone
from deltatok.extract.datasets.windows import EvaluationPolicy
from deltatok.extract.pixels import window_pixels
from deltatok.pipeline.commands.evaluate import main as evaluate
from deltatok.pipeline.commands.extract import main as extract
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
from deltatok.shards.patches.reader import PatchShards

Frames = NDArray[np.uint8]
Fails = Callable[..., None]
Sample = Callable[[Frames, Frames], Frames]
"""True future frames (H, h, w, 3) and the last one seen (h, w, 3) -> predicted ones."""

NUM_SEQUENCES = 4  # two clips of one window, two horizons


@pytest.fixture
def words(tiny_inputs: Path, tiny_run: Path, tmp_path: Path) -> list[str]:
    """Flags of an evaluation with predictions; all but theirs."""
    flags = {
        "patches": tiny_run / "val-patches",
        "tokenizer": tiny_run / "tokenizer",
        "head": tiny_run / "head",
        "labels": tiny_inputs / "world" / "labels" / "val",
        "backbone": tiny_inputs / "backbone",
        "predictions": tmp_path / "predictions",
        "out": tmp_path / "report",
        "num-pictures": 0,
    }
    return [
        "forecast",
        *(str(word) for name, value in flags.items() for word in (f"--{name}", value)),
    ]


@pytest.fixture
def predict(tiny_inputs: Path, tiny_run: Path, tmp_path: Path) -> Callable[..., list[Path]]:
    """predict(*samples, write=...): write predictions of every sequence; gives their folders."""

    def make(*samples: Sample, write: Callable[[Path, Frames], None] | None = None) -> list[Path]:
        cache = PatchShards(tiny_run / "val-patches")
        config = ForecastConfig(patches="", tokenizer="", out="")
        clips = clips_by_key([str(tiny_inputs / "world" / "val")])
        folders = []
        for one in wanted(config, cache).values():
            numbers = [one.context_frames[-1], *one.target_frames]
            frames = np.stack(read_frames(clips[one.clip], numbers) or [])
            folder = tmp_path / "predictions" / one.folder
            for i, sample in enumerate(samples):
                path = folder / f"{i}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                (write or np.save)(path, sample(frames[1:], frames[0]))
            folders.append(folder)
        assert len(folders) == NUM_SEQUENCES
        return folders

    return make


def truth(future: Frames, last: Frames) -> Frames:
    return future


def stay(future: Frames, last: Frames) -> Frames:
    return np.repeat(last[None], len(future), axis=0)


def noise(future: Frames, last: Frames) -> Frames:
    return np.random.default_rng(0).integers(0, 256, future.shape, dtype=np.uint8)


def values(report: Path, row: str, metric: str) -> list[float]:
    """Of the short and the mid horizon."""
    rows = json.loads((report / "report.json").read_text())["rows"]
    return [r["value"] for r in rows if (r["row"], r["metric"]) == (row, metric)]


def test_true_frames_score_as_present_and_the_last_as_copy_last(
    words: list[str], predict: Callable[..., list[Path]], tmp_path: Path
) -> None:
    report = tmp_path / "report"
    predict(truth)
    assert evaluate(words) == 0
    assert values(report, "copy_last", "feature_loss")[1] > 1e-2
    assert max(values(report, "predictions_best", "feature_loss")) < 1e-5  # float16 in the cache
    for row in ("predictions_best", "predictions_mean"):
        found, present = values(report, row, "miou"), values(report, "present", "miou")
        assert found == pytest.approx(present, abs=2e-3)
    shutil.rmtree(tmp_path / "predictions")
    predict(stay)
    assert evaluate(words) == 0
    for metric, noise_level in (("feature_loss", 1e-4), ("miou", 2e-3)):
        found = values(report, "predictions_mean", metric)
        assert found == pytest.approx(values(report, "copy_last", metric), abs=noise_level)


def test_the_best_sample_and_the_mean_are_scored(
    words: list[str], predict: Callable[..., list[Path]], tmp_path: Path
) -> None:
    predict(noise, truth, stay)
    assert evaluate(words) == 0
    best, mean = (
        values(tmp_path / "report", f"predictions_{name}", "feature_loss")
        for name in ("best", "mean")
    )
    assert max(best) < 1e-5
    assert min(mean) > 1e-3
    provenance = json.loads((tmp_path / "report" / "report.json").read_text())["provenance"]
    assert provenance["predictions"] == {
        "folder": "predictions",
        "num_samples": 3,
        "backbone": "backbone",
    }


def write_images(path: Path, frames: Frames) -> None:
    folder = path.with_suffix("")
    folder.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"step-{i + 8}.png")  # 8, 9, 10: not by letters


def write_video(path: Path, frames: Frames) -> None:
    with av.open(str(path.with_suffix(".mkv")), mode="w") as container:
        stream = container.add_stream("libx264rgb", rate=5, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("write", [write_images, write_video])
def test_images_and_videos_are_read_as_arrays_are(
    words: list[str],
    predict: Callable[..., list[Path]],
    tmp_path: Path,
    write: Callable[[Path, Frames], None],
) -> None:
    predict(truth, write=write)
    assert evaluate(words) == 0
    assert max(values(tmp_path / "report", "predictions_best", "feature_loss")) < 1e-5


def test_frames_of_another_size_are_resized_as_the_videos_were(
    words: list[str], predict: Callable[..., list[Path]], tmp_path: Path
) -> None:
    predict(lambda future, last: future.repeat(2, axis=1).repeat(2, axis=2))
    assert evaluate(words) == 0
    losses = values(tmp_path / "report", "predictions_best", "feature_loss")
    assert max(losses) < 1e-5  # halved again: the mean of four equal pixels


def test_missing_sequences_are_refused_by_name_and_listed(
    words: list[str], predict: Callable[..., list[Path]], tmp_path: Path, fails: Fails
) -> None:
    gone = predict(truth)[0]
    shutil.rmtree(gone)
    name = gone.relative_to(tmp_path / "predictions").as_posix()
    fails(evaluate, words, 2, "nothing for 1 of 4 sequences", name, "--predictions-subset")
    listed = (tmp_path / "report" / "predictions-wanted.jsonl").read_text().splitlines()
    lines = {line["folder"]: line for line in map(json.loads, listed)}
    assert len(lines) == NUM_SEQUENCES
    assert len(lines[name]["context_frames"]) == 4
    assert lines[name]["target_times_s"] == sorted(lines[name]["target_times_s"])
    assert not (tmp_path / "report" / "report.json").exists()


def test_a_subset_is_scored_only_when_asked_for(
    words: list[str], predict: Callable[..., list[Path]], tmp_path: Path
) -> None:
    shutil.rmtree(predict(truth)[0])
    assert evaluate([*words, "--predictions-subset"]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["num_windows"], report["num_clips"]) == (1, 1)


def test_an_empty_folder_is_no_subset(words: list[str], tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "predictions").mkdir()
    fails(evaluate, [*words, "--predictions-subset"], 2, "nothing for 4 of 4 sequences")


def test_unequal_numbers_of_samples_are_refused(
    words: list[str], predict: Callable[..., list[Path]], fails: Fails
) -> None:
    (predict(truth, stay)[-1] / "1.npy").unlink()
    fails(evaluate, words, 2, "best of more is better")


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (lambda future, last: future[:-1] if len(future) > 1 else future, "2 frames, wanted 3"),
        (lambda future, last: future / 255.0, "holds float64"),
        (lambda future, last: future[:, :, ::2], "without bars or crop"),
        (lambda future, last: future[:, :0], "wanted uint8"),
    ],
)
def test_frames_of_no_use_are_refused(
    words: list[str], predict: Callable[..., list[Path]], fails: Fails, sample: Any, text: str
) -> None:
    predict(sample)
    fails(evaluate, words, 2, text)


def test_broken_files_are_named(
    words: list[str], predict: Callable[..., list[Path]], fails: Fails
) -> None:
    folder = predict(truth)[0]
    (folder / "0.npy").write_bytes(b"no array")
    fails(evaluate, words, 2, "0.npy: cannot be read")
    (folder / "0.npy").write_bytes(b"")
    fails(evaluate, words, 2, "0.npy: cannot be read")
    (folder / "0.npy").unlink()
    (folder / "0.mp4").write_bytes(b"no video")
    fails(evaluate, words, 2, "0.mp4: cannot be decoded")
    (folder / "0.mp4").unlink()
    (folder / "0").mkdir()
    fails(evaluate, words, 2, "no image in it")


@pytest.mark.parametrize("damage", ["cut off", "too large", "of two sizes"])
def test_broken_images_are_named(
    words: list[str],
    predict: Callable[..., list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    fails: Fails,
    damage: str,
) -> None:
    folder = next(f for f in predict(truth, write=write_images) if f.name.startswith("mid")) / "0"
    image = folder / "step-9.png"
    if damage == "cut off":
        image.write_bytes(image.read_bytes()[:-30])
        fails(evaluate, words, 2, "step-9.png: cannot be read as an image")
    elif damage == "too large":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        fails(evaluate, words, 2, "cannot be read as an image", "decompression bomb")
    else:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image)
        fails(evaluate, words, 2, "images of different sizes")


@pytest.mark.parametrize("damage", ["cut off", "too few images"])
def test_samples_of_no_use_are_found_before_the_work(
    words: list[str],
    predict: Callable[..., list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    fails: Fails,
    damage: str,
) -> None:
    last = predict(truth)[-1] / "0.npy"
    monkeypatch.setattr(prediction_rows.Backbone, "load", lambda *_, **__: pytest.fail("work"))
    if damage == "cut off":
        last.write_bytes(last.read_bytes()[:-1])
        fails(evaluate, words, 2, "0.npy: cannot be read")
    else:
        frames = np.load(last)
        last.unlink()
        write_images(last, np.concatenate([frames, frames]))
        fails(evaluate, words, 2, f"{2 * len(frames)} frames, wanted {len(frames)}")


def test_another_backbone_is_refused_with_both_fingerprints(
    words: list[str],
    predict: Callable[..., list[Path]],
    tiny_run: Path,
    tmp_path: Path,
    fails: Fails,
) -> None:
    predict(truth)
    config = TinyBackboneConfig(
        out=str(tmp_path / "other"),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        seed=1,
    )
    make_tiny_backbone(config)
    right = PatchShards(tiny_run / "val-patches").info.identity["backbone"]["weights_sha256"]
    wrong = Backbone.load(config.out).identity()["weights_sha256"]
    fails(evaluate, [*words, "--backbone", config.out], 4, "backbone.weights_sha256", right, wrong)


@pytest.mark.parametrize(
    ("size", "region"),
    [
        ((375, 1242), "whole"),
        ((375, 1242), "kb"),
        ((360, 1300), "kb"),
        ((400, 500), "whole"),
        ((500, 380), "whole"),
        ((300, 300), "whole"),
    ],
)
@pytest.mark.parametrize("shape", [(64, 64), (32, 64)])
def test_predictions_are_cut_as_the_crops_of_an_evaluation_cache(
    size: tuple[int, int], region: Any, shape: tuple[int, int]
) -> None:
    policy = EvaluationPolicy(
        dataset="d",
        num_frames=2,
        num_context=1,
        stride_s=0.2,
        fps=10,
        frame_size=shape,
        region=region,
    )
    frames = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    draws = policy.draw([0, 1], np.arange(2) / 10, *size)
    crops = [draw.source_crop for draw in draws]
    cache = SimpleNamespace(
        crop=np.array(crops, np.float32),
        info=SimpleNamespace(identity={"sampling": {"policy": "evaluation"}}),
        keys=["clip"],
        clip_index=np.zeros(len(crops), np.int64),
    )
    views = prediction_rows._views(cache, shape)  # type: ignore[arg-type]
    rows = SimpleNamespace(_shape=shape, _backbone=SimpleNamespace(device=torch.device("cpu")))
    top, left, height, width = draws[0].crop
    predicted = frames[:, top : top + height, left : left + width]
    for draw, view in zip(draws, views, strict=True):
        found = prediction_rows.PredictionRows._squares(rows, predicted, view, Path())  # type: ignore[arg-type]
        made = window_pixels(frames, draw, frame_size=shape, device=torch.device("cpu"))
        assert torch.equal(found, made)


@pytest.fixture
def frame_set(tmp_path: Path) -> Frames:
    """tmp_path/set: one sequence of nine frames, wider than high, of which two are labelled."""
    frames = np.random.default_rng(0).integers(0, 256, (9, 40, 70, 3), dtype=np.uint8)
    for i, frame in enumerate(frames):
        write_png(tmp_path / "set" / "images" / f"{i:03d}.png", frame)
    for i in (6, 8):
        write_png(tmp_path / "set" / "labels" / f"{i:03d}.png", frames[i, ..., 0] % 4)
    return frames


@pytest.fixture
def set_cache(tiny_inputs: Path, frame_set: Frames, tmp_path: Path) -> PatchShards:
    """The evaluation cache of `frame_set`: two targets, two crops."""
    words = ["--dataset", "sequences", "--name", "set", "--root", str(tmp_path / "set")]
    words += ["--images", "images/*.png", "--labels", "labels/*.png", "--fps", "5"]
    words += ["--backbone", str(tiny_inputs / "backbone"), "--frame-size", "32", "--workers", "1"]
    assert extract([*words, "--out", str(tmp_path / "cache")]) == 0
    cache = PatchShards(tmp_path / "cache")
    assert len(cache) == 4
    return cache


def test_pictures_of_an_evaluation_cache_show_the_frames_of_its_crops(
    frame_set: Frames, set_cache: PatchShards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ForecastConfig(
        patches=str(tmp_path / "cache"),
        tokenizer="",
        out="",
        head="",
        labels=str(tmp_path / "set"),
    )
    windows = EvaluationWindows(config, set_cache, None)
    for window in range(4):
        left = round(float(set_cache.crop[window, 1]))
        assert left in (0, 30)
        numbers = set_cache.frame_index([window])[0]
        shown = np.stack(windows.shown_frames(window))
        assert np.array_equal(shown, frame_set[numbers, :, left : left + 40])
    (tmp_path / "set" / "images" / "004.png").unlink()
    assert windows.shown_frames(0) == ()
    assert "its pictures have no frames" in caplog.text


def test_both_crops_of_an_evaluation_cache_are_scored_from_whole_frames(
    tiny_inputs: Path,
    tiny_run: Path,
    frame_set: Frames,
    set_cache: PatchShards,
    tmp_path: Path,
) -> None:
    frames, cache = frame_set, set_cache
    config = ForecastConfig(patches="", tokenizer="", out="")
    for one in wanted(config, cache).values():
        folder = tmp_path / "predictions" / one.folder
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "0.npy", frames[list(one.target_frames)])
    flags = ["--patches", tmp_path / "cache", "--tokenizer", tiny_run / "tokenizer"]
    flags += ["--head", tiny_run / "head", "--labels", tmp_path / "set", "--num-pictures", 1]
    flags += ["--predictions", tmp_path / "predictions", "--backbone", tiny_inputs / "backbone"]
    assert evaluate(["forecast", *map(str, flags), "--out", str(tmp_path / "report")]) == 0
    assert min(values(tmp_path / "report", "copy_last", "feature_loss")) > 1e-2
    assert max(values(tmp_path / "report", "predictions_best", "feature_loss")) < 1e-5
    found, present = (
        values(tmp_path / "report", row, "miou") for row in ("predictions_best", "present")
    )
    assert found == pytest.approx(present, abs=2e-3)
    assert "Frames of set/00" in (tmp_path / "report" / "report.html").read_text()


def write_png(path: Path, pixels: Frames) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
