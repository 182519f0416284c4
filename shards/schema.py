"""JSON that someone else may have written, parsed so that no two readers can take it differently.

Refused: NaN and infinities, numbers like 1e999 or of 30 digits, a key twice in one object, text
that is no valid Unicode, more nesting than any file of ours has, files that are no files (pipes,
devices) and files larger than any of ours. Everything is a DamagedShard, nothing a RecursionError.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from .errors import DamagedShard

MAX_JSON_BYTES = 32 * 2**20
"""No JSON file of a cache comes near this; a larger one is damage or an attack (a guess)."""

MAX_CONTAINERS = 2_000_000
"""Brackets in a file, counted before it is parsed: 32 MiB of `[],` would take gigabytes."""

MAX_DEPTH = 64
"""Objects within objects: ours have up to 6, a model's configuration a few more (a guess)."""

_MAX_DIGITS = 20
_READ_BYTES = 16 * 2**20
_ADVICE = "restore it from a copy or make the cache again"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> Any:
    """The value in the JSON file `path`; DamagedShard where it is missing or no JSON."""
    return parse_json(read_file(path), where=str(path))


def read_file(path: Path, *, max_bytes: int = MAX_JSON_BYTES, advice: str = _ADVICE) -> bytes:
    """The bytes of a regular file; DamagedShard where there is none, or a larger one."""
    try:
        # Not blocking: opening a pipe would wait for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DamagedShard(f"{path}: cannot be read (no regular file): {advice}")
            if status.st_size > max_bytes:
                raise DamagedShard(
                    f"{path}: {status.st_size} bytes, a file of a cache has at most {max_bytes}: "
                    f"{advice}"
                )
            return b"".join(iter(lambda: os.read(descriptor, _READ_BYTES), b""))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DamagedShard(f"{path}: cannot be read ({error.strerror}): {advice}") from error


def parse_json(data: bytes, *, where: str) -> Any:
    """The value in `data`; DamagedShard naming `where` if it is not strict JSON in UTF-8."""
    try:
        if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
            raise ValueError(f"more than {MAX_CONTAINERS} lists and objects")
        value = json.loads(
            data.decode(),
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_finite,
            object_pairs_hook=_object,
        )
        _check_depth(value)
        if _SURROGATE.search(data):  # half a character; whole ones may be written in two halves
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise DamagedShard(f"{where}: not valid JSON ({error}): {_ADVICE}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS + 2:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_MAX_DIGITS]} is beyond the range of numbers")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice[:80]!r} twice in one object")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} lists and objects within one another")
