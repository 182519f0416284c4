"""Durations and sizes as people write them: `90s`, `30m`, `1h30m`; `500MB`, `10GB`, `1.5TiB`.

Called by config.py.
"""

import re

from ..shards.errors import UsageError

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_BYTES: dict[str, int] = {"b": 1, "": 1} | {
    f"{letter}{suffix}": int(base**power)
    for suffix, base in (("b", 1000), ("ib", 1024))
    for power, letter in enumerate("kmgtp", start=1)
}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd])\s*")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_duration_s(text: str, *, name: str) -> float:
    """Seconds of a duration; a number alone is seconds. UsageError, naming `name`, otherwise."""
    number = re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", text.strip())
    if number:
        return float(text)
    parts = _DURATION.findall(text)
    if not parts or _DURATION.sub("", text).strip():
        raise UsageError(f"{name}: got {text!r}, wanted a duration such as 90s, 30m or 1h30m")
    return sum(float(count) * _SECONDS[unit] for count, unit in parts)


def parse_size_bytes(text: str, *, name: str) -> int:
    """Bytes of a size; a number alone is bytes. UsageError, naming `name`, otherwise."""
    match = _SIZE.fullmatch(text.strip())
    if not match or match[2].lower() not in _BYTES:
        raise UsageError(f"{name}: got {text!r}, wanted a size such as 500MB, 10GB or 1.5TiB")
    return round(float(match[1]) * _BYTES[match[2].lower()])
