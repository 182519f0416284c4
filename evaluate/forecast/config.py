"""Settings of `deltatok-evaluate forecast`."""

from dataclasses import dataclass
from typing import Literal

from ...shards.errors import UsageError
from ...shards.schema import Place

UNNAMED = "forecast"


@dataclass(frozen=True, kw_only=True)
class ForecastConfig:
    """What to score, with which models, and where the report goes.

    The protocol (paper section 4, released evaluation): `num_context` frames are seen, the frame
    `mid_steps` later is the target. The short horizon has the same target, seen from
    `short_steps` before it.
    """

    patches: Place
    """Patch-token cache to evaluate on: of --dataset, or uniform with num_context + mid_steps
    frames a window or more."""
    tokenizer: str
    """Folder of the tokenizer."""
    out: str
    """Folder for report.json, report.html and pictures."""
    dataset: str = UNNAMED
    """Name of the data set in every row of the report; a cache of --dataset has its own."""
    world: str | None = None
    """Folder of the best-of-many world model; none: no rows `mean` and `best`."""
    discriminative: str | None = None
    """Folder of a world model with a learned query; none: no row `discriminative`."""
    dinoworld: tuple[str, ...] = ()
    """Folders of DINO-worlds, for rows of their own: one with a learned query, one with noise
    queries, or both."""
    regressor_null: bool = True
    """Row `regressor_null`, where world and discriminative are DeltaWorlds: the best of Gaussian
    draws around the discriminative forecast, spread as the samples are. As costly as they are."""
    head: str | None = None
    """Folder of a segmentation head, for mIoU, or of a depth head, for RMSE; needs labels."""
    rgb_head: str | None = None
    """Folder of an RGB head: the report shows what it draws from the features of every row."""
    labels: str | None = None
    """Folder of labels, needs head: the data set's own (cache of --dataset), or CLIP_KEY.npy, uint8
    (frames, H, W), 255 = ignore (uniform)."""
    predictions: str | None = None
    """Folder of frames that another model predicted (layout: evaluate/forecast/predictions.py):
    adds rows `predictions_best` and `predictions_mean`; needs backbone."""
    predictions_subset: bool = False
    """Score only the targets that have predictions, all rows on those; else all must have some."""
    backbone: str | None = None
    """Hub id or folder of the backbone that made the cache, for predictions."""
    depth_range_m: tuple[float, float] | None = None
    """Depth labels below or above these metres count nowhere; KITTI's own range always holds."""
    futures: str | None = None
    """Folder of all possible futures, CLIP_KEY.npz, of an evaluation cache SEQUENCE.npz will do
    (see evaluate/forecast/modes.py): adds mode recall and precision; needs a segmentation head."""
    mode_overlap: float = 0.5
    """Overlap (IoU) of two class maps from which on they show the same future, above 0 to 1."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in order, for the legend of the pictures."""
    num_context: int = 4
    """Frames seen before a rollout starts."""
    short_steps: int = 1
    """Steps of the short horizon."""
    mid_steps: int = 3
    """Steps of the mid horizon."""
    drift_steps: int = 10
    """Steps of the rollouts that show how errors build up; 0: none. Off where the windows of
    `patches` have fewer than num_context + drift_steps frames, or end at a target (--dataset)."""
    drift_patches: Place | None = None
    """Uniform patch-token cache of windows that are long enough for drift_steps, of the same frame
    size and backbone; none: `patches`."""
    drift_labels: str | None = None
    """Labels of drift_patches, laid out as those of `patches`; none: feature loss only."""
    num_samples: int = 20
    """Samples rolled out for each window."""
    seed: int = 0
    """Seed of the samples' noise; a window's noise depends on it and on the window's number, or
    target and crop, alone."""
    num_seeds: int = 1
    """Seeds of the samples, from `seed` on: rows of samples are means over them. The best-of-k
    curve, IoU by class, probes and pictures are those of the first."""
    noise_scale: float = 1.0
    """The samples' noise is multiplied by this; 1 = as in training."""
    batch_windows: int = 4
    """Windows rolled out at once: memory, not results, depends on it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: cuda, else mps, else cpu."""
    autocast: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the models; auto: bfloat16 on cuda, float32 elsewhere."""
    videos: tuple[str, ...] = ()
    """Videos or folders the cache was made from: adds their frames to the pictures."""
    curves: tuple[str, ...] = ()
    """Run folders (or log.jsonl files) whose training curves go into the report."""
    num_pictures: int = 4
    """Windows shown in pictures, spread over the clips."""

    def __post_init__(self) -> None:
        """Refuse what cannot be evaluated."""
        for name in ("num_context", "short_steps", "num_samples", "num_seeds", "batch_windows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if self.mid_steps < self.short_steps:
            raise UsageError(
                f"mid_steps: got {self.mid_steps}, wanted at least short_steps = {self.short_steps}"
            )
        if self.depth_range_m is not None and not 0 < self.depth_range_m[0] < self.depth_range_m[1]:
            raise UsageError(
                f"depth_range_m: got {self.depth_range_m}, wanted two depths above 0, nearest first"
            )
        if (self.predictions is None) != (self.backbone is None):
            raise UsageError("--predictions and --backbone: give both, or neither")
        if self.predictions_subset and self.predictions is None:
            raise UsageError("--predictions-subset without --predictions: of what?")
        if self.drift_steps < 0:
            raise UsageError(f"drift_steps: got {self.drift_steps}, wanted 0 or more")
        if self.drift_patches is not None and not self.drift_steps:
            raise UsageError("--drift-patches with --drift-steps 0: set how many steps to score")
        if self.drift_labels is not None and (self.drift_patches is None or self.head is None):
            raise UsageError("--drift-labels: of --drift-patches, read by --head; give both")
        if self.num_pictures < 0:
            raise UsageError(f"num_pictures: got {self.num_pictures}, wanted 0 or more")
        if self.seed < 0:
            raise UsageError(f"seed: got {self.seed}, wanted 0 or more")
        if not 0 < self.mode_overlap <= 1:
            raise UsageError(f"mode_overlap: got {self.mode_overlap}, wanted above 0, at most 1")
        if not 0 <= self.noise_scale < float("inf"):
            raise UsageError(f"noise_scale: got {self.noise_scale}, wanted 0 or more")
        if self.futures is not None and self.head is None:
            raise UsageError("--futures without --head: the head reads what a forecast shows")
        if (self.head is None) != (self.labels is None):
            given, other = ("head", "labels") if self.labels is None else ("labels", "head")
            raise UsageError(
                f"--{given} without --{other}: mIoU needs both; give --{other} too, or leave both "
                "out to score features only"
            )

    @property
    def num_frames(self) -> int:
        """Frames of a window that take part: context, then targets of the mid horizon."""
        return self.num_context + self.mid_steps

    def steps(self, horizon: str) -> int:
        """Steps of `short` or `mid`."""
        return {"short": self.short_steps, "mid": self.mid_steps}[horizon]

    def context_start(self, horizon: str) -> int:
        """First context frame of a horizon: both horizons end at the same target frame."""
        return self.num_frames - self.steps(horizon) - self.num_context
