"""`deltatok-evaluate cache-fidelity`: what the storage type of a patch cache costs.

A cache is held against another one of the same windows (same videos, sampling, seed, backbone;
float16, say), window by window: how far the tokens are off, what that does to a tokenizer's
reconstruction and a head's mIoU, and how many bytes a frame takes. No backbone, no network. The two
hold the same windows, but perhaps cut into other shards and so in another order.

Letters: B windows, T frames, N patch tokens of a frame, D channels of a token.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..shards.cache import compare
from ..shards.errors import CacheMismatch, DeltatokError, UsageError
from ..shards.evaluation.labels import ClipLabels
from ..shards.evaluation.targets import last_frames
from ..shards.files import make_folder, write_json
from ..shards.patches.reader import PatchShards
from ..shards.running.devices import DEVICES, choose_device, memory_errors, precision_name
from ..shards.schema import Place
from ..shards.tools.info import describe_cache
from ..train.losses import smooth_l1
from ..train.models.deltatok import DeltaTok
from ..train.models.heads import SegmentationHead
from .forecast.models import check_model
from .forecast.scores import class_counts, confusion_matrix, read_maps
from .forecast.sequences import values
from .tables import markdown_table

COLUMNS = ("frame_index", "timestamps_s", "crop", "flipped")
"""What makes a window of a clip the same, as the columns of `PatchShards.table()`."""


def match_windows(
    patches: PatchShards, reference: PatchShards, *, names: tuple[str, str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Window numbers int64 (W,) of `patches` and, in the same order, of `reference`.

    names: what the two are called in messages. Raises CacheMismatch naming the field that differs,
    unless both hold the same windows of the same videos through the same backbone; `storage` may
    differ.
    """
    described = [
        {name: value for name, value in cache.info.identity.items() if name != "storage"}
        | {"shape": asdict(cache.info.shape)}
        for cache in (patches, reference)
    ]
    compare(*described, what_got=names[0], what_wanted=names[1])
    ours, theirs = _windows(patches), _windows(reference)
    our_order = sorted(range(len(ours)), key=ours.__getitem__)
    their_order = sorted(range(len(theirs)), key=theirs.__getitem__)
    our_clips, their_clips = ({window[0] for window in windows} for windows in (ours, theirs))
    if different := sorted(our_clips ^ their_clips):
        where = names[0] if different[0] in our_clips else names[1]
        raise CacheMismatch(
            f"keys: clip {different[0]!r} is in {where} only ({len(different)} such clips): both "
            "caches must hold the same clips; see quarantine.jsonl of the other one"
        )
    if len(ours) != len(theirs):
        raise CacheMismatch(
            f"{names[0]}: windows is {len(ours)}, but {len(theirs)} in {names[1]}: both must be "
            "extracted from the same videos with the same settings"
        )
    for one, other in zip(our_order, their_order, strict=True):
        if ours[one] != theirs[other]:
            pairs = zip(("clip", *COLUMNS), ours[one], theirs[other], strict=True)
            field = next(name for name, mine, its in pairs if mine != its)
            raise CacheMismatch(
                f"{names[0]}: {field} of a window of clip {ours[one][0]!r} differs from "
                f"{names[1]}: both must be extracted from the same videos with the same seed"
            )
    return np.array(our_order, dtype=np.int64), np.array(their_order, dtype=np.int64)


def _windows(cache: PatchShards) -> list[tuple[Any, ...]]:
    """Of every window the clip's key and the bytes of each of COLUMNS."""
    table, keys = cache.table(), cache.keys
    columns = [[row.tobytes() for row in getattr(table, name)] for name in COLUMNS]
    clips = [keys[clip] for clip in table.clip.tolist()]
    return list(zip(clips, *columns, strict=True))


Pair = tuple[float | None, float | None]
"""A metric of the cache that is judged and of its reference."""


@dataclass
class TokenErrors:
    """How far the tokens are off."""

    error: float = 0.0
    """Sums of squares."""
    size: float = 0.0
    change: float = 0.0
    num_frames: int = 0
    num_changes: int = 0
    cosines: list[float] = field(default_factory=list)
    smallest: float = 1.0

    def add(self, _: NDArray[np.int64], ours: Tensor, theirs: Tensor) -> None:
        """Takes in windows (B, T, N, D) of both caches, and their numbers (B,) in the reference."""

        def square(values: Tensor) -> Tensor:
            return values.square().sum(dim=-1).cpu().double()

        error, size = square(ours - theirs), square(theirs)
        norms = (square(ours) * size).sqrt()
        products = (ours * theirs).sum(dim=-1).cpu().double()
        # Two zero tokens point the same way, a zero and another one do not.
        cosine = torch.where(norms > 0, products / norms, (error == 0).double()).clamp(-1, 1)
        self.error += float(error.sum())
        self.size += float(size.sum())
        self.change += float(square(theirs[:, 1:] - theirs[:, :-1]).sum())
        self.num_frames += error.shape[0] * error.shape[1]
        self.num_changes += error.shape[0] * (error.shape[1] - 1)
        self.cosines += cosine.mean(dim=(1, 2)).tolist()
        self.smallest = min(self.smallest, float(cosine.min()))

    def results(self) -> dict[str, Pair]:
        """Metric -> its values, of everything so far."""
        relative = _root_ratio(self.error, self.size)
        change = self.change / self.num_changes if self.num_changes else 0.0
        against_change = _root_ratio(self.error / self.num_frames, change)
        return {
            "relative_error": (relative, 0.0),
            "cosine_mean": (math.fsum(self.cosines) / len(self.cosines), 1.0),
            "cosine_min": (self.smallest, 1.0),
            "error_over_change": (against_change, None if against_change is None else 0.0),
        }


