"""What the forecast evaluation refuses, and what it says then."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.evaluate.forecast.run import run_forecast
from deltatok.shards.errors import CacheMismatch, UsageError

# conftest.py is no module to import from; its helpers come as the fixture `make`.


def copy_labels(tiny: Any) -> Path:
    """The linked label folder as a folder of its own."""
    folder = tiny.root / "labels"
    source = folder.resolve()
    folder.unlink()
    shutil.copytree(source, folder)
    return folder


def test_tokenizer_of_another_backbone_is_refused(tiny: Any, make: Any) -> None:
    make.change_provenance(tiny.root / "tokenizer", {"patches": make.identity("uniform", "bbbb")})
    with pytest.raises(CacheMismatch, match=r"backbone\.weights_sha256.*tokenizer"):
        run_forecast(tiny.config())


def test_tokenizer_of_another_preprocessing_is_refused(tiny: Any, make: Any) -> None:
    patches = make.identity("uniform", "aaaa")
    patches["preprocessing"]["image_mean"] = [0.4, 0.4, 0.4]
    make.change_provenance(tiny.root / "tokenizer", {"patches": patches})
    with pytest.raises(CacheMismatch, match=r"preprocessing\.image_mean"):
        run_forecast(tiny.config())


def test_tokenizer_of_another_frame_size_is_taken(tiny: Any, make: Any) -> None:
    patches = make.identity("uniform", "aaaa")
    patches["preprocessing"]["frame_size"] = 256
    make.change_provenance(tiny.root / "tokenizer", {"patches": patches})
    assert run_forecast(tiny.config()).rows


@pytest.mark.parametrize("role", ["world", "discriminative"])
def test_world_of_another_tokenizer_is_refused(tiny: Any, make: Any, role: str) -> None:
    deltas = {
        "patches": make.identity("uniform", "aaaa"),
        "tokenizer": {"config": {}, "weights_sha256": "cccc"},
    }
    make.change_provenance(tiny.root / role, {"deltas": deltas})
    with pytest.raises(CacheMismatch, match=rf"tokenizer\.weights_sha256.*--{role}") as caught:
        run_forecast(tiny.config())
    said = str(caught.value)
    assert said.startswith(f"--tokenizer {tiny.path('tokenizer')}: ")
    assert said.endswith("give the tokenizer that made the delta tokens it was trained on")


def test_head_of_another_backbone_is_refused(tiny: Any, make: Any) -> None:
    make.change_provenance(tiny.root / "head", {"patches": make.identity("uniform", "bbbb")})
    with pytest.raises(CacheMismatch, match=r"backbone\.weights_sha256.*head"):
        run_forecast(tiny.config())


def test_model_without_provenance_is_said_to_be_unchecked(
    tiny: Any, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make.change_provenance(tiny.root / "tokenizer", {"patches": None})
    report = run_forecast(tiny.config())
    assert report.provenance["tokenizer"]["checked"] is False
    assert "tokenizer" in caplog.text
    assert "not checked" in caplog.text


def test_cache_of_training_windows_is_refused(tiny: Any, make: Any) -> None:
    (tiny.root / "patches").unlink()
    make.write_cache(tiny.root / "patches", policy="windows", backbone="aaaa")
    with pytest.raises(CacheMismatch, match=r"sampling\.policy.*windows.*uniform"):
        run_forecast(tiny.config())


def test_too_short_windows_are_refused(tiny: Any) -> None:
    with pytest.raises(UsageError, match=r"7 frames a window, wanted at least.*8"):
        run_forecast(tiny.config(mid_steps=4))


def test_missing_labels_name_the_clip(tiny: Any) -> None:
    (copy_labels(tiny) / "sub" / "b.mp4.npy").unlink()
    with pytest.raises(UsageError, match=r"clip sub/b\.mp4: no labels"):
        run_forecast(tiny.config())


def test_too_few_label_frames_name_the_clip(tiny: Any) -> None:
    path = copy_labels(tiny) / "c.mp4.npy"
    np.save(path, np.load(path)[:20])
    with pytest.raises(UsageError, match=r"clip c\.mp4: its labels have 20 frames"):
        run_forecast(tiny.config())


def test_labels_of_another_layout_name_the_clip(tiny: Any) -> None:
    path = copy_labels(tiny) / "c.mp4.npy"
    np.save(path, np.load(path).astype(np.int64))
    with pytest.raises(UsageError, match=r"clip c\.mp4.*int64.*wanted uint8"):
        run_forecast(tiny.config())


def test_labels_with_a_class_the_head_does_not_know_name_the_clip(tiny: Any) -> None:
    path = copy_labels(tiny) / "c.mp4.npy"
    np.save(path, np.full_like(np.load(path), 7))
    with pytest.raises(UsageError, match=r"clip c\.mp4.*class 7.*0 to 3"):
        run_forecast(tiny.config())


@pytest.mark.parametrize("damage", ["empty", "header", "archive", "flat"])
def test_damaged_label_files_name_the_clip(tiny: Any, damage: str) -> None:
    path = copy_labels(tiny) / "c.mp4.npy"
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "header":
        path.write_bytes(path.read_bytes().replace(b"(50, 10, 14)", b"(50, 10, 14 "))
    elif damage == "archive":
        with path.open("wb") as file:
            np.savez(file, maps=np.zeros((50, 10, 14), np.uint8))
    else:
        np.save(path, np.zeros((50, 0, 14), np.uint8))
    with pytest.raises(UsageError, match=r"clip c\.mp4: "):
        run_forecast(tiny.config())


def test_labels_of_no_use_are_found_before_the_work(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_labels(tiny) / "c.mp4.npy"
    np.save(path, np.full_like(np.load(path), 7))
    monkeypatch.setattr(
        "deltatok.evaluate.forecast.run.score_windows", lambda *_: pytest.fail("work")
    )
    with pytest.raises(UsageError, match=r"clip c\.mp4.*class 7"):
        run_forecast(tiny.config())


def test_labels_that_are_all_ignored_are_refused(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "deltatok.evaluate.forecast.run.score_windows", lambda *_: pytest.fail("work")
    )
    folder = copy_labels(tiny)
    for path in folder.rglob("*.npy"):
        np.save(path, np.full_like(np.load(path), 255))
    with pytest.raises(UsageError, match=r"every pixel.*255"):
        run_forecast(tiny.config())


def test_generative_and_discriminative_models_are_told_apart(tiny: Any) -> None:
    with pytest.raises(UsageError, match=r"--world.*learned query.*--discriminative"):
        run_forecast(tiny.config(world=tiny.path("discriminative")))
    with pytest.raises(UsageError, match=r"--discriminative.*noise queries.*--world"):
        run_forecast(tiny.config(discriminative=tiny.path("world")))


def test_tokenizer_in_place_of_a_world_model_is_refused(tiny: Any) -> None:
    with pytest.raises(UsageError, match=r"holds a DeltaTok, wanted a DeltaWorld"):
        run_forecast(tiny.config(world=tiny.path("tokenizer")))


def test_out_that_is_a_file_is_refused_before_the_work(tiny: Any) -> None:
    (tiny.root / "report").write_text("in the way")
    with pytest.raises(UsageError, match=r"--out .*report: cannot be made"):
        run_forecast(tiny.config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": None}, "--labels without --head"),
        ({"labels": None}, "--head without --labels"),
        ({"num_samples": 0}, "num_samples: got 0, wanted at least 1"),
        ({"short_steps": 4}, "mid_steps: got 3, wanted at least short_steps = 4"),
        ({"seed": -1}, "seed: got -1"),
        ({"num_pictures": -1}, "num_pictures: got -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tiny: Any, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        tiny.config(**change)
