"""JSON that someone else may have written, parsed so that no two readers can take it differently.

Refused: NaN and infinities, numbers like 1e999 or of 30 digits, a key twice in one object, text
that is no valid Unicode, more nesting than any file of ours has, files that are no files (pipes,
devices) and files larger than any of ours. Everything is a DamagedShard, nothing a RecursionError.

Taking values out of JSON that someone else may have written: types, ranges, clear messages.

Used by the readers of cache.json, plan.jsonl, the done-records and the shards' own metadata.
Whatever is wrong is a DamagedShard that names the file and the field, never a KeyError.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import math
import os
import re
import stat
import types
import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import DamagedShard, DeltatokError, UsageError

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


Loaded = TypeVar("Loaded")

MAX_COUNT = 2**53
"""The largest integer that every JSON reader keeps exact."""
NONE_WORDS = ("none", "null")
STORED_NAMES = {
    int: f"an integer from 0 to {MAX_COUNT}",
    float: "a number",
    bool: "true or false",
    str: "text",
}


@dataclass(frozen=True)
class Strictness:
    """How plain values become a dataclass: those that somebody typed, or those of a file of ours.

    Typed ones may be text where a number is wanted (YAML reads `1e-3` as text), and one value where
    several are. Stored ones are exactly what JSON says, and integers are counts: 0 to 2**53.
    """

    error: type[DeltatokError]
    is_typed: bool
    needs_all: bool = False
    """Also what has a default."""
    ignores_unknown: bool = False
    advice: str = ""


ADVICE = "the file was changed or damaged: restore it from a copy or make the cache again"
TYPED = Strictness(UsageError, is_typed=True)
"""Configs: YAML files, flags, --set."""
STORED = Strictness(DamagedShard, is_typed=False, ignores_unknown=True, advice=f": {ADVICE}")
"""Files of a cache, to which a later release may add."""


def load(
    cls: type[Loaded], values: object, *, where: str, strictness: Strictness = TYPED
) -> Loaded:
    """A `cls`, which is a dataclass, from plain nested `values`; `where` names their origin.

    Raises `strictness.error` that names the field, what was got and what is wanted: for a key that
    is missing, unknown (with the nearest known one) or of the wrong type.
    """
    if not isinstance(values, Mapping):
        kind = "a mapping of settings" if strictness.is_typed else "a JSON object"
        raise _refusal(values, kind, where, strictness)
    hints, optional = _schema(typing.cast(Any, cls))
    arguments = {}
    for key, value in values.items():
        if key in hints:
            arguments[key] = convert(value, hints[key], name=f"{where}: {key}", how=strictness)
        elif not strictness.ignores_unknown:
            near = difflib.get_close_matches(str(key).replace("-", "_"), hints, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise strictness.error(f"{where}: unknown key {str(key)!r}{hint}{strictness.advice}")
    allowed = set() if strictness.needs_all else optional
    missing = [name for name in hints if name not in arguments and name not in allowed]
    if missing and strictness.is_typed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise strictness.error(
            f"{where}: {', '.join(missing)} not given; add {flags} or the YAML key"
        )
    if missing:
        names = ", ".join(map(repr, missing))
        raise strictness.error(f"{where}: no field {names}{strictness.advice}")
    return cls(**arguments)


def convert(value: Any, wanted: Any, *, name: str, how: Strictness = TYPED) -> Any:
    """`value` as the annotation `wanted` asks: scalars, Literal, X | None, tuple, list, dict,
    dataclass; Any takes everything."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _convert_union(value, inner, name=name, how=how)
    if origin is Literal:
        if value in inner:
            return value
        raise _refusal(value, f"one of {', '.join(map(str, inner))}", name, how)
    if origin in (tuple, list):
        items = _convert_items(value, inner, name=name, how=how)
        return origin(items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _refusal(value, "a JSON object", name, how)
        return {
            k: convert(item, inner[1], name=f"{name}.{k}", how=how) for k, item in value.items()
        }
    if dataclasses.is_dataclass(wanted):
        if isinstance(value, wanted):  # type: ignore[arg-type]
            return value
        return load(wanted, value, where=name, strictness=how)  # type: ignore[arg-type]
    return (_convert_typed if how.is_typed else _convert_stored)(value, wanted, name=name, how=how)


@functools.cache
def _schema(cls: type) -> tuple[dict[str, Any], set[str]]:
    """Field -> its annotation, and the fields that have a default."""
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    hints = typing.get_type_hints(cls)
    optional = {
        field.name
        for field in fields
        if field.default is not missing or field.default_factory is not missing
    }
    return {field.name: hints[field.name] for field in fields}, optional


def _convert_union(value: Any, inner: tuple[Any, ...], *, name: str, how: Strictness) -> Any:
    if type(None) in inner:
        text_for_none = how.is_typed and isinstance(value, str) and value.lower() in NONE_WORDS
        if value is None or text_for_none:
            return None
    *first, last = (choice for choice in inner if choice is not type(None))
    for choice in first:
        with contextlib.suppress(how.error):
            return convert(value, choice, name=name, how=how)
    return convert(value, last, name=name, how=how)


def _convert_items(value: Any, inner: tuple[Any, ...], *, name: str, how: Strictness) -> list[Any]:
    """Of a tuple[X, Y], tuple[X, ...] or list[X]."""
    if how.is_typed and isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not isinstance(value, list | tuple):
        if not how.is_typed:
            raise _refusal(value, "a JSON array", name, how)
        value = [value]
    if len(inner) == 1 or inner[1] is Ellipsis:
        inner = inner[:1] * len(value)
    if len(value) != len(inner):
        raise how.error(f"{name}: got {len(value)} values, wanted {len(inner)}{how.advice}")
    return [
        convert(item, kind, name=f"{name}[{i}]", how=how)
        for i, (item, kind) in enumerate(zip(value, inner, strict=True))
    ]


def _convert_typed(value: Any, wanted: Any, *, name: str, how: Strictness) -> Any:
    if wanted is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if wanted is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if wanted in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = None
        if number is not None and (wanted is float or number.is_integer()):
            return wanted(value) if isinstance(value, int) else wanted(number)
    if isinstance(value, wanted) and not (isinstance(value, bool) and wanted is not bool):
        return value
    raise _refusal(value, getattr(wanted, "__name__", str(wanted)), name, how)


def _convert_stored(value: Any, wanted: Any, *, name: str, how: Strictness) -> Any:
    if wanted is int and is_count(value):
        return value
    if wanted is float and is_number(value):
        return float(value)
    if wanted in (bool, str) and isinstance(value, wanted):
        return value
    raise _refusal(value, STORED_NAMES[wanted], name, how)


def _refusal(value: object, wanted: str, name: str, how: Strictness) -> DeltatokError:
    return how.error(f"{name}: got {shown(value)}, wanted {wanted}{how.advice}")


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
