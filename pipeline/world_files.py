"""Write the little world to disk: mp4 clips, exact labels, and what could have happened.

OUT/world.json                 settings, class names, written last (the done-mark)
OUT/train/NNNN.mp4             clips without labels (H.264, 4:2:0)
OUT/head/NNNN.mp4              clips to fit the head on
OUT/val/NNNN.mp4               clips to evaluate on
OUT/labels/head/NNNN.mp4.npy   uint8 (frames, H, W): 0 ground, 1 disc, 2 square, 3 triangle
OUT/labels/val/NNNN.mp4.npy
OUT/futures/NNNN.json          val clips: kind and every possible future after the context
"""

import json
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..shards.errors import CacheMismatch
from ..shards.files import partial_path, publish, write_json
from .config import as_plain
from .little_world import (
    CLASS_NAMES,
    SHAPE_COLOURS,
    LittleWorldConfig,
    Walker,
    draw_ground,
    draw_mask,
    futures,
    next_tick,
    position_at,
    simulate,
)

CONTEXT_TICKS = 3  # the last of 4 context frames is at tick 3
SPLITS = ("train", "head", "val")
HORIZON_TICKS = 3  # mid-term: 3 steps of one tick


def make_little_world(config: LittleWorldConfig) -> Path:
    """Write the world into `config.out` and give that folder; a finished one is left as it is.

    Raises:
        CacheMismatch: the folder holds a world made with other settings.
    """
    out = Path(config.out)
    settings = {key: value for key, value in as_plain(config).items() if key != "out"}
    done = out / "world.json"
    if done.exists():
        _same_settings(json.loads(done.read_text(encoding="utf-8"))["settings"], settings, out)
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
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index])
    labelled = split != "train"
    duration = config.labelled_duration_s if labelled else config.train_duration_s
    path = simulate(config, rng, duration)
    frames, labels = render(config, rng, path, round(duration * config.fps))
    name = f"{index:04d}.mp4"
    _write_mp4(out / split / name, frames, config.fps)
    if labelled:
        _write_npy(out / "labels" / split / f"{name}.npy", labels)
    if split == "val":
        write_json(_made(out / "futures" / f"{index:04d}.json"), _what_could_happen(config, path))


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


def _what_could_happen(config: LittleWorldConfig, path: list[Walker]) -> dict[str, object]:
    """All futures of the walker as it stands at the last context frame, before its decision."""
    before = next_tick(config, path[CONTEXT_TICKS - 1])
    ways = [
        {"probability": probability, "positions_xy": positions}
        for probability, positions in futures(config, before, HORIZON_TICKS)
    ]
    return {"kind": path[0].kind, "radius": config.radius, "futures": ways}


def _write_mp4(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    partial = partial_path(_made(path))
    options = {"crf": "12", "preset": "veryfast", "threads": "1"}
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
