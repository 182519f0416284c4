"""`deltatok-pipeline init`: a commented pipeline file for one's own videos, sized to the machine.

Nothing is trained or extracted. A few videos are opened, to see that they can be read; the device's
memory, the free disk and the number of clips decide the rest. What was decided, and why, stands in
the file's comments:

    FILE.yaml       for `deltatok-pipeline run FILE.yaml`
    FILE.train.txt  keys of the clips that train, one a line; the validation's extraction leaves
                    them out
    FILE.val.txt    likewise the other way round
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
import yaml

from ..extract.decoding.clip import opened_clip
from ..extract.decoding.container import VideoFile, read_index
from ..extract.sources.clip import Clip
from ..extract.sources.find import find_clips
from ..shards.errors import ClipError, UsageError
from ..shards.files import write_bytes
from ..shards.plan import plan_order
from ..shards.running.devices import choose_device
from .cli import read_yaml

SizeName = Literal["small", "base", "released"]
NUM_FRAMES = 8
PATCH = 16
"""Pixels a side of DINOv3's patches."""
MAX_WINDOWS = 16
"""Windows a clip: more did not help on the little world (docs/experiments.md)."""
DISK_SHARE = 0.6
"""Of the free disk, for patch tokens; the rest is for checkpoints and other people (a guess)."""
VAL_SHARE, MAX_VAL = 0.1, 200
"""Clips kept for validation: at least one."""
PROBED = 8
WIDTHS = {"vits16": 384, "vitb16": 768, "vitl16": 1024, "vith16plus": 1280, "vit7b16": 4096}
"""Hidden size by the name of DINOv3's models on the hub."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What `--size` stands for."""

    gpu_gb: float
    """Memory of the GPU that it takes; 0: a CPU will do."""
    memory_gb: float
    """Main memory that it takes (a guess)."""
    frame_sizes: tuple[int, ...]
    """Pixels, an extraction each; the last is evaluated."""
    tokenizers: tuple[str, ...]
    """Files of configs/tokenizer, each trained on from the one before."""
    worlds: tuple[str, ...]
    """Likewise of configs/world."""
    note: str


SIZES: dict[SizeName, Size] = {
    "small": Size(
        gpu_gb=0,
        memory_gb=3,
        frame_sizes=(128,),
        tokenizers=("first-look",),
        worlds=("first-look",),
        note="a first look: 128 px, small models; hours on a CPU, minutes on a GPU",
    ),
    "base": Size(
        gpu_gb=20,
        memory_gb=12,
        frame_sizes=(256,),
        tokenizers=("one-24gb-256",),
        worlds=("one-24gb",),
        note="models of the released size, 256 px, a shorter schedule; about a day on 24 GB",
    ),
    "released": Size(
        gpu_gb=75,
        memory_gb=24,
        frame_sizes=(256, 512),
        tokenizers=(
            "released-256",
            "released-512",
            "released-512-cooldown-1",
            "released-512-cooldown-2",
        ),
        worlds=("released", "released-cooldown"),
        note="the released schedule, 256 and 512 px; hundreds of hours of an H200",
    ),
}


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """deltatok-pipeline init: a pipeline file for one's own videos."""

    videos: tuple[str, ...]
    """Videos, folders, lists, archives: as for `deltatok-extract --videos`."""
    file: str = "mine.yaml"
    """The pipeline file to write; it must not be there yet."""
    backbone: str = "facebook/dinov3-vitb16-pretrain-lvd1689m"
    """DINOv3: hub id or local folder."""
    size: SizeName | None = None
    """By default the larger of small and base that the machine holds."""
    out: str | None = None
    """Folder of all results [runs/ and the file's name]."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N."""


