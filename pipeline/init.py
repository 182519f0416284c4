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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml

from ..extract.decoding.container import read_index
from ..extract.sources.clip import Clip
from ..extract.sources.find import find_clips
from ..shards.devices import choose_device
from ..shards.errors import ClipError, UsageError
from ..shards.files import write_bytes
from ..shards.plan import plan_order
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
SMALL_TOKENIZER = {
    "steps": 2000,
    "batch_size": 32,
    "lr": 1.0e-3,
    "warmup_steps": 100,
    "eval_every": 200,
    "save_every": 200,
    "model": {
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "intermediate_size": 1024,
        "layer_scale_init": 0.1,
    },
}
SMALL_WORLD = {
    "steps": 3000,
    "batch_size": 64,
    "lr": 5.0e-4,
    "warmup_steps": 100,
    "eval_every": 300,
    "save_every": 300,
    "model": {
        "predictor_hidden_size": 256,
        "predictor_num_hidden_layers": 4,
        "predictor_num_heads": 4,
        "rope_axis_sizes": [60],
        "rope_unrotated_size": 4,
        "num_samples_train": 16,
        "layer_scale_init": 0.1,
    },
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A training stage of a size."""

    name: str
    settings: str | Mapping[str, Any]
    """The settings themselves, or a file of configs/ that has them."""
    start_from: str | None = None
    """The stage whose model it goes on with."""
    patches: str = "patches"
    """The extraction it reads; of world models, that its delta tokens come from."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What `--size` stands for."""

    gpu_bytes: float
    """Memory of the GPU that it takes; 0: a CPU will do."""
    frame_sizes: tuple[int, ...]
    """Pixels, an extraction each; the last is evaluated."""
    tokenizers: tuple[Stage, ...]
    worlds: tuple[Stage, ...]
    note: str


def _released(kind: str, stages: Sequence[str]) -> tuple[Stage, ...]:
    made: list[Stage] = []
    for number, stage in enumerate(stages):
        made.append(
            Stage(
                name=f"{kind}-{number + 1}" if number < len(stages) - 1 else kind,
                settings=f"configs/{kind}/{stage}.yaml",
                start_from=made[-1].name if made else None,
                patches="patches-256" if stage.endswith("256") else "patches",
            )
        )
    return tuple(made)


SIZES: dict[SizeName, Size] = {
    "small": Size(
        gpu_bytes=0,
        frame_sizes=(128,),
        tokenizers=(Stage(name="tokenizer", settings=SMALL_TOKENIZER),),
        worlds=(Stage(name="world", settings=SMALL_WORLD),),
        note="a first look: 128 px, small models; hours on a CPU, minutes on a GPU",
    ),
    "base": Size(
        gpu_bytes=20e9,
        frame_sizes=(256,),
        tokenizers=(Stage(name="tokenizer", settings="configs/tokenizer/one-24gb-256.yaml"),),
        worlds=(Stage(name="world", settings="configs/world/one-24gb.yaml"),),
        note="models of the released size, 256 px, a shorter schedule; about a day on 24 GB",
    ),
    "released": Size(
        gpu_bytes=75e9,
        frame_sizes=(256, 512),
        tokenizers=_released(
            "tokenizer",
            ("released-256", "released-512", "released-512-cooldown-1", "released-512-cooldown-2"),
        ),
        worlds=_released("world", ("released", "released-cooldown")),
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
    """small | base | released; by default the largest of small and base that the machine holds."""
    out: str | None = None
    """Folder of all results [runs/ and the file's name]."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N."""


def init_pipeline(config: InitConfig) -> Path:
    """Write the file and its two lists; give the file's path.

    Raises UsageError: no videos, none that can be read, the file is there already, or a machine
    that is too small: the message says what would fit.
    """
    file = Path(config.file)
    lists = {part: file.with_suffix(f".{part}.txt") for part in ("train", "val")}
    for path in (file, *lists.values()):
        if path.exists():
            raise UsageError(f"{path}: is there already: give another --file, or move it away")
    clips = find_clips(config.videos)
    shape = _probe(clips)
    order = plan_order([clip.key for clip in clips], seed=0)
    num_val = min(MAX_VAL, max(1, round(VAL_SHARE * len(order))))
    parts = {"val": order[:num_val], "train": order[num_val:]}
    if not parts["train"]:
        raise UsageError(
            f"{' '.join(config.videos)}: one clip, wanted at least two: one to train on, one to "
            "validate with"
        )
    out = config.out or f"runs/{file.stem}"
    memory = _gpu_bytes(config.device)
    name = config.size or ("base" if memory >= SIZES["base"].gpu_bytes else "small")
    size = SIZES[name]
    if memory < size.gpu_bytes:
        fits = [other for other, it in SIZES.items() if it.gpu_bytes <= memory]
        have = f"the GPU has {memory / 1e9:.0f} GB" if memory else "there is no GPU"
        raise UsageError(
            f"--size {name}: wants a GPU of {size.gpu_bytes / 1e9:.0f} GB, {have}: "
            f"--size {fits[-1]} fits"
        )
    width = backbone_width(config.backbone)
    windows, dtype = _storage(
        out, size, num_train=len(parts["train"]), num_val=num_val, width=width
    )
    stages = _stages(config, out, size, windows=windows, dtype=dtype, width=width, lists=lists)
    head = [
        f"Made by: deltatok-pipeline init --videos {' '.join(config.videos)}",
        f"Start it with: deltatok-pipeline run {file}    (again after any stop: it goes on)",
        "",
        f"size {name}: {size.note}.",
        f"clips: {len(parts['train'])} train, {num_val} validate "
        f"({lists['train'].name}, {lists['val'].name}); {shape}.",
        f"storage: {windows} windows a clip of {NUM_FRAMES} frames as {dtype}: about "
        f"{_patch_bytes(size, len(parts['train']), num_val, windows, dtype, width) / 1e9:,.1f} GB "
        f"of patch tokens below {out}.",
        "what it will take, before it runs: add --plan to a stage's own command, or look at",
        f"`deltatok-pipeline plan {file}`.",
    ]
    text = "".join(f"# {line}".rstrip() + "\n" for line in head)
    text += f"out: {out}\nstages:\n"
    text += "\n".join(_block(comment, stage) for comment, stage in stages)
    file.parent.mkdir(parents=True, exist_ok=True)
    for part, path in lists.items():
        write_bytes(path, "".join(f"{key}\n" for key in sorted(parts[part])).encode())
    write_bytes(file, text.encode())
    return file


def backbone_width(backbone: str) -> int:
    """Channels of a token: of a folder's config.json, else by the hub id's name."""
    file = Path(backbone) / "config.json"
    if file.is_file():
        try:
            width = json.loads(file.read_text(encoding="utf-8"))["hidden_size"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(f"--backbone {backbone}: config.json has no hidden_size") from error
        return int(width)
    for name, width in WIDTHS.items():
        if f"-{name}-" in f"{backbone}-":
            return width
    raise UsageError(
        f"--backbone {backbone}: is no folder with a config.json, and not the id of a DINOv3 model "
        f"with patches of {PATCH} pixels (…-{'-, -'.join(WIDTHS)}-…)"
    )


def _gpu_bytes(device: str) -> float:
    chosen = choose_device(device)
    if chosen.type != "cuda":
        return 0.0
    return float(torch.cuda.get_device_properties(chosen).total_memory)


def _probe(clips: Sequence[Clip]) -> str:
    """What some of the clips are like; UsageError if none can be opened."""
    videos = [clip for clip in clips if isinstance(clip.path, Path) and clip.path.is_file()]
    if not videos:
        return "not probed (archives or folders of frames)"
    reasons, seconds, heights = [], [], []
    chosen = np.linspace(0, len(videos) - 1, min(PROBED, len(videos))).astype(int)
    for clip in (videos[number] for number in chosen):
        try:
            index = read_index(clip.path)
        except ClipError as error:
            reasons.append(f"{clip.key}: {error}")
            continue
        seconds.append(float(index.times_s[-1] - index.times_s[0]))
        heights.append(index.first_frame.shape[0])
    if not seconds:
        raise UsageError(f"none of {len(reasons)} videos that were tried can be read: {reasons[0]}")
    bad = f", {len(reasons)} of {len(chosen)} tried cannot be read" if reasons else ""
    return f"about {np.median(seconds):.1f} s long, {np.median(heights):.0f} pixels high{bad}"


def _frame_bytes(frame_size: int, dtype: str, width: int) -> float:
    tokens = (frame_size // PATCH) ** 2
    return tokens * (width + 2 if dtype == "int8" else 2 * width)


def _patch_bytes(
    size: Size, num_train: int, num_val: int, windows: int, dtype: str, width: int
) -> float:
    train = sum(
        num_train * windows * NUM_FRAMES * _frame_bytes(pixels, dtype, width)
        for pixels in size.frame_sizes
    )
    val = num_val * NUM_FRAMES * _frame_bytes(size.frame_sizes[-1], "float16", width)
    return train + val  # of the validation about one window a clip: its length is not known


def _storage(
    out: str, size: Size, *, num_train: int, num_val: int, width: int
) -> tuple[int, Literal["float16", "int8"]]:
    """Windows a clip and storage type for which there is room."""
    place = Path(out).absolute()
    while not place.exists():
        place = place.parent
    room = DISK_SHARE * shutil.disk_usage(place).free
    for dtype in ("float16", "int8"):
        one = _patch_bytes(size, num_train, num_val, 1, dtype, width)
        least = 4 if dtype == "float16" else 1
        if one * least <= room:
            return min(MAX_WINDOWS, int(room / one)), dtype
    fit = int(num_train * room / one)
    raise UsageError(
        f"--out {out}: {room / 1e9:.1f} GB for patch tokens, one window of each of {num_train} "
        f"clips takes {one / 1e9:.1f} GB even as int8: give --out on a larger disk, a smaller "
        f"--size, or videos of {fit} clips at most"
    )


def _stages(
    config: InitConfig,
    out: str,
    size: Size,
    *,
    windows: int,
    dtype: str,
    width: int,
    lists: Mapping[str, Path],
) -> list[tuple[str, dict[str, Any]]]:
    """(comment, stage) in the order they run."""
    stages: list[tuple[str, dict[str, Any]]] = []

    def add(name: str, command: str, comment: str, settings: Mapping[str, Any]) -> None:
        stages.append((comment, {"name": name, "command": command, "settings": dict(settings)}))

    videos = {"videos": list(config.videos), "backbone": config.backbone, "device": config.device}
    for pixels in size.frame_sizes:
        last = pixels == size.frame_sizes[-1]
        name = "patches" if last else f"patches-{pixels}"
        add(
            name,
            "deltatok-extract",
            f"the frozen backbone, once: {windows} windows of each training clip",
            videos
            | {
                "out": f"${{out}}/{name}",
                "exclude": str(lists["val"]),
                "frame_size": pixels,
                "num_windows": windows,
                "num_frames": NUM_FRAMES,
                "dtype": dtype,
            },
        )
    for stage in size.tokenizers:
        last = stage is size.tokenizers[-1]
        paths = {"patches": f"${{out}}/{stage.patches}", "out": f"${{out}}/{stage.name}"}
        comment = "one delta token a frame"
        if last:
            paths["deltas"] = "${out}/deltas"
            comment += "; writes the delta tokens of all windows when it ends"
        add(stage.name, "deltatok-train tokenizer", comment, _training(config, stage, paths, width))
    for stage in size.worlds:
        paths = {"deltas": "${out}/deltas", "out": f"${{out}}/{stage.name}"}
        comment = "what may come next: trained on delta tokens alone"
        add(stage.name, "deltatok-train world", comment, _training(config, stage, paths, width))
    add(
        "val-patches",
        "deltatok-extract",
        "evaluation: whole frames of the validation clips at a fixed rate",
        videos
        | {
            "out": "${out}/val-patches",
            "exclude": str(lists["train"]),
            "frame_size": size.frame_sizes[-1],
            "sampling": "uniform",
            "fps": 5,
            "num_frames": 7,
        },
    )
    add(
        "report",
        "deltatok-evaluate forecast",
        "forecasts beside the truth: ${out}/report/report.html",
        {
            "patches": "${out}/val-patches",
            "tokenizer": f"${{out}}/{size.tokenizers[-1].name}",
            "world": f"${{out}}/{size.worlds[-1].name}",
            "dataset": "mine",
            "videos": list(config.videos),
            "curves": [f"${{out}}/{stage.name}" for stage in (*size.tokenizers, *size.worlds)],
            "device": config.device,
            "out": "${out}/report",
        },
    )
    return stages


def _training(
    config: InitConfig, stage: Stage, paths: Mapping[str, str], width: int
) -> dict[str, Any]:
    given = stage.settings
    settings = dict(read_yaml(Path(given)) if isinstance(given, str) else given)
    model = dict(settings.get("model", {}))
    if heads := model.get("num_attention_heads"):  # 64 channels a head, as released
        model["num_attention_heads"] = width // 64 if width % 64 == 0 else heads
    if stage.start_from is not None:
        settings["start_from"] = f"${{out}}/{stage.start_from}"
    return {**paths, "device": config.device, **settings, "model": model}


def _block(comment: str, stage: Mapping[str, Any]) -> str:
    """A stage as an item of the file's list, under its comment."""
    text = yaml.safe_dump(dict(stage), sort_keys=False, allow_unicode=True, width=1000)
    first, *rest = text.splitlines()
    lines = [f"  # {comment}", f"  - {first}", *(f"    {line}" for line in rest)]
    return "\n".join(lines) + "\n"
