"""What each training command is told: one frozen dataclass a command, checked when it is made.

    TokenizerTrainConfig   deltatok-train tokenizer
    WorldTrainConfig       deltatok-train world
    DINOWorldTrainConfig   deltatok-train dinoworld
    HeadTrainConfig        deltatok-train head
    SelectionConfig        what both worlds' configs have in common: best-of-many
    TokenizeConfig         patch cache -> delta cache

The YAML files and the flags map 1:1 onto the fields. Every default is the released code's or the
paper's for a batch of 1,024 on many GPUs, unless its text says that it is a guess.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

from ..shards.errors import UsageError
from ..shards.running.parts import parse_shard_of
from ..shards.schema import Place
from .models.configs import (
    DeltaTokConfig,
    DeltaWorldConfig,
    DINOWorldConfig,
    PredictorConfig,
    check_at_least,
)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """UsageError unless `value` is one of `choices`."""
    if value not in choices:
        raise UsageError(f"{name} {value!r}: wanted one of {', '.join(choices)}")


def check_choices(config: object) -> None:
    """UsageError for the first field that is none of its Literal's values."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            check_choice(name, getattr(config, name), get_args(hint))


def check_positive(**values: float | None) -> None:
    """UsageError for the first value that is set and not a finite number above 0."""
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{name} {value}: wanted a finite number above 0")


Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16"]
Residency = Literal["auto", "device", "memory", "map", "stream"]
TokenizerLoss = Literal["log_cosh", "mse"]
ClosedLoop = Literal["both", "decoder"]
ClosedLoopGradient = Literal["through", "stopped"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
SelectionDtype = Literal["auto", "float32", "bfloat16", "float8"]
TrackerName = Literal["tensorboard", "wandb"]
PredictorName = Literal["cross-attention", "self-attention"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every training command has in common. OUT becomes, at the end, a model folder."""

    out: str
    """Run folder: log, checkpoints and, when training ends, the model. The same command run again
    goes on from the last checkpoint."""
    steps: int
    """Optimizer steps in all."""
    batch_size: int
    """Samples of one step over all ranks; must be a multiple of the number of ranks."""
    micro_batch_size: int | None = None
    """Samples in one forward and backward of a rank, to fit a small device; none: all of them."""
    lr: float
    """Learning rate after the warm-up."""
    warmup_steps: int = 5000
    """Steps of linear warm-up; the very first step has learning rate 0, as released."""
    weight_decay: float
    """AdamW's decay, on the weights of linear and convolution layers only."""
    clip_grad_norm: float | None = None
    """Largest L2 norm of the whole gradient; none: no clipping."""
    precision: Precision = "auto"
    """Arithmetic of forward and backward; auto: bfloat16 on cuda, float32 elsewhere. Weights,
    optimizer and loss are always float32."""
    seed: int = 0
    """Seed of the first weights, of the sample order and of every draw."""
    compile: bool = False
    """Compile forward and backward of the model (torch.compile). Equal but for rounding; takes a
    minute or more to begin with."""
    compile_mode: CompileMode = "default"
    """What torch.compile may spend on it."""
    start_from: str | None = None
    """Model folder or checkpoint whose weights this run begins with (the next resolution, a
    cooldown); none: fresh weights."""
    start_optimizer: bool = False
    """Begin with the optimizer's state as well; start_from is then a checkpoint or a run folder,
    of which the newest checkpoint is taken. Steps are counted, and the rate is warmed up, anew."""
    residency: Residency = "auto"
    """Where the cache is read from: device (loaded whole onto the device that computes), memory
    (loaded whole), map (from its files, each batch), stream (from its files, whole blocks in random
    order, for caches larger than memory; a run that streams goes on streaming), auto (the first of
    these that there is room for)."""
    validation_fraction: float = 0.01
    """Share of clips kept out of training, chosen by a hash of their keys (so the same in every
    command), at least one; 0: none, and no evaluation."""
    validation_windows: int = 64
    """Windows of those clips that an evaluation uses, at most."""
    eval_every: int = 1000
    """Steps between two evaluations."""
    log_every: int = 50
    """Steps between two lines of log.jsonl."""
    save_every: int = 1000
    """Steps between two checkpoints; a kill loses at most this many."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept: the newest ones, beside the one that validates best."""
    skip_damaged: bool = False
    """Go on from the checkpoint before where the newest one is damaged. That one is set aside, as
    checkpoints/damaged-step-NNNNNNNN, and its steps are trained again."""
    device: Device = "auto"
    """Where to compute; auto: cuda, else mps, else cpu."""
    trackers: tuple[TrackerName, ...] = ()
    """Where the log goes beside log.jsonl: tensorboard (OUT/tensorboard), wandb (OUT/wandb, offline
    unless WANDB_MODE says otherwise)."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {
            *("out", "steps", "device", "residency", "micro_batch_size"),
            *("log_every", "eval_every", "save_every", "keep_checkpoints", "skip_damaged"),
            *("compile", "compile_mode", "trackers"),
            "start_from",  # compared by the weights' sha256, not by the path
        }
    )
    """Fields that may differ between a run and its continuation."""
    ORDER_FOLLOWS_RESIDENCY: ClassVar[bool] = True
    """Whether a run that streams has its batches in another order than one that does not."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(
            1,
            steps=self.steps,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            validation_windows=self.validation_windows,
            eval_every=self.eval_every,
            log_every=self.log_every,
            save_every=self.save_every,
            keep_checkpoints=self.keep_checkpoints,
        )
        check_at_least(0, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay)
        check_positive(lr=self.lr, clip_grad_norm=self.clip_grad_norm)
        for tracker in self.trackers:
            check_choice("trackers", tracker, get_args(TrackerName))
        if self.start_optimizer and self.start_from is None:
            raise UsageError("start_optimizer: wanted start_from as well, the run to take it from")
        if not 0 <= self.validation_fraction < 1:
            raise UsageError(
                f"validation_fraction {self.validation_fraction}: wanted 0 (no validation) up to, "
                "not including, 1"
            )

    def memory_settings(self, num_ranks: int) -> list[str]:
        """What to do to the settings that memory on the device depends on, with their values."""
        size = self.micro_batch_size or self.batch_size // num_ranks
        settings = [f"lower micro_batch_size, now {size}"] if size > 1 else []
        return [*settings, *["set residency memory, now device"] * (self.residency == "device")]


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig(TrainConfig):
    """deltatok-train tokenizer: patch-token cache -> DeltaTok. A sample is a pair of frames."""

    patches: Place
    """Patch-token cache to train on."""
    deltas: Place | None = None
    """Also write the delta-token cache here when training ends; none: do not."""
    model: DeltaTokConfig = field(default_factory=DeltaTokConfig)
    """The tokenizer. Its hidden_size is the cache's; one set to anything but the default must
    agree with the cache."""
    steps: int = 50_000
    """Optimizer steps in all (paper: 50,000 a resolution; released: 1,000,000 at 256 px, then
    500,000 at 512 px)."""
    batch_size: int = 1024
    """Frame pairs of one step over all ranks. Windows are read whole: each gives its consecutive
    pairs, and of the last window of a batch only as many as complete the batch."""
    lr: float = 1e-3
    """Learning rate after the warm-up (256 px; paper for 512 px: 1e-4, then 1e-5, then 1e-6)."""
    weight_decay: float = 1e-2
    """AdamW's decay, on the weights of linear and convolution layers only."""
    clip_grad_norm: float | None = 1e-2
    """Largest L2 norm of the whole gradient; none: no clipping."""
    loss: TokenizerLoss = "log_cosh"
    """log_cosh (released code) or mse (paper), over patch features."""
    wide_pair_fraction: float = 0.0
    """Share of pairs that are two or more frames of the window apart; 0: consecutive frames only,
    as the paper."""
    closed_loop_steps: int = 1
    """Pairs in a row, at most, that start from one true frame: after the first, the previous frame
    is the reconstruction of the pair before, as in a rollout. 1: every pair has its true previous
    frame, as the paper. Needs windows of as many frames and one; each rank's share of batch_size,
    and micro_batch_size, must be a multiple. Takes the FLOPs that open pairs take."""
    closed_loop: ClosedLoop = "both"
    """Which half sees the reconstruction: both, so that a delta token tells the way from it to the
    next true frame; or the decoder alone, the token being that of the true frames: what decodes
    forecasts, whose tokens are learned from true frames."""
    closed_loop_gradient: ClosedLoopGradient = "through"
    """Whether the gradient of a pair's loss goes on into the reconstruction that it started from:
    through, or stopped there."""
    encoder_patch_fraction: float = 1.0
    """Share of a frame's patches that the encoder reads, drawn anew every step; 1: all, as the
    paper. Less takes in proportion fewer FLOPs, and delta tokens are of a kind that evaluation
    never sees: end with all patches (whole_frames_from)."""
    decoder_patch_fraction: float = 1.0
    """Share of the patches that are decoded and counted in the loss, drawn anew every step: the
    encoder's, or some of them, or more; 1: all, as the paper."""
    whole_frames_from: int | None = None
    """Step (from 0) from which both halves have all patches; none: never."""
    allow_stuck: bool = False
    """Go on with a decoder that ignores its delta token."""
    stuck_after_steps: int = 10_000
    """Step from which a stuck decoder stops the run (a guess: twice the warm-up)."""
    stuck_threshold: float = 1.05
    """A decoder is stuck if its loss, when delta tokens are swapped between windows, is less than
    this many times the loss (seen elsewhere: stuck 1.001, healthy 4.7)."""

    MAY_CHANGE: ClassVar[frozenset[str]] = TrainConfig.MAY_CHANGE | {
        *("patches", "deltas"),
        *("allow_stuck", "stuck_after_steps", "stuck_threshold"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, stuck_after_steps=self.stuck_after_steps)
        check_positive(stuck_threshold=self.stuck_threshold)
        if not 0 <= self.wide_pair_fraction <= 1:
            raise UsageError(
                f"wide_pair_fraction {self.wide_pair_fraction}: wanted a share between 0 and 1"
            )
        self._check_closed_loop()
        self._check_patches()

    def _check_closed_loop(self) -> None:
        steps = self.closed_loop_steps
        check_at_least(1, closed_loop_steps=steps)
        if steps > 1 and self.wide_pair_fraction > 0:
            raise UsageError(
                f"closed_loop_steps {steps} with wide_pair_fraction {self.wide_pair_fraction}: "
                "wide pairs follow on none; leave one of the two out"
            )
        for name in ("batch_size", "micro_batch_size"):
            size = getattr(self, name)
            if size is not None and size % steps:
                raise UsageError(
                    f"{name} {size}: wanted a multiple of closed_loop_steps, {steps}, so that no "
                    "row of pairs is cut"
                )

    def _check_patches(self) -> None:
        for name in ("encoder_patch_fraction", "decoder_patch_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{name} {getattr(self, name)}: wanted above 0, at most 1")
        check_at_least(1, whole_frames_from=self.whole_frames_from)
        if self.whole_frames_from is not None and not self.draws_patches:
            raise UsageError(
                f"whole_frames_from {self.whole_frames_from}: wanted encoder_patch_fraction or "
                "decoder_patch_fraction below 1 before it; set one, or leave this out"
            )
        if self.closed_loop_steps > 1 and self.decoder_patch_fraction < 1:
            raise UsageError(
                f"closed_loop_steps {self.closed_loop_steps} with decoder_patch_fraction "
                f"{self.decoder_patch_fraction}: the next pair starts from all patches of a "
                "reconstruction; leave one of the two out"
            )

    @property
    def draws_patches(self) -> bool:
        """Whether any step has less than all patches."""
        return min(self.encoder_patch_fraction, self.decoder_patch_fraction) < 1


@dataclass(frozen=True, kw_only=True)
class SelectionConfig(TrainConfig):
    """What the commands of both world models have in common. num_winners and what follows say which
    of the noise queries are trained and how they are found; model.use_bom false has none."""

    steps: int = 300_000
    """Optimizer steps in all (paper: 300,000, then a cooldown of 5,000 at 1e-5)."""
    batch_size: int = 1024
    """Windows of one step over all ranks."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    weight_decay: float = 0.4
    """AdamW's decay, on the weights of linear and convolution layers only."""
    num_winners: int = 1
    """Of a position's K candidates, this many with the lowest losses are trained, their mean loss
    (paper: 1). More: samples nearer to a possible future, over fewer of them (docs/findings.md)."""
    num_winners_schedule: tuple[tuple[int, int], ...] = ()
    """Winners of a position by step: pairs of the first step (from 0) and their number; none:
    num_winners at every step."""
    rollout_probability: float = 0.0
    """Share of windows, drawn anew every step, that are trained as in a rollout: from a drawn token
    on they see the model's own predictions (with the winners' noise) in place of the true tokens;
    what they are to predict stays. 0: none, as the paper. The passes that make those predictions,
    one a token and each of one winner, are not counted as FLOPs."""
    num_samples_schedule: tuple[tuple[int, int], ...] = ()
    """Candidates K of a position by step: pairs of the first step (from 0) and K; none:
    model.num_samples_train at every step."""
    selection_dtype: SelectionDtype = "auto"
    """Arithmetic of the selection only; auto: that of `precision`. bfloat16: three times as fast
    on a CPU that has it. float8: MLP products in e4m3, on GPUs of compute capability 8.9 or more
    (H100, H200). Losses are compared in float32."""
    selection_finalists: int = 1
    """With a selection_dtype: this many of its best candidates are compared again in the arithmetic
    of `precision`, which decides; 1: none."""
    selection_max_regret: float = 0.01
    """With a selection_dtype: the run stops if the regret in float32, (loss of the pick - lowest
    loss) / lowest loss, is above this on average. Measured whenever a line is logged
    (selection_regret, and selection_agreement: the share of equal picks)."""
    selection_check_windows: int = 4
    """Windows of a portion on which they are measured."""
    selection_memory_mb: int | None = None
    """Activations of the candidates that are predicted at a time, megabytes; none: 64 on cpu, 1024
    elsewhere. Bounds memory, changes nothing else."""
    compile_selection: bool | None = None
    """Compile the selection (DeltaWorld's only), apart from the model; none: as `compile`."""

    MAY_CHANGE: ClassVar[frozenset[str]] = TrainConfig.MAY_CHANGE | {
        *("deltas", "patches"),
        *("selection_memory_mb", "compile_selection", "selection_check_windows"),
        # Which of nearly equal candidates win: a run that stops for its regret may go on.
        *("selection_dtype", "selection_finalists", "selection_max_regret"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(
            1,
            selection_memory_mb=self.selection_memory_mb,
            selection_finalists=self.selection_finalists,
            selection_check_windows=self.selection_check_windows,
        )
        check_at_least(0, selection_max_regret=self.selection_max_regret)
        if self.selection_finalists > 1 and self.selection_dtype == "auto":
            raise UsageError(
                f"selection_finalists {self.selection_finalists}: wanted a selection_dtype as "
                "well, whose best candidates are compared again; set one, or leave this out"
            )
        if not 0 <= self.rollout_probability <= 1:
            raise UsageError(
                f"rollout_probability {self.rollout_probability}: wanted a share between 0 and 1"
            )
        check_at_least(1, num_winners=self.num_winners)
        check_schedule("num_samples_schedule", self.num_samples_schedule, unit="K")
        check_schedule("num_winners_schedule", self.num_winners_schedule, unit="WINNERS")

    def memory_settings(self, num_ranks: int) -> list[str]:
        now = self.selection_memory_mb or "unset: 1024"
        return [*super().memory_settings(num_ranks), f"lower selection_memory_mb, now {now}"]

    def num_samples_at(self, step: int, *, default: int) -> int:
        """Candidates of a step (from 0); default: where no schedule says it."""
        return scheduled(self.num_samples_schedule, step, default=default)

    def num_winners_at(self, step: int) -> int:
        """Winners of a step (from 0)."""
        return scheduled(self.num_winners_schedule, step, default=self.num_winners)

    def check_winners(self, model: PredictorConfig) -> None:
        """UsageError for more winners than a step has candidates, or than are compared again, and
        for a model without any."""
        if not model.use_bom:
            if self.num_winners != 1 or self.num_winners_schedule:
                raise UsageError(
                    "num_winners: wanted 1 and no num_winners_schedule with model.use_bom false, "
                    "which has no candidates; leave them out, or set model.use_bom true"
                )
            return
        starts = {step for step, _ in (*self.num_winners_schedule, *self.num_samples_schedule)}
        for step in sorted(starts | {0}):
            num_winners = self.num_winners_at(step)
            num_samples = self.num_samples_at(step, default=model.num_samples_train)
            if num_winners > num_samples:
                raise UsageError(
                    f"num_winners {num_winners} at step {step}: wanted at most its candidates, "
                    f"{num_samples}; set fewer winners, or a higher model.num_samples_train or "
                    "num_samples_schedule"
                )
            if 1 < self.selection_finalists < num_winners:
                raise UsageError(
                    f"selection_finalists {self.selection_finalists}: wanted at least num_winners, "
                    f"{num_winners} at step {step}, which are chosen among them"
                )


def check_schedule(name: str, schedule: tuple[tuple[int, int], ...], *, unit: str) -> None:
    """UsageError unless the steps rise from 0 and every count is at least 1."""
    steps = [step for step, _ in schedule]
    if steps and (steps[0] != 0 or steps != sorted(set(steps))):
        raise UsageError(
            f"{name} begins at the steps {steps}: wanted 0 first, then rising steps; give "
            f"[[0, {unit}], [step, {unit}], ...]"
        )
    for _, count in schedule:
        check_at_least(1, **{name: count})


def scheduled(schedule: tuple[tuple[int, int], ...], step: int, *, default: int) -> int:
    """The count of a step; default: where there is no schedule."""
    begun = [count for first, count in schedule if first <= step]
    return begun[-1] if begun else default


@dataclass(frozen=True, kw_only=True)
class WorldTrainConfig(SelectionConfig):
    """deltatok-train world: delta-token cache -> DeltaWorld. A sample is a window."""

    deltas: Place
    """Delta-token cache to train on."""
    model: DeltaWorldConfig = field(default_factory=DeltaWorldConfig)
    """The world model (use_bom false: discriminative). Its hidden_size is the cache's; one set to
    anything but the default must agree with the cache."""
    predictor: PredictorName = "cross-attention"
    """cross-attention: queries gather from the raw past tokens in every block, the paper's.
    self-attention: a plain transformer over past tokens and one query, which needs model.use_bom
    false."""
    eval_every: int = 5000
    """Steps between two evaluations."""
    save_every: int = 5000
    """Steps between two checkpoints; a kill loses at most this many."""
    validation_windows: int = 512
    """Windows of the validation clips that an evaluation uses, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_winners(self.model)
        if self.predictor == "self-attention" and self.model.use_bom:
            raise UsageError(
                "predictor self-attention: has one learned query, got model.use_bom true: set it "
                "to false, or leave the predictor out"
            )


@dataclass(frozen=True, kw_only=True)
class DINOWorldTrainConfig(SelectionConfig):
    """deltatok-train dinoworld: patch-token cache -> DINO-world, the baseline without delta tokens.
    A sample is a window. Optimizer settings are DeltaWorld's; the paper gives no others."""

    patches: Place
    """Patch-token cache to train on."""
    model: DINOWorldConfig = field(default_factory=DINOWorldConfig)
    """The world model (use_bom true: best-of-many). Its hidden_size is the cache's; one set to
    anything but the default must agree with the cache."""
    batch_size: int = 1024
    """Windows of one step over all ranks; micro_batch_size says how many a device takes at once
    (at 256 px, a window has 1,792 queries)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_winners(self.model)


DRAWN_WINDOWS = 4
DRAWN_FRAMES = 8
"""Windows of a clip and frames of a window, drawn among the frames of a `uniform` cache: what
deltatok-extract draws from videos."""


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Patch-token cache + tokenizer -> delta-token cache."""

    patches: Place
    """Patch-token cache to read."""
    tokenizer: str
    """Model folder of the tokenizer."""
    out: Place
    """Delta-token cache to write; run again to go on."""
    num_windows: int | None = None
    """Windows to draw from a clip; for a `uniform` cache only, none given: 4."""
    num_frames: int | None = None
    """Frames in a drawn window; for a `uniform` cache only, none given: 8."""
    seed: int | None = None
    """Decides the drawn windows and their order; for a `uniform` cache only, none given: 0."""
    shard_of: str | None = None
    """i/n: make only the shards whose number is i modulo n, the ranks of a launcher every so
    many-th of these; the run that finds all made finishes the cache."""
    batch_windows: int = 8
    """Windows encoded at once."""
    device: Device = "auto"
    """Where to compute; auto: cuda, else mps, else cpu."""
    autocast: Precision = "auto"
    """Arithmetic of the encoder; auto: bfloat16 on cuda, float32 elsewhere."""

    def __post_init__(self) -> None:
        parse_shard_of(self.shard_of)
        check_at_least(
            1,
            batch_windows=self.batch_windows,
            num_windows=self.num_windows,
            num_frames=self.num_frames,
        )
        check_at_least(0, seed=self.seed)
        check_choices(self)


@dataclass(frozen=True, kw_only=True)
class HeadTrainConfig(TrainConfig):
    """deltatok-train head: patch-token cache + labels -> linear segmentation or depth head.

    A sample is a labelled frame, in an evaluation cache one crop of it. The optimizer settings are
    guesses after the usual linear protocol."""

    patches: Place
    """Evaluation cache (deltatok-extract --dataset, its training split), or patch-token cache of
    whole frames (uniform sampling: no crop, no flip)."""
    labels: str
    """Evaluation cache: the data set's folder. Uniform cache: folder with CLIP_KEY.npy: uint8
    (frames, height, width), 255 = ignore."""
    num_classes: int | None = None
    """Classes, labelled 0 to num_classes - 1; none given: those of the data set, where it is one
    that has a number of them (vspw 124, cityscapes 19, masks 2)."""
    max_depth: float | None = None
    """Depth: the largest that the head can say, metres; what lies beyond is not trained on. None
    given: 80, KITTI's."""
    steps: int = 40_000
    """Optimizer steps in all."""
    batch_size: int = 16
    """Samples of one step over all ranks."""
    lr: float = 1e-3
    """Learning rate after the warm-up."""
    warmup_steps: int = 1500
    """Steps of linear warm-up; the very first step has learning rate 0."""
    weight_decay: float = 1e-3
    """AdamW's decay, on the weights of linear and convolution layers only."""

    MAY_CHANGE: ClassVar[frozenset[str]] = TrainConfig.MAY_CHANGE | {"patches"}
    ORDER_FOLLOWS_RESIDENCY: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(max_depth=self.max_depth)
        if self.num_classes is not None and not 2 <= self.num_classes <= 255:
            raise UsageError(
                f"num_classes {self.num_classes}: wanted 2 to 255 (255 itself means ignore)"
            )
