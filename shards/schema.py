"""Plain values that somebody typed, or that lie in a file, become frozen dataclasses: one loader.

JSON is parsed so that no two readers can take it differently. Refused: NaN and infinities, numbers
like 1e999 or of 30 digits, a key twice in one object, text that is no valid Unicode, more nesting
than any file of ours has, files that are no files (pipes, devices) and files larger than any of
ours. Everything is a DamagedShard, nothing a RecursionError.

`load` checks types and names the field that is wrong, never by a KeyError; ranges and what fields
say of one another are checked by whoever loads.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import math
import os
import re
import types
import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from .errors import DamagedShard, DeltatokError, UsageError
from .files import check_address, is_address, local_path, open_regular

MAX_JSON_BYTES = 32 * 2**20
"""No JSON file of a cache comes near this; a larger one is damage or an attack (a guess)."""

MAX_CONTAINERS = 2_000_000
"""Brackets in a file, counted before it is parsed: 32 MiB of `[],` would take gigabytes."""

MAX_DEPTH = 64
"""Objects within objects: ours have up to 6, a model's configuration a few more (a guess)."""

_MAX_DIGITS = 20
_ADVICE = "restore it from a copy or make the cache again"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> Any:
    """The value in the JSON file `path`; DamagedShard where it is missing or no JSON."""
    return parse_json(read_file(path), where=str(path))


