"""What an extraction is: one frozen dataclass, one field per flag of `deltatok-extract`.

`pipeline/` fills it from YAML and flags, `run.py` does what it says. The text under a field is its
help text. Whatever cannot be meant is refused here, before a clip is opened.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from ..shards.errors import UsageError
from .run_config import RunConfig, check, positive

DecoderChoice = Literal["auto", "decord", "torchcodec", "pyav"]
"""Who tries a video first; PyAV reads what the others cannot be trusted with."""

KINETICS_STRIDE_RANGE_S = (1 / 25, 1 / 3)
"""The paper's gaps between the frames of a training window, in seconds."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(RunConfig):
    """Videos in, a patch-token cache out."""

    videos: tuple[str, ...]
    """Videos: files, folders (searched recursively; also for folders of frames named
    *_<seconds>.jpg), lists (.txt, .csv, .jsonl, Kinetics' annotations), uncompressed .tar of
    videos, .zip of such folders (also split)."""
    root: str | None = None
    """Where the paths in lists start and Kinetics' names are looked up (a folder, .tar or .zip);
    none given: the list's own folder. No list reaches anything outside of it."""
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
    """Smallest and largest width / height of a crop (sampling windows)."""
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

    def __post_init__(self) -> None:
        if not self.videos:
            raise UsageError("videos: none given, wanted at least one file, folder or .txt list")
        super().__post_init__()
        for name in ("num_windows", "num_frames", "min_frames", "decode_threads"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        flip = self.flip_probability
        check("flip_probability", flip, 0 <= flip <= 1, "0..1")
        for name in ("time_stride_range", "crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            valid = positive(low) and positive(high) and low <= high
            check(name, (low, high), valid, "two positive numbers, the smaller first")
        check("crop_scale", self.crop_scale, self.crop_scale[1] <= 1, "at most 1")
        for name, allowed in (
            ("sampling", ("windows", "uniform")),
            ("decoder", get_args(DecoderChoice)),
        ):
            value = getattr(self, name)
            check(name, value, value in allowed, f"one of {', '.join(allowed)}")
        if self.sampling == "uniform":
            rate = self.fps is not None and positive(self.fps)
            check("fps", self.fps, rate, "frames a second, above 0, with sampling uniform")
        else:
            check("fps", self.fps, self.fps is None, "no value unless sampling is uniform")
