"""The text that `deltatok-extract --plan` prints of an ExtractionPlan."""

from .plan_result import CacheCost, ExtractionPlan

UNITS = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def plan_text(plan: ExtractionPlan) -> str:
    """Some twenty lines, without a newline at the end."""
    lines = [
        "nothing has been written yet; this is what the extraction would take",
        f"clips      {plan.clips} ({_bytes(plan.source_bytes)} of video), {plan.probed} timed",
        f"quarantine {_quarantine(plan)}",
        *(f"           {clip}: {reason}" for clip, reason in list(plan.quarantined.items())[:3]),
        f"windows    {plan.windows} of {plan.frames // max(plan.windows, 1)} frames: "
        f"{plan.frames} frames of {plan.frame_size} px in {plan.shards} shards{_error(plan)}",
        "",
        f"{'cache':<12}{'bytes':>10}{'a frame':>10}{'files':>9}{'GB/s to keep':>15}"
        f"{'storing beats':>22}",
        f"{'':<12}{'':>10}{'':>10}{'':>9}{'the device busy':>16}{'recomputing':>21}",
        *(_row(name, cost, chosen=_is(plan, name)) for name, cost in plan.caches.items()),
        f"(recomputing: decoding and {_networks(plan)} in every epoch)",
        "",
        f"device     {plan.device}: {plan.forward.frames_per_s:.3g} frames/s "
        f"({plan.forward.batches} batches of {plan.forward.batch_frames} frames timed), "
        f"{hours_text(plan.device_hours)} of the device",
        f"decoding   {hours_text(plan.decode_core_hours)} of a core, in {plan.workers} processes",
        f"clock      about {hours_text(plan.clock_hours)} on this machine, "
        f"the slowest stage: {plan.slowest_stage}",
        f"memory     {_device_memory(plan)}at most about {_bytes(plan.host_peak_bytes)} "
        "of main memory",
        f"disk       {_bytes(plan.disk.free_bytes)} free in {plan.disk.folder}, "
        f"writes {plan.disk.write_bytes_per_s / 1e9:.2f} GB/s, "
        f"reads {plan.disk.read_bytes_per_s / 1e9:.2f} GB/s",
    ]
    needed = next(cost for name, cost in plan.caches.items() if _is(plan, name)).size.bytes
    if needed > plan.disk.free_bytes:
        lines.append(
            f"TOO LARGE  {_bytes(needed)} are needed: take fewer windows, a smaller frame size or "
            "dtype, delta tokens (--tokenizer), or another --out"
        )
    return "\n".join(lines)


def _is(plan: ExtractionPlan, name: str) -> bool:
    return name == ("float16" if plan.kind == "bfloat16" else plan.kind)


def _quarantine(plan: ExtractionPlan) -> str:
    found = f"({len(plan.quarantined)} of {plan.counted} looked at)"
    if plan.counted == plan.clips:
        return f"{100 * plan.quarantined_share:.3g} % {found}"
    error = 200 * plan.quarantined_share_error
    return f"about {100 * plan.quarantined_share:.3g} % {found}, give or take {error:.2g} %"


def _error(plan: ExtractionPlan) -> str:
    """Two standard errors of the number of windows, and so of bytes and hours."""
    if plan.counted == plan.clips:
        return ""
    return f", give or take {200 * plan.windows_error / max(plan.windows, 1):.2g} %"


def _row(name: str, cost: CacheCost, *, chosen: bool) -> str:
    when = "never: the disk is slower"
    if cost.break_even_epochs is not None:
        when = f"from epoch {cost.break_even_epochs} on"
    return (
        f"{name + (' <-' if chosen else ''):<12}{_bytes(cost.size.bytes):>10}"
        f"{_bytes(cost.size.bytes_per_frame):>10}{cost.size.files:>9}"
        f"{cost.busy_gb_per_s:>14.4f}  {when:>22}"
    )


def _networks(plan: ExtractionPlan) -> str:
    return "the backbone and the tokenizer" if plan.kind == "deltas" else "the backbone"


def _device_memory(plan: ExtractionPlan) -> str:
    if plan.forward.device_peak_bytes is None:
        return ""
    return f"{_bytes(plan.forward.device_peak_bytes)} of the device, "


def _bytes(count: float) -> str:
    for size, unit in UNITS:
        if count >= size:
            return (
                f"{count / size:.3g} {unit}" if count < 999 * size else f"{count / size:.0f} {unit}"
            )
    return f"{count:.0f} B"


def hours_text(hours: float) -> str:
    """Like "1.5 hours", "12 minutes" or "3.1 seconds"."""
    if hours >= 1:
        return f"{hours:.3g} hours"
    return f"{hours * 60:.3g} minutes" if hours >= 1 / 60 else f"{hours * 3600:.3g} seconds"