class Reconstruction:
    """The tokenizer's loss: consecutive frames of a cache encoded and decoded, then held against
    the current frame of the reference."""

    def __init__(self, tokenizer: DeltaTok, *, grid: tuple[int, int], bfloat16: bool) -> None:
        self._tokenizer, self._grid, self._bfloat16 = tokenizer, grid, bfloat16
        self._losses: tuple[list[float], list[float]] = ([], [])

    def add(self, numbers: NDArray[np.int64], ours: Tensor, theirs: Tensor) -> None:
        truth = theirs[:, 1:].flatten(0, 1)
        for x, losses in zip((ours, theirs), self._losses, strict=True):
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
                previous, current = x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)
                z = self._tokenizer.encode(previous, current, grid=self._grid)
                decoded = self._tokenizer.decode(z, previous, grid=self._grid)
            loss = smooth_l1(decoded.float(), truth).mean(dim=(1, 2)).reshape(len(numbers), -1)
            losses += loss.mean(dim=1).tolist()

    def results(self) -> dict[str, Pair]:
        ours, theirs = (math.fsum(losses) / len(losses) for losses in self._losses)
        if not (math.isfinite(ours) and math.isfinite(theirs)):
            raise DeltatokError(
                "the tokenizer's reconstruction is not finite: evaluate with --autocast float32"
            )
        return {"reconstruction_loss": (ours, theirs)}


class SegmentationJudge:
    """The head's mIoU over all frames."""

    def __init__(self, head: SegmentationHead, labels: ClipLabels, cache: PatchShards) -> None:
        self._head, self._labels, self._cache = head, labels, cache
        self._keys, self._clips = cache.keys, cache.clip_index.tolist()
        self._num_classes = head.config.num_classes
        self._counts = tuple(np.zeros((2, self._num_classes), np.int64) for _ in SIDES)
        """Intersections and unions of every class, pixels."""

    def add(self, numbers: NDArray[np.int64], ours: Tensor, theirs: Tensor) -> None:
        frames = self._cache.frame_index(numbers).tolist()
        for row, (number, indices) in enumerate(zip(numbers.tolist(), frames, strict=True)):
            for frame, index in enumerate(indices):
                label = self._labels.frame(self._keys[self._clips[number]], index)
                size = (label.shape[0], label.shape[1])
                for x, counts in zip((ours, theirs), self._counts, strict=True):
                    tokens, grid = x[row, frame][None], self._cache.grid
                    classes = read_maps(self._head, tokens, grid=grid, size=size).argmax(dim=1)
                    truth = torch.from_numpy(label)[None].to(classes)
                    counts += class_counts(
                        confusion_matrix(classes, truth, num_classes=self._num_classes)
                    )

    def results(self) -> dict[str, Pair]:
        ours, theirs = (float(values("miou", *counts)) for counts in self._counts)
        return {"miou": (ours, theirs)}


def _root_ratio(top: float, bottom: float) -> float | None:
    """The root of top / bottom; None where there is nothing to divide by."""
    return math.sqrt(top / bottom) if bottom > 0 else (0.0 if top == 0 else None)


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

    patches: Place
    """The patch-token cache to judge."""
    reference: Place
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
    device = choose_device(config.device, automatic=DEVICES)
    caches = (PatchShards(config.patches), PatchShards(config.reference))
    names = (f"--patches {config.patches}", f"--reference {config.reference}")
    windows = match_windows(*caches, names=names)
    if not len(windows[0]):
        raise UsageError(f"--patches {config.patches}: no windows; see its quarantine.jsonl")
    if config.max_windows is not None and config.max_windows < len(windows[0]):
        chosen = np.linspace(0, len(windows[0]), config.max_windows, endpoint=False).astype(int)
        windows = windows[0][chosen], windows[1][chosen]
    judges = _judges(config, caches[1], device)
    with (
        memory_errors("comparing", lambda: f"lower batch_windows, now {config.batch_windows}"),
        torch.inference_mode(),
        tqdm(total=len(windows[0]), unit="window", disable=None) as bar,
    ):
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
        for metric, pair in judge.results().items():
            for side, value in zip(SIDES, pair, strict=True):
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
            make_folder(Path(config.out).parent, flag="--out")
            write_json(Path(config.out), result)
        except OSError as error:
            raise UsageError(f"--out {config.out}: cannot be written ({error.strerror})") from None
    return result


def fidelity_table(result: dict[str, Any]) -> str:
    """The numbers of `run_cache_fidelity` as a Markdown table."""
    header = ["", *(f"{side} ({result[side]['dtype']})" for side in SIDES)]
    body = [
        [text, *(_shown(result[side][metric], metric) for side in SIDES)]
        for metric, text in METRICS.items()
        if metric in result[SIDES[0]]
    ]
    return markdown_table(header, body)


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


def _judges(
    config: CacheFidelityConfig, cache: PatchShards, device: torch.device
) -> list[TokenErrors | Reconstruction | SegmentationJudge]:
    """The ways to look at the two caches; `cache` is the reference."""
    judges: list[TokenErrors | Reconstruction | SegmentationJudge] = [TokenErrors()]
    if config.tokenizer is not None:
        if cache.shape[0] < 2:
            raise UsageError("--tokenizer: windows of one frame have no pairs to reconstruct")
        tokenizer = DeltaTok.from_pretrained(config.tokenizer, device=device)
        check_model("tokenizer", config.tokenizer, tokenizer, cache.info)
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
        check_model("head", config.head, head, cache.info)
        labels = ClipLabels(
            config.labels,
            last_frames=last_frames(cache),
            num_classes=head.config.num_classes,
        )
        judges.append(SegmentationJudge(head, labels, cache))
    return judges