def init_pipeline(config: InitConfig) -> Path:
    """Write the file and its two lists; give the file's path.

    Raises UsageError: no videos, none that can be read, the file is there already, or a machine
    that is too small: the message says what is missing and what would fit.
    """
    file = Path(config.file)
    lists = {part: file.with_suffix(f".{part}.txt") for part in ("train", "val")}
    for path in (file, *lists.values()):
        if path.exists():
            raise UsageError(f"{path}: is there already: give another --file, or move it away")
    clips = find_clips(config.videos)
    if len(clips) < 2:
        raise UsageError(
            f"{' '.join(config.videos)}: one clip, wanted at least two: one to train on, one to "
            "validate with"
        )
    shape = _probe(clips)
    order = plan_order([clip.key for clip in clips], seed=0)
    num_val = min(MAX_VAL, max(1, round(VAL_SHARE * len(order))))
    parts = {"val": order[:num_val], "train": order[num_val:]}
    counts = (len(order) - num_val, num_val)
    out, width = config.out or f"runs/{file.stem}", backbone_width(config.backbone)
    name = _size_that_fits(config)
    windows, dtype = _storage(out, SIZES[name], counts, width)
    patch_gb = _patch_bytes(SIZES[name], counts, windows, dtype, width) / 1e9
    head = [
        f"Made by: deltatok-pipeline init --videos {' '.join(config.videos)}",
        f"Start it with: deltatok-pipeline run {file}    (again after any stop: it goes on)",
        "",
        f"size {name}: {SIZES[name].note}.",
        f"clips: {counts[0]} train, {num_val} validate ({lists['train'].name}, "
        f"{lists['val'].name}); {shape}.",
        f"storage: {windows} windows a clip of {NUM_FRAMES} frames as {dtype}: about "
        f"{patch_gb:,.1f} GB of patch tokens below {out}.",
        f"what is done and what would run: deltatok-pipeline plan {file}",
    ]
    text = "".join(f"# {line}".rstrip() + "\n" for line in head)
    text += f"out: {out}\ngigabytes: {patch_gb:.2g}\nstages:\n"
    for comment, stage in _stages(config, SIZES[name], windows, dtype, width, counts[0], lists):
        first, *rest = yaml.safe_dump(
            stage, sort_keys=False, allow_unicode=True, width=1000
        ).splitlines()
        text += "\n".join([f"  # {comment}", f"  - {first}", *(f"    {line}" for line in rest)])
        text += "\n\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    for part, path in lists.items():
        write_bytes(path, "".join(f"{key}\n" for key in sorted(parts[part])).encode())
    write_bytes(file, text.rstrip("\n").encode() + b"\n")
    return file


