"""The paper's rows beside ours: only where the protocol is the same, else with what differs.

Figures of "A Frame is Worth One Token" (CVPR 2026, arXiv 2604.04913) and of the released weights,
at 512 px; mIoU in percent, RMSE in metres, (short, mid).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...shards.cache import pca_of
from ...train.models.heads import SegmentationHead
from ..forecast.config import ForecastConfig
from ..forecast.scores import Head
from ..tables import Table
from .rows import HORIZONS, ROW_LABELS, ReportRow, find_value, show

PAPER_ROWS: dict[str, tuple[tuple[str, str, tuple[str, str]], ...]] = {
    # our row, the paper's name, (short, mid)
    "vspw": (
        ("copy_last", "Copy last", ("51.2", "44.3")),
        ("dinoworld", "DINO-world (paper's)", ("54.0", "47.9")),
        ("predictions_best", "Cosmos-12B, best", ("51.7", "47.7")),
        ("predictions_mean", "Cosmos-12B, mean", ("50.7", "45.5")),
        ("best", "DeltaWorld, paper, best", ("55.4", "50.1")),
        ("mean", "DeltaWorld, paper, mean", ("53.7", "46.7")),
        ("best", "DeltaWorld, released, best", ("56.3", "51.5")),
        ("mean", "DeltaWorld, released, mean", ("54.2", "46.6")),
        ("reconstruction", "DeltaTok reconstruction, released", ("58.6", "58.5")),
        ("present", "Present", ("58.4", "58.4")),
    ),
    "cityscapes": (
        ("copy_last", "Copy last", ("53.5", "39.6")),
        ("dinoworld", "DINO-world (paper's)", ("62.0", "49.8")),
        ("predictions_best", "Cosmos-12B, best", ("55.3", "53.3")),
        ("predictions_mean", "Cosmos-12B, mean", ("56.0", "51.2")),
        ("best", "DeltaWorld, paper, best", ("65.8", "55.4")),
        ("mean", "DeltaWorld, paper, mean", ("63.9", "51.3")),
        ("best", "DeltaWorld, released, best", ("66.2", "55.3")),
        ("mean", "DeltaWorld, released, mean", ("64.2", "49.5")),
        ("reconstruction", "DeltaTok reconstruction, released", ("69.6", "67.9")),
        ("present", "Present", ("70.5", "70.5")),
    ),
    "kitti": (
        ("copy_last", "Copy last", ("3.76", "4.86")),
        ("dinoworld", "DINO-world (paper's)", ("3.16", "4.07")),
        ("predictions_best", "Cosmos-12B, best", ("3.72", "4.01")),
        ("predictions_mean", "Cosmos-12B, mean", ("3.71", "4.14")),
        ("best", "DeltaWorld, paper, best", ("3.00", "3.88")),
        ("mean", "DeltaWorld, paper, mean", ("3.17", "4.17")),
        ("best", "DeltaWorld, released, best", ("2.95", "3.71")),
        ("mean", "DeltaWorld, released, mean", ("3.32", "4.74")),
        ("reconstruction", "DeltaTok reconstruction, released", ("2.78", "2.86")),
        ("present", "Present", ("2.79", "2.79")),
    ),
}
METRICS = {"vspw": "miou", "cityscapes": "miou", "kitti": "rmse"}
_STRIDES_S = {"vspw": 0.2, "cityscapes": 0.1875, "kitti": 0.2}
_HEADS = {"vspw": 124, "cityscapes": 19}


@dataclass(frozen=True, kw_only=True)
class PaperComparison:
    """Whether a report can be held against the paper's tables."""

    dataset: str
    """A key of PAPER_ROWS."""
    differences: tuple[str, ...]
    """What is not as in the paper; empty: comparable."""


def compare_with_paper(
    config: ForecastConfig,
    identity: Mapping[str, Any],
    *,
    head: Head | None,
) -> PaperComparison | None:
    """How the protocol of a report differs from the paper's; None for a data set it has no rows of.

    identity: of the evaluation cache.
    """
    sampling = identity.get("sampling", {})
    dataset = str(sampling.get("dataset", config.dataset))
    if dataset not in PAPER_ROWS:
        return None
    backbone = identity.get("backbone", {}).get("config", {})
    checks: list[tuple[str, Any, Any]] = [
        ("sampling policy", sampling.get("policy"), "evaluation"),
        ("seconds between frames", sampling.get("stride_s"), _STRIDES_S[dataset]),
        ("frames seen", config.num_context, 4),
        ("steps of the short horizon", config.short_steps, 1),
        ("steps of the mid horizon", config.mid_steps, 3),
        ("samples", config.num_samples, 20),
        ("noise scale", config.noise_scale, 1.0),
        ("only a subset of the targets", config.predictions_subset, False),
        ("depth range", config.depth_range_m, None),
        ("frame size", identity.get("preprocessing", {}).get("frame_size"), 512),
        ("backbone", backbone.get("model_type"), "dinov3_vit"),
        ("backbone's patch size", backbone.get("patch_size"), 16),
        ("backbone's channels", backbone.get("hidden_size"), 768),
        ("backbone's layers", backbone.get("num_hidden_layers"), 12),
        ("layers that are stored", identity.get("backbone", {}).get("layers"), None),
        ("principal components", _components(identity), None),
        ("labels", "given" if config.labels is not None else "none", "given"),
    ]
    if dataset in _HEADS:
        num_classes = head.config.num_classes if isinstance(head, SegmentationHead) else None
        checks.append(("classes of the head", num_classes, _HEADS[dataset]))
    return PaperComparison(
        dataset=dataset,
        differences=tuple(
            f"{name}: {_text(got)}, paper {_text(wanted)}"
            for name, got, wanted in checks
            if not _same(got, wanted)
        ),
    )


def paper_table(rows: Sequence[ReportRow], comparison: PaperComparison) -> Table:
    """The paper's rows and, where they are comparable, ours of the same kind; short and mid."""
    metric = METRICS[comparison.dataset]
    unit = "mIoU %" if metric == "miou" else "RMSE m"
    body = []
    for name in dict.fromkeys(name for name, _, _ in PAPER_ROWS[comparison.dataset]):
        ours = [find_value(rows, horizon=h, row=name, metric=metric) for h in HORIZONS]
        if not comparison.differences and any(value is not None for value in ours):
            label = f"this run: {ROW_LABELS[name]}"
            body.append([label, *(show(value, metric) for value in ours)])
        for kind, label, numbers in PAPER_ROWS[comparison.dataset]:
            if kind == name:
                body.append([f"paper: {label}", *numbers])
    return Table(["row", *(f"{unit} {horizon}" for horizon in HORIZONS)], body)


def _components(identity: Mapping[str, Any]) -> Any:
    return (pca_of(identity) or {}).get("components")


def _same(got: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(got, int | float):
        return abs(got - wanted) < 1e-6
    return bool(got == wanted)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
