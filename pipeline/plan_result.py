"""What `--plan` says: made by plan.py, printed by plan_text.py, written by extract_command.py."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .plan_bytes import CacheSize
from .plan_probe import DiskProbe, ForwardProbe


@dataclass(frozen=True, kw_only=True)
class CacheCost:
    """One kind of cache: float16, int8 or deltas."""

    size: CacheSize
    busy_gb_per_s: float
    """GB/s that have to be written to keep the device busy."""
    break_even_epochs: int | None
    """Passes over the windows from which on storing them takes less time than to decode and
    compute them in every pass (the tokenizer only where one is given); None: never, the disk is
    slower than computing."""


@dataclass(frozen=True, kw_only=True)
class ExtractionPlan:
    """All that `--plan` says. Seconds and hours are estimates for this machine."""

    out: str
    kind: str
    """Which of `caches` the settings ask for: float16, bfloat16, int8 or deltas."""
    clips: int
    source_bytes: int
    counted: int
    """Clips looked at: opened, their windows counted."""
    probed: int
    """Clips decoded and timed."""
    quarantined: dict[str, str]
    """Counted clip that would go to quarantine -> why."""
    quarantined_share: float
    """0..1 of all clips, as estimated from those that were counted."""
    quarantined_share_error: float
    """Standard error of that; 0 where all clips were counted."""
    windows: int
    """Expected; exact if all clips were counted."""
    windows_error: float
    """Standard error of `windows`; that of bytes and hours is the same share of them, as far as
    it comes from the sample of clips."""
    frames: int
    shards: int
    device: str
    frame_size: int
    caches: dict[str, CacheCost]
    forward: ForwardProbe
    """Backbone (and tokenizer, if one is given) on frames in memory."""
    disk: DiskProbe
    workers: int
    """Decoding processes."""
    device_hours: float
    decode_core_hours: float
    clock_hours: float
    """All stages overlapped, on this machine."""
    slowest_stage: str
    host_peak_bytes: int
    """Main process and decoding processes together, at most."""


def as_json(plan: ExtractionPlan) -> Mapping[str, Any]:
    """The plan as plain JSON values."""
    return asdict(plan)
