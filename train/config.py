"""What each training command is told: one frozen dataclass a command, checked when it is made.

    TokenizerTrainConfig   deltatok-train tokenizer    TokenizeConfig   patch cache -> delta cache
    WorldTrainConfig       deltatok-train world        (head, dinoworld: files of their own)

The YAML files and the flags map 1:1 onto the fields. Every default is the released code's or the
paper's for a batch of 1,024 on many GPUs, unless its text says that it is a guess.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from ..shards.errors import UsageError
from .checks import check_at_least, check_choice, check_positive
from .config_selection import SelectionConfig
from .models.configs import DeltaTokConfig, DeltaWorldConfig

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16"]
Residency = Literal["auto", "device", "memory", "map", "stream"]
TokenizerLoss = Literal["log_cosh", "mse"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
TrackerName = Literal["tensorboard", "wandb"]


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
    device: Device = "auto"
    """Where to compute; auto: cuda, else mps, else cpu."""
    trackers: tuple[TrackerName, ...] = ()
    """Where the log goes beside log.jsonl: tensorboard (OUT/tensorboard), wandb (OUT/wandb, offline
    unless WANDB_MODE says otherwise)."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {
            *("out", "steps", "device", "residency", "micro_batch_size"),
            *("log_every", "eval_every", "save_every", "keep_checkpoints"),
            *("compile", "compile_mode", "trackers"),
            "start_from",  # compared by the weights' sha256, not by the path
        }
    )
    """Fields that may differ between a run and its continuation."""

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("auto", "float32", "bfloat16"))
        check_choice("residency", self.residency, get_args(Residency))
        check_choice("device", self.device, ("auto", "cpu", "cuda", "mps"))
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
        check_choice("compile_mode", self.compile_mode, get_args(CompileMode))
        if self.start_optimizer and self.start_from is None:
            raise UsageError("start_optimizer: wanted start_from as well, the run to take it from")
        if not 0 <= self.validation_fraction < 1:
            raise UsageError(
                f"validation_fraction {self.validation_fraction}: wanted 0 (no validation) up to, "
                "not including, 1"
            )


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig(TrainConfig):
    """deltatok-train tokenizer: patch-token cache -> DeltaTok. A sample is a pair of frames."""

    patches: str
    """Patch-token cache to train on."""
    deltas: str | None = None
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
        check_choice("loss", self.loss, ("log_cosh", "mse"))
        check_at_least(0, stuck_after_steps=self.stuck_after_steps)
        check_positive(stuck_threshold=self.stuck_threshold)
        if not 0 <= self.wide_pair_fraction <= 1:
            raise UsageError(
                f"wide_pair_fraction {self.wide_pair_fraction}: wanted a share between 0 and 1"
            )


@dataclass(frozen=True, kw_only=True)
class WorldTrainConfig(TrainConfig, SelectionConfig):
    """deltatok-train world: delta-token cache -> DeltaWorld. A sample is a window."""

    deltas: str
    """Delta-token cache to train on."""
    model: DeltaWorldConfig = field(default_factory=DeltaWorldConfig)
    """The world model (use_bom false: discriminative). Its hidden_size is the cache's; one set to
    anything but the default must agree with the cache."""
    steps: int = 300_000
    """Optimizer steps in all (paper: 300,000, then a cooldown of 5,000 at 1e-5)."""
    batch_size: int = 1024
    """Windows of one step over all ranks."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    weight_decay: float = 0.4
    """AdamW's decay, on the weights of linear and convolution layers only."""
    eval_every: int = 5000
    """Steps between two evaluations."""
    save_every: int = 5000
    """Steps between two checkpoints; a kill loses at most this many."""
    validation_windows: int = 512
    """Windows of the validation clips that an evaluation uses, at most."""

    MAY_CHANGE: ClassVar[frozenset[str]] = (
        TrainConfig.MAY_CHANGE | SelectionConfig.SELECTION_MAY_CHANGE | {"deltas"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_selection()


DRAWN_WINDOWS = 4
DRAWN_FRAMES = 8
"""Windows of a clip and frames of a window, drawn among the frames of a `uniform` cache: what
deltatok-extract draws from videos."""


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Patch-token cache + tokenizer -> delta-token cache."""

    patches: str
    """Patch-token cache to read."""
    tokenizer: str
    """Model folder of the tokenizer."""
    out: str
    """Delta-token cache to write; run again to go on."""
    num_windows: int | None = None
    """Windows to draw from a clip; for a `uniform` cache only, none given: 4."""
    num_frames: int | None = None
    """Frames in a drawn window; for a `uniform` cache only, none given: 8."""
    seed: int | None = None
    """Decides the drawn windows and their order; for a `uniform` cache only, none given: 0."""
    batch_windows: int = 8
    """Windows encoded at once."""
    device: Device = "auto"
    """Where to compute; auto: cuda, else mps, else cpu."""
    autocast: Precision = "auto"
    """Arithmetic of the encoder; auto: bfloat16 on cuda, float32 elsewhere."""

    def __post_init__(self) -> None:
        check_at_least(
            1,
            batch_windows=self.batch_windows,
            num_windows=self.num_windows,
            num_frames=self.num_frames,
        )
        check_at_least(0, seed=self.seed)
        check_choice("device", self.device, ("auto", "cpu", "cuda", "mps"))
        check_choice("autocast", self.autocast, ("auto", "float32", "bfloat16"))
