"""Frozen dataclasses from YAML files and command-line words; every command reads its settings here.

A YAML file maps 1:1 onto a config dataclass. Later wins: defaults, `--config FILE`, flags, `--set`.
An unknown key is an error that names the nearest known one; a value of the wrong type names the
field, what was got and what is allowed.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..shards.errors import UsageError

Config = TypeVar("Config")
PACKAGE = Path(__file__).resolve().parents[1]
"""Where configs/ lies, in a checkout and where the wheel is installed."""


def build_config(config_type: type[Config], values: Mapping[str, Any], *, where: str) -> Config:
    """One `config_type` from nested plain `values`; `where` names their origin in errors.

    Raises:
        UsageError: unknown key (names the nearest), missing key, or a value of the wrong type.
    """
    hints = typing.get_type_hints(config_type)
    fields = {field.name: field for field in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise UsageError(f"{where}: {_unknown(str(key), fields)}")
        arguments[key] = convert(value, hints[key], name=f"{where}: {key}")
    missing = [
        name
        for name, field in fields.items()
        if name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise UsageError(f"{where}: {', '.join(missing)} not given; add {flags} or the YAML key")
    return config_type(**arguments)


def convert(value: Any, wanted: Any, *, name: str) -> Any:
    """`value` as the annotation `wanted` asks: scalars, Literal, X | None, tuples, dataclasses.

    Strings are read as numbers where numbers are wanted (YAML reads `1e-3` as a string).
    """
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        if isinstance(value, str) and value.lower() in ("none", "null") and type(None) in inner:
            return None
        rest = [choice for choice in inner if choice is not type(None)]
        return _first_that_fits(value, rest, name=name)
    if origin is typing.Literal:
        if value not in inner:
            allowed = ", ".join(map(str, inner))
            raise UsageError(f"{name}: got {value!r}, wanted one of {allowed}")
        return value
    if origin is tuple:
        return _convert_tuple(value, inner, name=name)
    if dataclasses.is_dataclass(wanted):
        if isinstance(value, wanted):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise UsageError(f"{name}: got {value!r}, wanted a mapping of settings")
        return build_config(wanted, value, where=name)  # type: ignore[arg-type]
    if wanted is Any:
        return value
    return _convert_scalar(value, wanted, name=name)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file ({} where it is empty); UsageError where it cannot be read.

    "configs/..." that is no file here is the one of the package, from whatever folder one works in.
    """
    try:
        text = (path if path.exists() else _packaged(path)).read_text(encoding="utf-8")
        loaded = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML ({error})") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"--config {path}: got a {type(loaded).__name__}, wanted `key: value`")
    return loaded


def _packaged(path: Path) -> Path:
    """The package's file for a path like configs/world/one-h200.yaml; else the path itself."""
    own = PACKAGE / path
    return own if path.parts[:1] == ("configs",) and own.is_file() else path


def apply_settings(values: dict[str, Any], settings: Sequence[str]) -> None:
    """Write every `key.sub=value` of `settings` into the nested `values`, in order."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {setting}: wanted key.sub=value")
        *parents, last = key.replace("-", "_").split(".")
        target = values
        for parent in parents:
            below = target.setdefault(parent, {})
            if not isinstance(below, dict):
                raise UsageError(f"--set {setting}: {parent} is a value, not a group of settings")
            target = below
        try:
            target[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {setting}: the value is not YAML ({error})") from None


def field_docs(config_type: type) -> dict[str, str]:
    """Field name -> the docstring written under it in the source (it holds unit and meaning)."""
    docs: dict[str, str] = {}
    for base in reversed(config_type.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _own_field_docs(base)
    return docs


def as_plain(config: Any) -> Any:
    """A config as nested dicts, lists and scalars: what YAML and JSON can hold."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: as_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [as_plain(item) for item in config]
    return config


def _own_field_docs(config_type: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(config_type))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for before, after in itertools.pairwise(body.body):
        if not isinstance(before, ast.AnnAssign) or not isinstance(before.target, ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[before.target.id] = " ".join(str(after.value.value).split())
    return docs


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.0)
    return f"unknown key {key!r}; did you mean {near[0]!r}?" if near else f"unknown key {key!r}"


def _first_that_fits(value: Any, choices: Sequence[Any], *, name: str) -> Any:
    for choice in choices[:-1]:
        try:
            return convert(value, choice, name=name)
        except UsageError:
            continue
    return convert(value, choices[-1], name=name)


def _convert_tuple(value: Any, inner: tuple[Any, ...], *, name: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not isinstance(value, list | tuple):
        value = [value]
    if len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(convert(item, inner[0], name=f"{name}[{i}]") for i, item in enumerate(value))
    if len(value) != len(inner):
        raise UsageError(f"{name}: got {len(value)} values, wanted {len(inner)}")
    return tuple(
        convert(item, kind, name=f"{name}[{i}]")
        for i, (item, kind) in enumerate(zip(value, inner, strict=True))
    )


def _convert_scalar(value: Any, wanted: Any, *, name: str) -> Any:
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
    raise UsageError(f"{name}: got {value!r}, wanted {getattr(wanted, '__name__', wanted)}")
