"""What an extraction is: one frozen dataclass, one field a flag of `deltatok-extract`.

    RunConfig                        backbone, storage, limits: whatever the frames come from
        ExtractConfig                videos (here)
        datasets.base.DatasetConfig  labelled data sets

The text under a field is its help text. Whatever cannot be meant is refused here, before a clip is
opened. Durations and sizes are as people write them: `90s`, `30m`, `1h30m`; `500MB`, `1.5TiB`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..shards.errors import UsageError
from ..shards.evaluation.geometry import FrameSize, frame_shape
from ..shards.running.parts import parse_shard_of
from ..shards.sampling import KINETICS_STRIDE_RANGE_S, SamplingPolicy
from ..shards.schema import PathOrAddress, Place

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_BYTES = {"": 1.0, "b": 1.0} | {
    f"{letter}{suffix}": float(base**power)
    for suffix, base in (("b", 1000), ("ib", 1024))
    for power, letter in enumerate("kmgtp", start=1)
}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def _parse_amount(text: str, units: Mapping[str, float], *, name: str, wanted: str) -> float:
    """The sum of amounts with `units`, or a number alone; UsageError, naming `name`, otherwise."""
    parts = [(float(number), unit.lower()) for number, unit in _AMOUNT.findall(text)]
    used = {unit for _, unit in parts}
    known = used <= units.keys() and ("" not in used or len(parts) == 1)
    if not parts or not known or _AMOUNT.sub("", text).strip():
        raise UsageError(f"{name}: got {text!r}, wanted {wanted}")
    return sum(number * units[unit] for number, unit in parts)


BATCH_FRAMES = {"cpu": 32, "cuda": 64}
"""By device. On 2 cores a ViT-B is as fast with 32 as with 64; that for a GPU is a guess."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a patch-token cache is made."""

    out: Place
    """Folder of the cache; one that is already there is gone on with."""
    limit: int | None = None
    """Only this many clips: the first in the seeded order of the plan, so that a higher limit
    keeps them."""
    shard_of: str | None = None
    """i/n: make only the shards whose number is i modulo n (0/4 to 3/4 on four machines); the ranks
    of a launcher divide these among themselves. Machines that share no folder: then copy all
    shards/ into one `out` and run again there; a run that finds all shards made finishes the
    cache."""
    backbone: str = "facebook/dinov3-vitb16-pretrain-lvd1689m"
    """Hub id or local folder of the frozen vision model, in transformers' format: DINOv3 (ViT,
    ConvNeXt), DINOv2 (also with registers), SigLIP, SigLIP 2 or CLIP."""
    layers: tuple[int, ...] = ()
    """Blocks of the backbone, 1 being the first, whose patch tokens are put side by side, each
    through the final norm: 3,6,9,12 gives tokens four times as wide [the last block alone]."""
    pca: int | str | None = None
    """Store only this many principal components of the tokens, each channel standardised first:
    fitted once, on 64 clips of the run. A folder: the components of the cache there, which other
    caches of the same models must have (evaluation, validation)."""
    frame_size: FrameSize = 512
    """What the backbone sees, in pixels: the side of a square (512), or height x width (448x896).
    A data set's frames are cut into squares, or, for a rectangle, seen whole."""
    dtype: Literal["float16", "bfloat16", "int8"] = "float16"
    """How the tokens are stored: float16, bfloat16 or int8. int8 takes half the space; a scale a
    channel is fitted on 64 clips first, a scale a token is stored beside it."""
    compression: Literal["none", "zstd"] = "none"
    """none or zstd, which saves a few per cent and makes reading slower; it changes no number."""
    workers: int | None = None
    """Decoding processes; none given: one for every CPU core this process may use."""
    seed: int = 0
    """Decides every window, crop and flip, and the order of clips in shards."""
    max_quarantined: float = 0.05
    """The run fails (exit code 3) if more than this share of the clips gives no windows, 0..1."""
    retry_quarantined: bool = False
    """Decode the clips in quarantine again."""
    device: str = "auto"
    """Where the backbone runs: auto, cpu, cuda or cuda:N."""
    autocast: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the backbone; auto: bfloat16 on cuda, float32 on the CPU."""
    compile: bool = False
    """Compile the backbone (torch.compile): pays on GPUs after a minute or so. Tokens change by
    rounding, so keep to one setting within a cache."""
    frames_per_shard: int = 512
    """Frames in a shard, about: a shard holds whole clips."""
    batch_frames: int | None = None
    """Frames in one pass through the backbone; none given: 32 on the CPU, 64 on a GPU. A shard's
    last batch is filled up with zeros, which costs a CPU time."""
    decode_timeout_s: float = 60.0
    """Wall-clock seconds a clip may take before its decoder is killed; twice, then quarantine."""
    min_free: str = "1GB"
    """Stop (exit code 1) before a shard that would leave less room than this on the disk of `out`;
    like 500MB, 10GB."""
    time_limit: str | None = None
    """Stop (exit code 75) after this long; like 90s, 30m, 1h30m."""

    def frames_per_batch(self, device_type: str) -> int:
        """`batch_frames` where it is given, else what suits "cpu" or "cuda"."""
        if self.batch_frames is not None:
            return self.batch_frames
        return BATCH_FRAMES[device_type]

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Height and width of the frames the backbone sees, in pixels."""
        return frame_shape(self.frame_size)

    @property
    def min_free_bytes(self) -> int:
        wanted = "a size such as 500MB, 10GB or 1.5TiB"
        return round(_parse_amount(self.min_free, _BYTES, name="min_free", wanted=wanted))

    @property
    def time_limit_s(self) -> float | None:
        if self.time_limit is None:
            return None
        wanted = "a duration such as 90s, 30m or 1h30m"
        return _parse_amount(self.time_limit, _SECONDS, name="time_limit", wanted=wanted)

    def __post_init__(self) -> None:
        if not self.out:
            raise UsageError("out: empty, wanted the folder to write the cache to")
        for name in ("frames_per_shard", "batch_frames", "workers", "limit"):
            check_count(name, getattr(self, name))
        valid = min(self.frame_shape) >= 1
        check("frame_size", self.frame_size, valid, "a side in pixels, or height x width")
        parse_shard_of(self.shard_of)
        if isinstance(self.pca, int):
            check_count("pca", self.pca)
        layers = self.layers
        valid = all(layer >= 1 for layer in layers) and len(set(layers)) == len(layers)
        check("layers", layers, valid, "different blocks, counted from 1, such as 3,6,9,12")
        check("seed", self.seed, 0 <= self.seed < 2**63, "0..2**63-1")
        check("max_quarantined", self.max_quarantined, 0 <= self.max_quarantined <= 1, "0..1")
        check("decode_timeout_s", self.decode_timeout_s, positive(self.decode_timeout_s), "> 0")
        check("min_free", self.min_free, self.min_free_bytes >= 0, "a size")
        limit_s = self.time_limit_s
        check("time_limit", self.time_limit, limit_s is None or limit_s > 0, "more than 0 s")