def backbone_width(backbone: str) -> int:
    """Channels of a token: of a folder's config.json, else by the hub id's name."""
    file = Path(backbone) / "config.json"
    if file.is_file():
        try:
            return int(json.loads(file.read_text(encoding="utf-8"))["hidden_size"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(f"--backbone {backbone}: config.json has no hidden_size") from error
    for name, width in WIDTHS.items():
        if f"-{name}-" in f"{backbone}-":
            return width
    raise UsageError(
        f"--backbone {backbone}: is no folder with a config.json, and not the id of a DINOv3 model "
        f"with patches of {PATCH} pixels (…-{'-, -'.join(WIDTHS)}-…)"
    )


def _size_that_fits(config: InitConfig) -> SizeName:
    """The size asked for, or the largest but the released one; UsageError if it does not fit."""
    gpu_gb, memory_gb = _gpu_bytes(config.device) / 1e9, psutil.virtual_memory().total / 1e9
    lacking: dict[SizeName, str] = {}
    for name, size in SIZES.items():
        lacks = []
        if size.memory_gb > memory_gb:
            lacks.append(f"{size.memory_gb} GB of main memory, there are {memory_gb:.1f}")
        if size.gpu_gb > gpu_gb:
            there = f"this one has {gpu_gb:.0f} GB" if gpu_gb else "there is none"
            lacks.append(f"a GPU of {size.gpu_gb:.0f} GB, {there}")
        if lacks:
            lacking[name] = " and ".join(lacks)
    fits: list[SizeName] = [name for name in SIZES if name not in lacking]
    if not fits:
        raise UsageError(
            f"this machine is too small for any size: --size small wants {lacking['small']}: "
            "run it on a larger machine"
        )
    if config.size in lacking:
        raise UsageError(
            f"--size {config.size}: wants {lacking[config.size]}: --size {fits[-1]} fits"
        )
    return config.size or ("base" if "base" in fits else "small")


def _gpu_bytes(device: str) -> float:
    chosen = choose_device(device)
    if chosen.type != "cuda":
        return 0.0
    return float(torch.cuda.get_device_properties(chosen).total_memory)


def _probe(clips: Sequence[Clip]) -> str:
    """What some of the clips are like; UsageError if none can be opened."""
    reasons, seconds, heights, num_images = [], [], [], 0
    chosen = np.linspace(0, len(clips) - 1, min(PROBED, len(clips))).astype(int)
    for clip in (clips[number] for number in chosen):
        try:
            with opened_clip(clip) as opened:
                if not isinstance(opened, VideoFile):
                    num_images += 1
                    continue
                index = read_index(opened)
        except ClipError as error:
            reasons.append(f"{clip.key}: {error}")
            continue
        seconds.append(float(index.times_s[-1] - index.times_s[0]))
        heights.append(index.first_frame.shape[0])
    if num_images and not seconds:
        return "folders of frames, not probed"
    if not seconds:
        raise UsageError(f"none of {len(reasons)} videos that were tried can be read: {reasons[0]}")
    bad = f", {len(reasons)} of {len(chosen)} tried cannot be read" if reasons else ""
    return f"about {np.median(seconds):.1f} s long, {np.median(heights):.0f} pixels high{bad}"


def _patch_bytes(
    size: Size, counts: tuple[int, int], windows: int, dtype: str, width: int
) -> float:
    """Of the patch tokens of all extractions; counts: clips that train and that validate."""
    token_bytes = width + 2 if dtype == "int8" else 2 * width
    tokens = [NUM_FRAMES * (pixels // PATCH) ** 2 for pixels in size.frame_sizes]
    # Of the validation about one window a clip: its length is not known.
    return counts[0] * windows * sum(tokens) * token_bytes + counts[1] * tokens[-1] * 2 * width


def _storage(out: str, size: Size, counts: tuple[int, int], width: int) -> tuple[int, str]:
    """Windows a clip and storage type for which there is room."""
    place = next(p for p in (Path(out), *Path(out).absolute().parents) if p.is_dir())
    room = DISK_SHARE * shutil.disk_usage(place).free
    for dtype, least in (("float16", 4), ("int8", 1)):
        one = _patch_bytes(size, counts, 1, dtype, width)
        if one * least <= room:
            return min(MAX_WINDOWS, int(room / one)), dtype
    raise UsageError(
        f"--out {out}: {room / 1e9:.1f} GB for patch tokens, one window of each of {counts[0]} "
        f"clips takes {one / 1e9:.1f} GB even as int8: give --out on a larger disk, a smaller "
        f"--size, or videos of {int(counts[0] * room / one)} clips at most"
    )


def _stages(
    config: InitConfig,
    size: Size,
    windows: int,
    dtype: str,
    width: int,
    num_train: int,
    lists: Mapping[str, Path],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(comment, stage) in the order they run."""
    videos: dict[str, Any] = {"videos": list(config.videos), "backbone": config.backbone}
    videos["device"] = config.device
    for pixels in size.frame_sizes:
        name = "patches" if pixels == size.frame_sizes[-1] else f"patches-{pixels}"
        settings = videos | {"out": f"${{out}}/{name}", "exclude": str(lists["val"])}
        settings |= {"frame_size": pixels, "num_windows": windows, "num_frames": NUM_FRAMES}
        comment = f"the frozen backbone, once: {windows} windows of each training clip"
        yield comment, _stage(name, "deltatok-extract", settings | {"dtype": dtype})
    # A clip or a hundredth of them validates; a batch takes at most half of what is left.
    most = max(1, windows * (num_train - max(1, num_train // 100)) // 2 or windows)
    trained: list[str] = []
    for kind, files in (("tokenizer", size.tokenizers), ("world", size.worlds)):
        for number, file in enumerate(files, 1):
            settings = read_yaml(Path(f"configs/{kind}/{file}.yaml"))
            at_most = most * (NUM_FRAMES - 1) if kind == "tokenizer" else most
            settings["batch_size"] = min(settings["batch_size"], at_most)
            settings["device"] = config.device
            if number > 1:
                settings["start_from"] = trained[-1]
            is_last = number == len(files)
            trained.append(f"${{out}}/{kind}" if is_last else f"${{out}}/{kind}-{number}")
            settings["out"] = trained[-1]
            if kind == "world":
                comment = "what may come next: trained on delta tokens alone"
                settings["deltas"] = "${out}/deltas"
            else:
                comment = "one delta token a frame"
                first = len(size.frame_sizes) > 1 and file.endswith(f"-{size.frame_sizes[0]}")
                settings["patches"] = "${out}/patches" + f"-{size.frame_sizes[0]}" * first
                if is_last:
                    comment += "; writes the delta tokens of all windows when it ends"
                    settings["deltas"] = "${out}/deltas"
                # 64 channels a head, as released; fewer where the width is no multiple of it.
                heads = [width // size for size in (64, 48, 32, 16, 8) if width % size == 0]
                settings["model"]["num_attention_heads"] = (heads or [1])[0]
            name = Path(settings["out"]).name
            yield comment, _stage(name, f"deltatok-train {kind}", settings)
    yield (
        "evaluation: whole frames of the validation clips at a fixed rate",
        _stage(
            "val-patches",
            "deltatok-extract",
            videos
            | {
                "out": "${out}/val-patches",
                "exclude": str(lists["train"]),
                "frame_size": size.frame_sizes[-1],
                "sampling": "uniform",
                "fps": 5,
                "num_frames": 7,
            },
        ),
    )
    yield (
        "forecasts beside the truth: ${out}/report/report.html",
        _stage(
            "report",
            "deltatok-evaluate forecast",
            {
                "patches": "${out}/val-patches",
                "tokenizer": "${out}/tokenizer",
                "world": "${out}/world",
                "dataset": "mine",
                "videos": list(config.videos),
                "curves": trained,
                "device": config.device,
                "out": "${out}/report",
            },
        ),
    )


def _stage(name: str, command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """With the paths first, to be found by people."""
    paths = {
        key: settings[key] for key in ("videos", "patches", "deltas", "out") if key in settings
    }
    return {"name": name, "command": command, "settings": paths | dict(settings)}
