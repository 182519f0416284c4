"""Checks of config values that the configs of all commands share: each raises UsageError."""

import math

from ..shards.errors import UsageError


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """UsageError unless `value` is one of `choices`."""
    if value not in choices:
        raise UsageError(f"{name} {value!r}: wanted one of {', '.join(choices)}")


def check_at_least(least: int, **values: float | None) -> None:
    """UsageError for the first value that is set and below `least` (or no number)."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise UsageError(f"{name} {value}: wanted at least {least}")


def check_positive(**values: float | None) -> None:
    """UsageError for the first value that is set and not a finite number above 0."""
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{name} {value}: wanted a finite number above 0")
