"""Why forecasts are no better than copying the last frame, where the probes say so.

    report.json    "diagnosis": [{"cause", "measured": {name: number}, "next_step"}, ...]

What to see to first comes first: while the tokenizer is at fault, nothing is said of a world model,
whose forecasts go through it. The list is empty where no probe shows a fault.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...train.config import TokenizerTrainConfig
from ..report.rows import ReportRow, find_value
from .config import ForecastConfig

NO_BETTER = 0.95
"""Tokenizer loss / loss of copying from which on a tokenizer reconstructs nothing (a guess: the
quickstart's is at 0.2, an untrained one at 1.00)."""
STUCK = TokenizerTrainConfig.stuck_threshold
"""z_swap_ratio below which a decoder ignores its delta token, as in training."""
ALIKE = 0.01
"""Sample spread / motion below which all samples are one (a guess)."""
EXACT = 0.1
"""Loss of the best sample / of copying below which samples may well be one: what comes is known
(a guess)."""


def diagnose(
    config: ForecastConfig, rows: Sequence[ReportRow], probes: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The faults that rows and probes show; see the file's docstring."""
    found = _tokenizer(config, probes) or _world(config, rows, probes)
    return found + _head(config, rows)


def diagnosis_text(fault: Mapping[str, Any]) -> str:
    """A fault as a line: its cause, what was measured, what to do."""
    measured = ", ".join(f"{name} {value:.4g}" for name, value in fault["measured"].items())
    return f"diagnosis: {fault['cause']} Measured: {measured}. {fault['next_step']}"


def _tokenizer(config: ForecastConfig, probes: Mapping[str, Any]) -> list[dict[str, Any]]:
    copied, swap = probes["copy_last_ratio"], probes["z_swap_ratio"]
    if copied is None:
        return [
            _fault(
                "Nothing moves: consecutive frames of the cache have the same features.",
                {"copy_last_feature_loss": 0.0},
                "Extract clips in which something moves, or with more time between the frames "
                "(--fps).",
            )
        ]
    is_stuck = swap is not None and swap < STUCK
    if copied < NO_BETTER and not is_stuck:
        return []
    measured = {"copy_last_ratio": copied, "z_swap_ratio": swap}
    measured |= {"zero_z_ratio": probes["zero_z_ratio"], "steps": _steps(config.tokenizer)}
    again = "then write the delta tokens and train the world models again."
    longer = "Train it for more --steps (the quickstart's small one takes 1200)"
    escape = (
        "into another --out with --set model.layer_scale_init=0.1 (or --wide-pair-fraction 0.5)"
    )
    if copied < NO_BETTER:
        cause = "The tokenizer ignores its delta token: swapping it between windows changes nothing"
        return [_fault(f"{cause}.", measured, f"Train it again, {escape}; {again}")]
    cause = "The tokenizer reconstructs no better than copying the last frame: it is untrained"
    if is_stuck:
        return [
            _fault(
                f"{cause}, or its decoder ignores the delta token.",
                measured,
                f"{longer}; if the ratios stay, train it {escape}; {again}",
            )
        ]
    return [_fault(f"{cause}.", measured, f"{longer}; {again}")]


def _world(
    config: ForecastConfig, rows: Sequence[ReportRow], probes: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Of the world model if there is one, else of the discriminative one."""
    row, folder = (
        ("best", config.world) if config.world else ("discriminative", config.discriminative)
    )
    if folder is None:
        return []
    forecast, copied = (
        find_value(rows, horizon="mid", row=name, metric="feature_loss")
        for name in (row, "copy_last")
    )
    spread = probes.get("sample_spread", {}).get("mid")
    if forecast is None or not copied:
        return []
    ratio = forecast / copied
    measured = {f"{row}_over_copy_last": ratio, "sample_spread": spread, "steps": _steps(folder)}
    if ratio >= 1:
        what = "best sample" if row == "best" else "forecast"
        return [
            _fault(
                f"The world model's {what} is no better than copying the last frame, though the "
                "tokenizer is: it is untrained.",
                measured,
                "Train the world model for more --steps, as long as validation_loss falls in its "
                "log.jsonl.",
            )
        ]
    has_noise = config.num_samples > 1 and config.noise_scale > 0
    if has_noise and spread is not None and spread < ALIKE and ratio > EXACT:
        return [
            _fault(
                "All samples of the world model are alike: it ignores its noise.",
                measured,
                "Train the world model for more --steps, with more candidates (--set "
                "model.num_samples_train=64) or wider noise (--set model.initializer_range=0.05).",
            )
        ]
    return []


def _head(config: ForecastConfig, rows: Sequence[ReportRow]) -> list[dict[str, Any]]:
    if config.head is None:
        return []
    metric = next(row.metric for row in rows if row.metric in ("miou", "rmse"))
    present, copied = (
        find_value(rows, horizon="mid", row=name, metric=metric)
        for name in ("present", "copy_last")
    )
    if present is None or copied is None:
        return []
    if (present > copied) if metric == "miou" else (present < copied):
        return []
    return [
        _fault(
            "The head reads no more of the labels from the true future than from the last frame "
            "seen: it is untrained, or the labels do not move.",
            {
                f"present_{metric}": present,
                f"copy_last_{metric}": copied,
                "steps": _steps(config.head),
            },
            "Train the head for more --steps, and look at its pictures beside the labels.",
        )
    ]


def _fault(cause: str, measured: Mapping[str, float | None], next_step: str) -> dict[str, Any]:
    known = {name: value for name, value in measured.items() if value is not None}
    return {"cause": cause, "measured": known, "next_step": next_step}


def _steps(folder: str) -> int | None:
    """The optimizer steps of a run folder; None for a model that came without its run."""
    try:
        run = json.loads((Path(folder) / "train.json").read_text(encoding="utf-8"))
        steps = run["config"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None
