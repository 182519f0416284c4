"""`deltatok-evaluate cache-fidelity`: what the storage type of a patch cache costs.

A cache is held against another one of the same windows (same videos, sampling, seed, backbone;
float16, say), window by window: how far the tokens are off, what that does to a tokenizer's
reconstruction and a head's mIoU, and how many bytes a frame takes. No backbone, no network.

Letters: B windows, T frames, N patch tokens of a frame, D channels of a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..shards.cache import compare
from ..shards.errors import UsageError
from ..shards.files import write_json
from ..shards.info import describe_cache
from ..shards.patches import PatchShards
from ..train.devices import precision_name
from ..train.models.deltatok import DeltaTok
from ..train.models.heads import SegmentationHead
from .cache_judges import Judge, Reconstruction, Segmentation, TokenErrors
from .labels import LabelFolder
from .loading import check_patches, check_width
from .pick_device import pick_device
from .same_windows import match_windows

SIDES = ("patches", "reference")

METRICS = {
    "bytes_per_frame": "bytes a frame",
    "relative_error": "relative error",
    "cosine_mean": "cosine of tokens, mean",
    "cosine_min": "cosine of tokens, smallest",
    "error_over_change": "error / change between consecutive frames",
    "reconstruction_loss": "tokenizer: reconstruction loss",
    "miou": "head: mIoU",
}
"""Key in the JSON -> text in the table."""


@dataclass(frozen=True, kw_only=True)
class CacheFidelityConfig:
    """Which two caches, and what to judge them by."""

    patches: str
    """The patch-token cache to judge."""
    reference: str
    """Patch-token cache of the same windows in the storage type to compare with."""
    tokenizer: str | None = None
    """Folder of a tokenizer: adds its reconstruction loss."""
    head: str | None = None
    """Folder of a segmentation head: adds its mIoU; needs labels and uniform caches."""
    labels: str | None = None
    """Folder of labels: CLIP_KEY.npy, uint8 (frames, H, W), 255 = ignore; needs head."""
    out: str | None = None
    """JSON file for the numbers; none: the table only."""
    max_windows: int | None = None
    """Windows looked at, spread evenly over the clips' names; none given: all."""
    batch_windows: int = 4
    """Windows looked at at once: memory, not results, depends on it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: cuda, else mps, else cpu."""
    autocast: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the tokenizer; auto: bfloat16 on cuda, float32 elsewhere."""

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        if (self.head is None) != (self.labels is None):
            given, other = ("head", "labels") if self.labels is None else ("labels", "head")
            raise UsageError(f"--{given} without --{other}: mIoU needs both; give --{other} too")
        for name in ("batch_windows", "max_windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: got {value}, wanted at least 1")


def run_cache_fidelity(config: CacheFidelityConfig) -> dict[str, Any]:
    """Compare; gives, and writes to `config.out`, {"patches": {metric: value}, "reference": {...},
    "windows", "frames", and what the two caches are}.

    Raises CacheMismatch for caches of different windows or a model of other features (names the
    field), UsageError for models or labels that cannot be used.
    """
    device = pick_device(config.device)
    caches = (PatchShards(config.patches), PatchShards(config.reference))
    names = (f"--patches {config.patches}", f"--reference {config.reference}")
    windows = match_windows(*caches, names=names)
    if not len(windows[0]):
        raise UsageError(f"--patches {config.patches}: no windows; see its quarantine.jsonl")
    if config.max_windows is not None and config.max_windows < len(windows[0]):
        chosen = np.linspace(0, len(windows[0]), config.max_windows, endpoint=False).astype(int)
        windows = windows[0][chosen], windows[1][chosen]
    judges = _judges(config, caches[1], device)
    with torch.inference_mode(), tqdm(total=len(windows[0]), unit="window", disable=None) as bar:
        for numbers, ours, theirs in _batches(config, caches, windows):
            for judge in judges:
                judge.add(numbers, ours.to(device), theirs.to(device))
            bar.update(len(numbers))
    found: dict[str, dict[str, float | None]] = {side: {} for side in SIDES}
    for side, cache in zip(SIDES, caches, strict=True):
        described = describe_cache(cache.folder)
        frames = described["windows"] * cache.shape[0]
        found[side]["bytes_per_frame"] = described["bytes"] / frames
    for judge in judges:
        for metric, values in judge.results().items():
            for side, value in zip(SIDES, values, strict=True):
                found[side][metric] = value
    result = {
        **{
            side: {"dtype": cache.dtype, "fingerprint": cache.fingerprint, **found[side]}
            for side, cache in zip(SIDES, caches, strict=True)
        },
        "windows": len(windows[0]),
        "frames": len(windows[0]) * caches[0].shape[0],
    }
    if config.out is not None:
        try:
            Path(config.out).parent.mkdir(parents=True, exist_ok=True)
            write_json(Path(config.out), result)
        except OSError as error:
            raise UsageError(f"--out {config.out}: cannot be written ({error.strerror})") from None
    return result


def markdown_table(result: dict[str, Any]) -> str:
    """The numbers of `run_cache_fidelity` as a Markdown table."""
    header = "| | " + " | ".join(f"{side} ({result[side]['dtype']})" for side in SIDES) + " |"
    lines = [header, "|---|---:|---:|"]
    for metric, text in METRICS.items():
        if metric in result[SIDES[0]]:
            cells = [_shown(result[side][metric], metric) for side in SIDES]
            lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if metric == "bytes_per_frame" else f"{value:.6g}"


def _batches(
    config: CacheFidelityConfig,
    caches: tuple[PatchShards, PatchShards],
    windows: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
    """The numbers in the reference, and the tokens (B, T, N, D) of the two caches."""
    for start in range(0, len(windows[0]), config.batch_windows):
        ours, theirs = (numbers[start : start + config.batch_windows] for numbers in windows)
        tokens = (cache.tokens(n) for cache, n in zip(caches, (ours, theirs), strict=True))
        first, second = map(torch.from_numpy, tokens)
        yield theirs, first, second


def _judges(config: CacheFidelityConfig, cache: PatchShards, device: torch.device) -> list[Judge]:
    judges: list[Judge] = [TokenErrors()]
    if config.tokenizer is not None:
        if cache.shape[0] < 2:
            raise UsageError("--tokenizer: windows of one frame have no pairs to reconstruct")
        tokenizer = DeltaTok.from_pretrained(config.tokenizer, device=device)
        check_width("tokenizer", config.tokenizer, tokenizer.config.hidden_size, cache.info)
        check_patches("tokenizer", config.tokenizer, cache.info)
        bfloat16 = precision_name(config.autocast, device) == "bfloat16"
        judges.append(Reconstruction(tokenizer, grid=cache.grid, bfloat16=bfloat16))
    if config.head is not None and config.labels is not None:
        compare(
            cache.info.identity,
            {"sampling": {"policy": "uniform"}},
            what_got=f"--reference {config.reference}",
            what_wanted="caches that labels of whole frames belong to",
            fields=["sampling.policy"],
        )
        head = SegmentationHead.from_pretrained(config.head, device=device)
        check_width("head", config.head, head.config.in_size, cache.info)
        check_patches("head", config.head, cache.info)
        labels = LabelFolder(
            Path(config.labels),
            last_frames=_last_frames(cache),
            num_classes=head.config.num_classes,
        )
        judges.append(Segmentation(head, labels, cache))
    return judges


def _last_frames(cache: PatchShards) -> dict[str, int]:
    """Clip key -> the highest frame index in its windows."""
    last = np.zeros(len(cache.keys), dtype=np.int64)
    np.maximum.at(last, cache.clip_index, cache.table().frame_index.max(axis=1))
    return dict(zip(cache.keys, last.tolist(), strict=True))
