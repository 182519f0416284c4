"""Taking values out of JSON that someone else may have written: types, ranges, clear messages.

Used by the readers of cache.json, plan.jsonl, the done-records and the shards' own metadata.
Whatever is wrong is a DamagedShard that names the file and the field, never a KeyError.
"""

import math
from typing import Any

from .errors import DamagedShard

MAX_COUNT = 2**53
"""The largest integer that every JSON reader keeps exact."""


class Fields:
    """The fields of one JSON object; `where` names the object in messages."""

    def __init__(self, value: object, *, where: str) -> None:
        if not isinstance(value, dict):
            raise DamagedShard(f"{where}: {shown(value)}, wanted a JSON object: {ADVICE}")
        self._value: dict[str, Any] = value
        self._where = where

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