def check(name: str, value: object, valid: bool, wanted: str) -> None:
    """Raises UsageError that names the field unless `valid`."""
    if not valid:
        raise UsageError(f"{name}: got {value!r}, wanted {wanted}: change it and run again")


def check_count(name: str, value: int | None) -> None:
    """Raises UsageError that names the field for a number below 1."""
    check(name, value, value is None or value >= 1, "1 or more")


def positive(value: float) -> bool:
    """Whether it is a finite number above 0."""
    return math.isfinite(value) and value > 0


DecoderChoice = Literal["auto", "decord", "torchcodec", "pyav"]
"""Who tries a video first; PyAV reads what the others cannot be trusted with."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(RunConfig):
    """Videos in, a patch-token cache out."""

    videos: tuple[PathOrAddress, ...]
    """Videos: files, folders (searched recursively; also for folders of frames named
    *_<seconds>.jpg), lists (.txt, .csv, .jsonl, Kinetics' annotations), uncompressed .tar of
    videos, .zip of videos or of such folders (also split); addresses of videos or of folders of
    videos (s3://, gs://, az://, hf://datasets/..., file://), also as the lines of a list."""
    root: PathOrAddress | None = None
    """Where the paths in lists start and Kinetics' names are looked up (a folder, .tar or .zip, or
    an address); none given: the list's own folder. No path in a list reaches anything outside of
    it."""
    exclude: str | None = None
    """File with one clip a line to leave out: its key, class/name or name, with or without
    .mp4. A line that names no clip is an error."""
    split: str | None = None
    """Only clips of this split, by the list or archive that names it, else by a folder of that
    name in the clip's key."""
    sampling: Literal["windows", "uniform"] = "windows"
    """windows: random windows, crops and flips as the paper trains; uniform: a fixed frame rate,
    whole frames, every window of the clip (evaluation)."""
    num_windows: int = 4
    """Windows drawn from a clip (sampling windows)."""
    num_frames: int = 8
    """Frames in a window."""
    time_stride_range: tuple[float, float] = KINETICS_STRIDE_RANGE_S
    """Smallest and largest gap between two frames of a window, in seconds (sampling windows)."""
    crop_scale: tuple[float, float] = (0.6, 1.0)
    """Smallest and largest share of the frame's area a crop covers (sampling windows)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop (sampling windows), where the frames are
    square; for a rectangle times its own, so that crops are stretched as little."""
    flip_probability: float = 0.5
    """How often a window is mirrored left to right, 0..1 (sampling windows)."""
    fps: float | None = None
    """Frames a second to take (sampling uniform; it has no default)."""
    min_frames: int = 2
    """A clip that shows fewer different frames than this goes to quarantine: every window of a
    one-frame clip would be a still. A clip shorter than a window is taken, as the release does:
    the nearest frames, some of them twice, with their true times."""
    decode_threads: int = 1
    """Threads in one decoding process; 1 is best as long as there are workers for every core.
    What a decoder makes up for damaged parts of a frame can differ with this number."""
    decoder: DecoderChoice = "auto"
    """Who decodes: decord (passes through every frame), torchcodec (an extra; seeks, faster on
    long videos), pyav (slowest). The pixels are the same; PyAV takes what the others are not exact
    on. auto: decord where it is installed, else torchcodec, else pyav."""
    append: bool = False
    """Add the videos that a cache in `out` does not have yet as new shards. What it has stays,
    whether its videos are still given or not."""

    def sampling_policy(self) -> SamplingPolicy:
        """How windows are drawn."""
        height, width = self.frame_shape
        return SamplingPolicy(
            policy=self.sampling,
            num_frames=self.num_frames,
            num_windows=self.num_windows,
            time_stride_range=self.time_stride_range,
            crop_scale=self.crop_scale,
            crop_ratio=self.crop_ratio,
            flip_probability=self.flip_probability,
            fps=self.fps,
            seed=self.seed,
            min_frames=self.min_frames,
            aspect=width / height,
        )

    def __post_init__(self) -> None:
        if not self.videos:
            raise UsageError("videos: none given, wanted at least one file, folder or .txt list")
        super().__post_init__()
        for name in ("num_windows", "num_frames", "min_frames", "decode_threads"):
            check_count(name, getattr(self, name))
        flip = self.flip_probability
        check("flip_probability", flip, 0 <= flip <= 1, "0..1")
        for name in ("time_stride_range", "crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            valid = positive(low) and positive(high) and low <= high
            check(name, (low, high), valid, "two positive numbers, the smaller first")
        check("crop_scale", self.crop_scale, self.crop_scale[1] <= 1, "at most 1")
        if self.sampling == "uniform":
            rate = self.fps is not None and positive(self.fps)
            check("fps", self.fps, rate, "frames a second, above 0, with sampling uniform")
        else:
            check("fps", self.fps, self.fps is None, "no value unless sampling is uniform")
