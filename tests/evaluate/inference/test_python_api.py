"""DeltaWorld for Python: from pixels to futures, found by fingerprints, streamed frame by frame."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from deltatok.evaluate import DeltaWorld, Futures
from deltatok.evaluate.forecast.rollout import decode_rollout
from deltatok.evaluate.report import panels
from deltatok.evaluate.report.panels import most_diverse
from deltatok.evaluate.report.pictures import heat_tile
from deltatok.extract.backbone import Backbone
from deltatok.extract.pixels import RESIZE_RULE, window_pixels
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
from deltatok.shards.errors import CacheMismatch, DeltatokError, UsageError
from deltatok.shards.sampling import WindowDraw
from deltatok.train.data.order import generator
from deltatok.train.engine.model_folder import weights_sha256
from deltatok.train.models.configs import DeltaTokConfig, DeltaWorldConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.deltaworld import DeltaWorldNetwork as WorldModel
from deltatok.train.models.heads import (
    DepthHead,
    DepthHeadConfig,
    SegmentationHead,
    SegmentationHeadConfig,
)

WIDTH, SIZE, STEPS = 16, 32, 3


def make_tokenizer(seed: int) -> DeltaTok:
    config = DeltaTokConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        layer_scale_init=0.7,
        initializer_range=0.2,
    )
    return DeltaTok(config, generator=torch.Generator().manual_seed(seed)).eval()


def make_world(*, use_bom: bool) -> WorldModel:
    config = DeltaWorldConfig(
        hidden_size=WIDTH,
        predictor_hidden_size=24,
        predictor_num_hidden_layers=1,
        predictor_num_heads=2,
        rope_axis_sizes=(8,),
        use_bom=use_bom,
        layer_scale_init=1.0,
        initializer_range=0.5,
    )
    return WorldModel(config, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder: backbone, tokenizer, world-model, discriminative, head; tests leave it
    as it is."""
    root = tmp_path_factory.mktemp("run")
    make_tiny_backbone(
        TinyBackboneConfig(
            out=str(root / "backbone"),
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    backbone = Backbone.load(str(root / "backbone"))
    patches = {
        "backbone": backbone.identity(),
        "preprocessing": {
            "frame_size": SIZE,
            "patch_size": 16,
            "image_mean": list(backbone.image_mean),
            "image_std": list(backbone.image_std),
            "resize": RESIZE_RULE,
        },
    }
    tokenizer = make_tokenizer(1)
    tokenizer.save_pretrained(root / "tokenizer", {"patches": patches})
    deltas = {"patches": patches, "tokenizer": {"weights_sha256": weights_sha256(tokenizer)}}
    for name, use_bom in (("world-model", True), ("discriminative", False)):
        make_world(use_bom=use_bom).save_pretrained(root / name, {"deltas": deltas})
    head = SegmentationHead(SegmentationHeadConfig(in_size=WIDTH, num_classes=3))
    head.save_pretrained(root / "head", {"patches": patches})
    return root


@pytest.fixture(scope="module")
def world(run: Path) -> DeltaWorld:
    return DeltaWorld.from_pretrained(run / "world-model", device="cpu")


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """The run, for a test to change."""
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def frames() -> NDArray[np.uint8]:
    """7 frames (T, H, W, 3) of noise, wider than high."""
    return np.random.default_rng(0).integers(0, 256, (7, 40, 60, 3), dtype=np.uint8)


def write_video(path: Path, frames: NDArray[np.uint8], *, fps: int) -> None:
    """Lossless, so that its frames are known."""
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264rgb", rate=fps, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_one_argument_finds_every_part_by_its_weights(world: DeltaWorld, run: Path) -> None:
    assert world.parts.folders == {
        "world": run / "world-model",
        "tokenizer": run / "tokenizer",
        "backbone": run / "backbone",
        "head": run / "head",
    }


def test_parts_are_found_under_other_names_and_in_a_moved_folder(copied: Path) -> None:
    decoy = make_tokenizer(9)
    decoy.save_pretrained(copied / "a-first-try", {})
    (copied / "tokenizer").rename(copied / "z")
    (copied / "backbone").rename(copied / "dino")
    moved = copied.rename(copied.parent / "elsewhere")
    found = DeltaWorld.from_pretrained(moved, device="cpu").parts.folders
    assert found["world"] == moved / "world-model"  # the only best-of-many one in the folder
    assert found["tokenizer"].name == "z"
    assert found["backbone"].name == "dino"


def test_futures_are_those_of_a_straight_line_computation(
    world: DeltaWorld, frames: NDArray[np.uint8]
) -> None:
    futures = world.predict(frames[:4], fps=5, num_samples=6, seed=7)
    parts = world.parts
    whole = WindowDraw(
        frame_index=(0, 1, 2, 3), timestamps_s=(0.0,) * 4, crop=(0, 0, 40, 60), flipped=False
    )  # as a uniform cache takes them
    squares = window_pixels(frames[:4], whole, frame_size=SIZE, device=torch.device("cpu"))
    x = parts.backbone.tokens(squares)[None]
    with torch.no_grad():
        z = parts.tokenizer.encode_sequence(x, parts.black, grid=(2, 2))
        noise = parts.world.draw_noise(STEPS, 1, 6, 1, generator=generator("predict", 7))
        times = torch.arange(7)[None] * 0.2
        expected = parts.world.rollout(z, times, horizon=STEPS, num_samples=6, noise=noise)
        features = decode_rollout(parts.tokenizer, expected, x[:, -1], grid=(2, 2))[0]
        logits = parts.head(features[2, 1].T.reshape(1, WIDTH, 2, 2)) if parts.head else None
    assert futures.tokens.shape == (6, STEPS, WIDTH)
    torch.testing.assert_close(futures.tokens, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(futures.features, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(futures.mean, features.mean(0), rtol=1e-4, atol=1e-4)
    spread = features.std(0, correction=0).square().mean(-1).sqrt().reshape(STEPS, 2, 2)
    torch.testing.assert_close(futures.spread, spread, rtol=1e-4, atol=1e-4)
    assert logits is not None
    torch.testing.assert_close(futures.outputs[2, 1], logits[0], rtol=1e-4, atol=1e-4)
    assert futures.mean_output.shape == (STEPS, 3, 2, 2)
    assert futures.times_s == pytest.approx((0.2, 0.4, 0.6))


def test_nothing_is_decoded_before_it_is_asked_for(
    world: DeltaWorld, frames: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    decode = world.parts.tokenizer.decode
    monkeypatch.setattr(
        world.parts.tokenizer, "decode", lambda *a, **k: calls.append(1) or decode(*a, **k)
    )
    futures = world.predict(frames, fps=5, num_samples=9)
    assert not calls
    _ = futures.mean, futures.spread, futures.features
    assert len(calls) == 2 * STEPS  # 8 samples, then one; each step once


@pytest.mark.parametrize("seen", [1, 3, 4, 7])
def test_a_stream_equals_the_prediction_from_all_frames_exactly(
    world: DeltaWorld, frames: NDArray[np.uint8], seen: int
) -> None:
    state = world.stream()
    for i, frame in enumerate(frames[:seen]):
        state.add(torch.from_numpy(frame), 100 + 0.2 * i)
    streamed = state.predict(num_samples=5, seed=2)
    times = [100 + 0.2 * i for i in range(seen)]
    at_once = world.predict(frames[:seen], times_s=times, num_samples=5, seed=2)
    assert torch.equal(streamed.tokens, at_once.tokens)
    assert torch.equal(streamed.features, at_once.features)
    assert len(state) == min(seen, 4)
    assert torch.equal(state.predict(num_samples=5, seed=2).tokens, at_once.tokens)


def test_a_stream_keeps_one_feature_map_whatever_it_has_seen(
    world: DeltaWorld, frames: NDArray[np.uint8]
) -> None:
    state = world.stream()
    for i in range(12):
        state.add(frames[i % 7], 0.1 * i)
    kept = [seen.first.numel() + seen.delta.numel() for seen in state._seen]
    assert kept == [2 * WIDTH] * 4
    assert state._last is not None
    assert state._last.shape == (4, WIDTH)


def test_the_same_seed_gives_the_same_futures_and_another_one_others(
    world: DeltaWorld, frames: NDArray[np.uint8]
) -> None:
    one, again, other = (world.predict(frames, fps=5, seed=seed).tokens for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


def test_a_video_is_seen_at_the_step_and_what_came_is_kept(
    world: DeltaWorld, tmp_path: Path
) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (21, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.mkv", frames, fps=10)
    futures = world.predict(tmp_path / "clip.mkv", at_s=1.5, num_samples=2)
    assert np.array_equal(futures.seen, frames[[9, 11, 13, 15]])
    assert np.array_equal(futures.came, frames[[17, 19]])  # the video ends at 2.0 s
    from_array = world.predict(frames, fps=10, at_s=1.5, num_samples=2)
    assert torch.equal(futures.tokens, from_array.tokens)
    at_end = world.predict(tmp_path / "clip.mkv", num_samples=2)
    assert np.array_equal(at_end.seen, frames[[14, 16, 18, 20]])
    assert not len(at_end.came)


def test_a_horizon_is_hit_by_equal_steps(world: DeltaWorld, frames: NDArray[np.uint8]) -> None:
    futures = world.predict(frames, fps=25, horizon_s=0.5, num_samples=1)
    assert futures.times_s == pytest.approx((0.25, 0.5))


def test_a_saved_world_is_whole_and_predicts_the_same(
    world: DeltaWorld, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    world.save_pretrained(tmp_path / "bundle")
    moved = (tmp_path / "bundle").rename(tmp_path / "moved")
    again = DeltaWorld.from_pretrained(moved, device="cpu")
    assert {path.parent for path in again.parts.folders.values()} == {moved}
    one, other = (one.predict(frames, fps=5).tokens for one in (world, again))
    assert torch.equal(one, other)


def test_another_tokenizer_is_refused_with_both_fingerprints(run: Path, tmp_path: Path) -> None:
    other = make_tokenizer(9)
    other.save_pretrained(tmp_path / "other", {})
    right = json.loads((run / "world-model" / "provenance.json").read_text())
    with pytest.raises(CacheMismatch) as refused:
        DeltaWorld.from_pretrained(run / "world-model", tokenizer=tmp_path / "other")
    assert weights_sha256(other) in str(refused.value)
    assert right["deltas"]["tokenizer"]["weights_sha256"] in str(refused.value)
    assert refused.value.exit_code == 4


def test_another_backbone_is_refused_with_both_fingerprints(run: Path, tmp_path: Path) -> None:
    make_tiny_backbone(
        TinyBackboneConfig(
            out=str(tmp_path / "b"),
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            seed=5,
        )
    )
    shas = [
        Backbone.load(str(d)).identity()["weights_sha256"]
        for d in (run / "backbone", tmp_path / "b")
    ]
    with pytest.raises(CacheMismatch) as refused:
        DeltaWorld.from_pretrained(run / "world-model", backbone=tmp_path / "b")
    assert all(sha in str(refused.value) for sha in shas)


@pytest.mark.parametrize("part", ["tokenizer", "backbone"])
def test_a_part_that_is_not_there_is_asked_for(copied: Path, part: str) -> None:
    shutil.rmtree(copied / part)
    with pytest.raises(UsageError, match=rf"pass {part}=") as refused:
        DeltaWorld.from_pretrained(copied / "world-model", device="cpu")
    assert "sha256" in str(refused.value)


@pytest.mark.parametrize("part", ["world-model", "tokenizer"])
def test_a_part_with_a_flipped_bit_is_named(
    copied: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = copied / part / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(DeltatokError) as refused:
        DeltaWorld.from_pretrained(copied / "world-model", device="cpu")
    assert f"{file}: not what was written" in caplog.text + str(refused.value)


def test_a_model_without_provenance_takes_what_it_is_given_with_a_warning(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (copied / "world-model" / "provenance.json").write_text("{}")
    (copied / "world-model" / "checksums.json").unlink()
    given: dict[str, Any] = {"tokenizer": copied / "tokenizer", "backbone": copied / "backbone"}
    with pytest.raises(UsageError, match="pass tokenizer="):
        DeltaWorld.from_pretrained(copied / "world-model", device="cpu")
    with pytest.raises(UsageError, match="pass frame_size="):
        DeltaWorld.from_pretrained(copied / "world-model", device="cpu", **given)
    caplog.clear()
    DeltaWorld.from_pretrained(copied / "world-model", device="cpu", frame_size=SIZE, **given)
    assert caplog.text.count("not checked") == 2


def test_a_learned_query_gives_one_future(run: Path, frames: NDArray[np.uint8]) -> None:
    world = DeltaWorld.from_pretrained(run / "discriminative", device="cpu")
    futures = world.predict(frames, fps=5, num_samples=20)
    assert futures.tokens.shape == (1, STEPS, WIDTH)
    assert futures.spread.abs().max() == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda w, f: w.predict(f), "pass either times_s"),
        (lambda w, f: w.predict(f, fps=5, times_s=range(7)), "pass either times_s"),
        (lambda w, f: w.predict(f, fps=0), "fps: got 0"),
        (lambda w, f: w.predict(f, times_s=[0.0, 1.0]), "one for each"),
        (lambda w, f: w.predict(f, times_s=[0, 1, 1, 2, 3, 4, 5]), "and increasing"),
        (lambda w, f: w.predict(f / 255.0, fps=5), "got float64"),
        (lambda w, f: w.predict(f.transpose(0, 3, 1, 2), fps=5), "wanted uint8"),
        (lambda w, f: w.predict(f[:0], fps=5), "wanted uint8"),
        (lambda w, f: w.predict(f, fps=5, horizon_s=0), "horizon_s: got 0"),
        (lambda w, f: w.predict(f, fps=5, num_samples=0), "num_samples: got 0"),
        (lambda w, f: w.predict(f, fps=5, at_s=9.0), "at_s: got 9"),
        (lambda w, f: w.predict("no/such.mp4"), "no/such.mp4"),
        (lambda w, f: w.predict([f[0], f[0, :3]], fps=5), "frames of one size"),
        (lambda w, f: w.stream().add(f[0], float("nan")), "time_s: got nan"),
        (lambda w, f: w.stream().add(f[0], float("inf")), "time_s: got inf"),
        (lambda w, f: w.save_pretrained(__file__), "cannot be made"),
        (
            lambda w, f: w.predict(f, fps=5, num_samples=1).save_mp4(Path(__file__) / "film.mp4"),
            "cannot be written",
        ),
        (lambda w, f: w.stream().predict(), "call add"),
    ],
)
def test_what_cannot_be_predicted_is_said(
    world: DeltaWorld,
    frames: NDArray[np.uint8],
    call: Callable[[DeltaWorld, Any], Futures],
    text: str,
) -> None:
    with pytest.raises(UsageError, match=text):
        call(world, frames)


def test_a_stream_refuses_a_frame_of_another_size(
    world: DeltaWorld, frames: NDArray[np.uint8]
) -> None:
    state = world.stream()
    state.add(frames[0], 1.0)
    with pytest.raises(UsageError, match="got 20x60 pixels after 40x60"):
        state.add(frames[1, ::2], 2.0)


def test_a_film_is_mp4_or_gif(world: DeltaWorld, frames: NDArray[np.uint8], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"film\.avi: wanted"):
        world.predict(frames, fps=5, num_samples=1).save_mp4(tmp_path / "film.avi")


def test_a_stream_refuses_a_frame_out_of_time(world: DeltaWorld, frames: NDArray[np.uint8]) -> None:
    state = world.stream()
    state.add(frames[0], 1.0)
    with pytest.raises(UsageError, match="time_s: got 1 after 1"):
        state.add(frames[1], 1.0)


@pytest.mark.parametrize("content", [b"no video", b""])
def test_a_broken_video_says_so(world: DeltaWorld, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.mp4").write_bytes(content)
    with pytest.raises(DeltatokError, match=r"broken\.mp4: cannot be decoded"):
        world.predict(tmp_path / "broken.mp4")


def test_a_time_outside_a_video_is_no_fault_of_the_video(
    world: DeltaWorld, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    write_video(tmp_path / "clip.mkv", frames, fps=5)
    with pytest.raises(UsageError, match=r"^at_s: got 9, wanted a time in the video, 0-1\.2 s"):
        world.predict(tmp_path / "clip.mkv", at_s=9.0)


def test_a_folder_of_several_videos_is_refused(world: DeltaWorld, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match="2 videos, wanted one"):
        world.predict(tmp_path)


@pytest.mark.parametrize("show", [None, "features"])
def test_grid_and_films_are_written(
    world: DeltaWorld, frames: NDArray[np.uint8], tmp_path: Path, show: str | None
) -> None:
    futures = world.predict(frames, fps=5, at_s=0.6, num_samples=5)
    with Image.open(futures.save_grid(tmp_path / "new" / "grid.png", show=show)) as grid:
        assert grid.format == "PNG"
        assert grid.width > 7 * 112 * 60 / 40
    with Image.open(futures.save_mp4(tmp_path / "film.gif", show=show)) as film:
        assert getattr(film, "n_frames", 1) == 7
    with av.open(str(futures.save_mp4(tmp_path / "film.mp4", show=show))) as container:
        shown = list(container.decode(video=0))
    assert len(shown) == 10  # the last one stands for four steps
    assert not list(tmp_path.glob("*.partial*"))


def test_depths_share_one_scale(
    run: Path, frames: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DepthHead(DepthHeadConfig(in_size=WIDTH)).save_pretrained(tmp_path / "depth", {})
    world = DeltaWorld.from_pretrained(run, head=tmp_path / "depth", device="cpu")
    tops = []
    monkeypatch.setattr(
        panels, "heat_tile", lambda v, top: tops.append(top) or heat_tile(v, top=top)
    )
    futures = world.predict(frames, fps=5, num_samples=3)
    futures.save_grid(tmp_path / "grid.png", num_samples=3)
    assert len(tops) == 4 * STEPS  # three samples and their mean
    assert len(set(tops)) == 1
    assert tops[0] == float(futures.read(futures.last[None]).max())


def test_a_head_is_asked_for_where_there_is_none(copied: Path, frames: NDArray[np.uint8]) -> None:
    shutil.rmtree(copied / "head")
    futures = DeltaWorld.from_pretrained(copied, device="cpu").predict(frames, fps=5)
    with pytest.raises(UsageError, match="pass head="):
        _ = futures.outputs
    with pytest.raises(UsageError, match="pass head="):
        futures.save_grid("grid.png", show="head")


def test_the_most_different_samples_are_spread_out() -> None:
    samples = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 0.0], [0.0, -7.0], [0.1, 0.0]])
    assert most_diverse(samples, 3) == [1, 3, 2]
    assert most_diverse(torch.ones(4, 2), 3) == [0]