def read_file(path: Path, *, max_bytes: int = MAX_JSON_BYTES, advice: str = _ADVICE) -> bytes:
    """The bytes of a regular file; DamagedShard where there is none, or a larger one."""
    try:
        with os.fdopen(open_regular(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise DamagedShard(
                    f"{path}: {size} bytes, a file of a cache has at most {max_bytes}: {advice}"
                )
            return file.readall()
    except OSError as error:
        raise DamagedShard(f"{path}: cannot be read ({error.strerror}): {advice}") from error


def parse_json(data: bytes, *, where: str) -> Any:
    """The value in `data`; DamagedShard naming `where` if it is not strict JSON in UTF-8."""
    try:
        if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
            raise ValueError(f"more than {MAX_CONTAINERS} lists and objects")
        value = _DECODER.decode(data.decode())
        _check_depth(value)
        if _SURROGATE.search(data):  # half a character; whole ones may be written in two halves
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise DamagedShard(f"{where}: not valid JSON ({error}): {_ADVICE}") from error


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces, ASCII only; a float that is a whole number
    is written as an integer, so that 1 and 1.0 are the same setting."""
    return json.dumps(
        plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
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


_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant,
    parse_int=_integer,
    parse_float=_finite,
    object_pairs_hook=_object,
)


_CONTAINERS = (dict, list)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for item in level
            if type(item) in _CONTAINERS
            for child in (item.values() if type(item) is dict else item)
            if type(child) in _CONTAINERS
        ]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} lists and objects within one another")


Loaded = TypeVar("Loaded")
_ANYTHING, _INTEGERS, _TEXTS = list[Any], list[int], list[str]

MAX_COUNT = 2**53
"""The largest integer that every JSON reader keeps exact."""
Place = Annotated[str, "cache"]
"""The folder of a cache, or its address (s3://..., see stores/)."""
PathOrAddress = Annotated[str, "address"]
"""Likewise, of which nothing is mirrored or uploaded."""
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


def load(cls: type[Loaded], values: object, *, where: str, how: Strictness = TYPED) -> Loaded:
    """A `cls`, which is a dataclass, from plain nested `values`; `where` names their origin.

    Raises `how.error` that names the field, what was got and what is wanted: for a key that
    is missing, unknown (with the nearest known one) or of the wrong type.
    """
    if not isinstance(values, Mapping):
        kind = "a mapping of settings" if how.is_typed else "a JSON object"
        raise _refusal(values, kind, where, how)
    hints, optional = _schema(typing.cast(Any, cls))
    arguments = {}
    for key, value in values.items():
        if key in hints:
            arguments[key] = convert(value, hints[key], name=f"{where}: {key}", how=how)
        elif not how.ignores_unknown:
            near = difflib.get_close_matches(str(key).replace("-", "_"), hints, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise how.error(f"{where}: unknown key {str(key)!r}{hint}{how.advice}")
    allowed = set() if how.needs_all else optional
    missing = [name for name in hints if name not in arguments and name not in allowed]
    if missing and how.is_typed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise how.error(f"{where}: {', '.join(missing)} not given; add {flags} or the YAML key")
    if missing:
        names = ", ".join(map(repr, missing))
        raise how.error(f"{where}: no field {names}{how.advice}")
    return cls(**arguments)


def convert(value: Any, wanted: Any, *, name: str, how: Strictness = TYPED) -> Any:
    """`value` as the annotation `wanted` asks: scalars, Literal, X | None, tuple, list, dict,
    dataclass; Any takes everything."""
    if wanted is Any or (not how.is_typed and _is_stored(value, wanted)):
        return value
    origin, inner = _parts(wanted)
    if origin is Annotated:
        return _convert_place(value, name=name, how=how)
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
        return load(wanted, value, where=name, how=how)  # type: ignore[arg-type]
    return (_convert_typed if how.is_typed else _convert_stored)(value, wanted, name=name, how=how)


@functools.cache
def _parts(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """What is generic in it, and of what: reading a plan asks for it a million times."""
    return typing.get_origin(annotation), typing.get_args(annotation)


@functools.cache
def _schema(cls: type) -> tuple[dict[str, Any], set[str]]:
    """Field -> its annotation, and the fields that have a default."""
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    optional = {
        field.name
        for field in fields
        if field.default is not missing or field.default_factory is not missing
    }
    return {field.name: hints[field.name] for field in fields}, optional


def _convert_place(value: Any, *, name: str, how: Strictness) -> str:
    """A path, or an address of a known scheme."""
    text = str(value)
    if is_address(text):
        try:
            check_address(text)
        except UsageError as error:
            raise how.error(f"{name}: {error}") from None
        return text
    return str(convert(value, str, name=name, how=how))


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
    if how.is_typed and inner[0] is int and isinstance(value, list) and len(value) == 1:
        (value,) = value  # a flag that takes several words was given 3,6,9,12 as one
    if how.is_typed and isinstance(value, str):
        separator = r"[,x]" if inner == (int, int) else ","  # 448x896 is a size
        value = [part.strip() for part in re.split(separator, value)]
    if not isinstance(value, list | tuple):
        if not how.is_typed:
            raise _refusal(value, "a JSON array", name, how)
        value = [value]
    if len(inner) == 1 or inner[1] is Ellipsis:
        inner = inner[:1] * len(value)
    if len(value) != len(inner):
        if not how.is_typed:
            raise _refusal(value, f"{len(inner)} values", name, how)
        raise how.error(f"{name}: got {len(value)} values, wanted {len(inner)}")
    return [
        convert(item, kind, name=f"{name}[{i}]", how=how)
        for i, (item, kind) in enumerate(zip(value, inner, strict=True))
    ]


def _convert_typed(value: Any, wanted: Any, *, name: str, how: Strictness) -> Any:
    if wanted is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if wanted is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            local_path(str(value))  # most texts are paths, and no other looks like an address
        except UsageError as error:
            raise how.error(f"{name}: {error}") from None
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


def _is_stored(value: Any, wanted: Any) -> bool:
    """Whether it is what JSON gives for this annotation: of the scalars, and of lists of them,
    which are long."""
    if wanted is int:
        return is_count(value)
    if wanted is str or wanted is bool:
        return type(value) is wanted
    if wanted is float:
        return type(value) is float and math.isfinite(value)
    if type(value) is not list:
        return False
    if wanted == _ANYTHING:
        return True
    if wanted == _INTEGERS:
        return all(map(is_count, value))
    return bool(wanted == _TEXTS) and all(type(item) is str for item in value)


def _convert_stored(value: Any, wanted: Any, *, name: str, how: Strictness) -> Any:
    if wanted is float and is_number(value):
        return float(value)
    raise _refusal(value, STORED_NAMES[wanted], name, how)


def _refusal(value: object, wanted: str, name: str, how: Strictness) -> DeltatokError:
    got = f"{name}: got" if how.is_typed else f"{name} is"
    return how.error(f"{got} {shown(value)}, wanted {wanted}{how.advice}")


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
