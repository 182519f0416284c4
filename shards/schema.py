"""JSON that someone else may have written, parsed so that no two readers can take it differently.

Refused: NaN and infinities, numbers like 1e999 or of 30 digits, a key twice in one object, text
that is no valid Unicode, more nesting than any file of ours has, files that are no files (pipes,
devices) and files larger than any of ours. Everything is a DamagedShard, nothing a RecursionError.

Taking values out of JSON that someone else may have written: types, ranges, clear messages.

Used by the readers of cache.json, plan.jsonl, the done-records and the shards' own metadata.
Whatever is wrong is a DamagedShard that names the file and the field, never a KeyError.
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


MAX_COUNT = 2**53
"""The largest integer that every JSON reader keeps exact."""


class Fields:
    """The fields of one JSON object; `where` names the object in messages."""

    def __init__(self, value: object, *, where: str) -> None:
        if not isinstance(value, dict):
            raise DamagedShard(f"{where}: {shown(value)}, wanted a JSON object: {ADVICE}")
        self._value: dict[str, Any] = value
        self._where = where

    @property
    def values(self) -> dict[str, Any]:
        """All of them, as they are."""
        return self._value

    def text(self, name: str) -> str:
        """A string."""
        value = self._get(name)
        if not isinstance(value, str):
            self._refuse(name, value, "text")
        return str(value)

    def optional_text(self, name: str) -> str | None:
        """A string, or None where the field is null or missing."""
        return None if self._value.get(name) is None else self.text(name)

    def integer(self, name: str, *, low: int = 0, high: int = MAX_COUNT) -> int:
        """An integer in low..high, both included; true and false are no integers."""
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._refuse(name, value, f"an integer from {low} to {high}")
        return int(value)

    def number(self, name: str) -> float:
        """A finite number."""
        value = self._get(name)
        if not is_number(value):
            self._refuse(name, value, "a number")
        return float(value)

    def boolean(self, name: str) -> bool:
        """true or false."""
        value = self._get(name)
        if not isinstance(value, bool):
            self._refuse(name, value, "true or false")
        return bool(value)

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON object."""
        value = self._get(name)
        if not isinstance(value, dict):
            self._refuse(name, value, "a JSON object")
        return dict(value)

    def text_mapping(self, name: str) -> dict[str, str]:
        """A JSON object whose values are all strings."""
        value = self.mapping(name)
        if not all(isinstance(item, str) for item in value.values()):
            self._refuse(name, value, "a JSON object of texts")
        return value

    def count_mapping(self, name: str) -> dict[str, int]:
        """A JSON object whose values are all integers, 0 or more."""
        value = self.mapping(name)
        if not all(is_count(item) for item in value.values()):
            self._refuse(name, value, "a JSON object of counts")
        return value

    def sequence(self, name: str) -> list[Any]:
        """A JSON array."""
        value = self._get(name)
        if not isinstance(value, list):
            self._refuse(name, value, "a JSON array")
        return list(value)

    def texts(self, name: str) -> list[str]:
        """A JSON array of strings."""
        value = self.sequence(name)
        if not all(isinstance(item, str) for item in value):
            self._refuse(name, value, "a JSON array of texts")
        return value

    def integers(self, name: str, *, high: int = MAX_COUNT) -> tuple[int, ...]:
        """A JSON array of integers in 0..high."""
        value = self.sequence(name)
        if not all(is_count(item) and item <= high for item in value):
            self._refuse(name, value, f"a JSON array of integers from 0 to {high}")
        return tuple(value)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._value.get(name) is not None

    def _get(self, name: str) -> Any:
        if name not in self._value:
            raise DamagedShard(f"{self._where}: no field {name!r}: {ADVICE}")
        return self._value[name]

    def _refuse(self, name: str, value: object, wanted: str) -> None:
        raise DamagedShard(f"{self._where}: {name} is {shown(value)}, wanted {wanted}: {ADVICE}")


ADVICE = "the file was changed or damaged: restore it from a copy or make the cache again"


def is_count(value: object) -> bool:
    """Whether `value` is an integer in 0..2**53 (true and false are not)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def is_number(value: object) -> bool:
    """Whether `value` is a finite number (true and false are not)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= MAX_COUNT if isinstance(value, int) else math.isfinite(value)


def shown(value: object) -> str:
    """`value` as it may stand in a message: one line, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
