"""What makes two caches the same: canonical JSON, its hash, and the first field that differs.

Used through `cache`, which names all of it again.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .checked import is_number, shown
from .errors import CacheMismatch


def fingerprint(format_name: str, format_version: int, identity: Mapping[str, Any]) -> str:
    """ "sha256:" + the hash of [format_name, format_version, identity] as `canonical_json`."""
    text = canonical_json([format_name, format_version, identity])
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def checksum(value: Mapping[str, Any]) -> str:
    """ "sha256:" + the hash of a JSON object as `canonical_json`, without its field `checksum`."""
    text = canonical_json({name: item for name, item in value.items() if name != "checksum"})
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


SAME_SETTINGS = (
    "use a cache that was made with the same settings, or make a new one in another folder"
)


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces, ASCII only; a float that is a whole number
    is written as an integer, so that 1 and 1.0 are the same setting."""
    return json.dumps(
        plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def compare(
    got: Mapping[str, Any],
    wanted: Mapping[str, Any],
    *,
    what_got: str,
    what_wanted: str,
    fields: Sequence[str] | None = None,
    advice: str = SAME_SETTINGS,
) -> None:
    """Raises CacheMismatch naming the first field (dotted, in sorted order) that differs.

    `fields` limits the comparison to these dotted names and what lies below them. A whole float
    equals the integer; a field that one side lacks differs from any value, null too. `advice`: what
    to do, the end of the message.
    """
    leaves_got, leaves_wanted = dict(_leaves(got)), dict(_leaves(wanted))
    for name in sorted(leaves_got.keys() | leaves_wanted.keys()):
        if fields is not None and not any(_below(name, prefix) for prefix in fields):
            continue
        missing = name not in leaves_got or name not in leaves_wanted
        if missing or canonical_json(leaves_got[name]) != canonical_json(leaves_wanted[name]):
            shown_got = shown(leaves_got[name]) if name in leaves_got else "missing"
            shown_wanted = shown(leaves_wanted[name]) if name in leaves_wanted else "missing"
            raise CacheMismatch(
                f"{what_got}: {name} is {shown_got}, but {shown_wanted} in {what_wanted}: {advice}"
            )


def plain(value: Any) -> Any:
    """`value` with tuples as lists and whole floats as integers, all the way down."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and is_number(value) and value.is_integer():
        return int(value)
    return value


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.") or prefix.startswith(f"{name}.")
