"""Write the little world to disk: mp4 clips, exact labels, and what could have happened.

OUT/world.json                 settings, class names, written last (the done-mark)
OUT/train/NNNN.mp4             clips without labels (H.264, 4:2:0)
OUT/head/NNNN.mp4              clips to fit the head on
OUT/val/NNNN.mp4               clips to evaluate on
OUT/labels/head/NNNN.mp4.npy   uint8 (frames, H, W): 0 ground, 1 disc, 2 square, 3 triangle
OUT/labels/val/NNNN.mp4.npy
OUT/futures/NNNN.mp4.npz       val clips: every possible target frame of both horizons, with its
                               probability given the context frames (evaluate/forecast/modes.py)
"""

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ...evaluate.forecast.modes import write_futures
from ...shards.errors import CacheMismatch
from ...shards.files import partial_path, publish, write_json
from ...shards.schema import read_json
from ..cli import as_plain
from .simulation import (
    BACKGROUND,
    CLASS_NAMES,
    SHAPE_COLOURS,
    LittleWorldConfig,
    Walker,
    draw_ground,
    draw_mask,
    position_at,
    seen_futures,
    simulate,
)

SPLITS = ("train", "head", "val")
NUM_CONTEXT = 4
"""Frames seen before a forecast, a tick apart, as the protocol has it."""
TARGET_TICK = 6
HORIZON_TICKS = (1, 3)
"""Ticks from the last frame seen to the target, short and mid."""


def make_little_world(config: LittleWorldConfig) -> Path:
    """Write the world into `config.out` and give that folder; a finished one is left as it is.

    Raises:
        CacheMismatch: the folder holds a world made with other settings.
    """
    out = Path(config.out)
    settings = {key: value for key, value in as_plain(config).items() if key != "out"}
    done = out / "world.json"
    if done.exists():
        _same_settings(read_json(done)["settings"], settings, out)
        for index in range(config.num_val_clips):  # a world of an earlier version has none
            if not (out / "futures" / f"{_name(index)}.npz").exists():
                _write_futures(config, out, index, _simulate(config, "val", index)[1])
        return out
    jobs = [("train", i) for i in range(config.num_train_clips)]
    jobs += [("head", i) for i in range(config.num_head_clips)]
    jobs += [("val", i) for i in range(config.num_val_clips)]
    for split, index in tqdm(jobs, desc="little world", unit="clip"):
        _write_clip(config, out, split, index)
    write_json(done, {"settings": settings, "class_names": list(CLASS_NAMES)})
    return out


def _same_settings(found: dict[str, object], wanted: dict[str, object], out: Path) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            raise CacheMismatch(
                f"{out}: a little world made with {key} {found.get(key)!r}, wanted {value!r}; "
                "give another --out or remove the folder"
            )


def _write_clip(config: LittleWorldConfig, out: Path, split: str, index: int) -> None:
    rng, path = _simulate(config, split, index)
    frames, labels = render(config, rng, path, round(_duration_s(config, split) * config.fps))
    name = _name(index)
    write_mp4(out / split / name, frames, config.fps)
    if split != "train":
        _write_npy(out / "labels" / split / f"{name}.npy", labels)
    if split == "val":
        _write_futures(config, out, index, path)


def _simulate(
    config: LittleWorldConfig, split: str, index: int
) -> tuple[np.random.Generator, list[Walker]]:
    """The walk of a clip, and the generator that draws the rest of it."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index])
    return rng, simulate(config, rng, _duration_s(config, split))


def _duration_s(config: LittleWorldConfig, split: str) -> float:
    return config.train_duration_s if split == "train" else config.labelled_duration_s


def _name(index: int) -> str:
    return f"{index:04d}.mp4"


def render(
    config: LittleWorldConfig, rng: np.random.Generator, path: list[Walker], num_frames: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Frames uint8 (F, H, W, 3) and labels uint8 (F, H, W) of a simulated path."""
    ground, kind = draw_ground(config, rng), path[0].kind
    colour = np.array(SHAPE_COLOURS[kind - 1], np.float32)
    frames = np.empty((num_frames, *ground.shape), np.uint8)
    labels = np.empty((num_frames, *ground.shape[:2]), np.uint8)
    for i in range(num_frames):
        mask = draw_mask(config, kind, position_at(config, path, i / config.fps))
        picture = ground + mask[:, :, None] * (colour - ground)
        frames[i] = np.rint(picture).astype(np.uint8)
        labels[i] = np.where(mask >= 0.5, kind, 0)
    return frames, labels


def _write_futures(config: LittleWorldConfig, out: Path, index: int, path: list[Walker]) -> None:
    """What can come after the context frames of both horizons, which end at one target; nothing
    for clips that end before it."""
    if _frame_at(config, TARGET_TICK) >= round(config.labelled_duration_s * config.fps):
        return
    known = {}
    for ticks in HORIZON_TICKS:
        last = TARGET_TICK - ticks
        first = last - NUM_CONTEXT + 1
        frames = (_frame_at(config, last), _frame_at(config, TARGET_TICK))
        known[frames] = seen_futures(config, path, first_tick=first, last_tick=last, ticks=ticks)
    write_futures(out / "futures", _name(index), known, background=BACKGROUND)


def _frame_at(config: LittleWorldConfig, tick: int) -> int:
    return round(tick * config.tick_s * config.fps)


def write_mp4(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    """The same frames, the same bytes. x264's mbtree would choose now and then otherwise."""
    partial = partial_path(_made(path))
    options = {"crf": "12", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
    with av.open(str(partial), mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    publish(partial, path)


def _write_npy(path: Path, array: NDArray[np.uint8]) -> None:
    partial = partial_path(_made(path))
    with partial.open("wb") as file:
        np.save(file, array)
    publish(partial, path)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
