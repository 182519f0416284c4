"""What every extraction is told, whatever its frames come from: backbone, storage, limits.

ExtractConfig (videos) and DatasetConfig (evaluation data sets) are this and more.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from ..shards.errors import UsageError
from .quantities import parse_duration_s, parse_size_bytes

BATCH_FRAMES = {"cpu": 32, "cuda": 64}
"""By device. On 2 cores a ViT-B is as fast with 32 as with 64; that for a GPU is a guess."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a patch-token cache is made."""

    out: str
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
    """Hub id or local folder of the frozen DINOv3."""
    frame_size: int = 512
    """Side of the square frames the backbone sees, in pixels."""
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
    def min_free_bytes(self) -> int:
        return parse_size_bytes(self.min_free, name="min_free")

    @property
    def time_limit_s(self) -> float | None:
        if self.time_limit is None:
            return None
        return parse_duration_s(self.time_limit, name="time_limit")

    def __post_init__(self) -> None:
        if not self.out:
            raise UsageError("out: empty, wanted the folder to write the cache to")
        for name in ("frame_size", "frames_per_shard"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        batch = self.batch_frames
        check("batch_frames", batch, batch is None or batch >= 1, "1 or more")
        check("workers", self.workers, self.workers is None or self.workers >= 1, "1 or more")
        check("limit", self.limit, self.limit is None or self.limit >= 1, "1 or more")
        parse_shard_of(self.shard_of)
        check("seed", self.seed, 0 <= self.seed < 2**63, "0..2**63-1")
        check("max_quarantined", self.max_quarantined, 0 <= self.max_quarantined <= 1, "0..1")
        check("decode_timeout_s", self.decode_timeout_s, positive(self.decode_timeout_s), "> 0")
        check("min_free", self.min_free, self.min_free_bytes >= 0, "a size")
        limit_s = self.time_limit_s
        check("time_limit", self.time_limit, limit_s is None or limit_s > 0, "more than 0 s")
        for name, allowed in (
            ("dtype", ("float16", "bfloat16", "int8")),
            ("compression", ("none", "zstd")),
            ("autocast", ("auto", "float32", "bfloat16")),
        ):
            value = getattr(self, name)
            check(name, value, value in allowed, f"one of {', '.join(allowed)}")


def parse_shard_of(text: str | None) -> tuple[int, int]:
    """(i, n) of "i/n": the shards of this run are those with number % n == i; all for None.

    Raises UsageError unless 0 <= i < n.
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", "0/1" if text is None else text)
    part, parts = map(int, match.groups()) if match else (0, 0)
    check("shard_of", text, part < parts, "i/n with i from 0 to n - 1, like 0/4")
    return part, parts


def check(name: str, value: object, valid: bool, wanted: str) -> None:
    """Raises UsageError that names the field unless `valid`."""
    if not valid:
        raise UsageError(f"{name}: got {value!r}, wanted {wanted}: change it and run again")


def positive(value: float) -> bool:
    """Whether it is a finite number above 0."""
    return math.isfinite(value) and value > 0
