"""Frozen dataclasses from YAML files and command-line words; every command reads its settings here.

A YAML file maps 1:1 onto a config dataclass. Later wins: defaults, `--config FILE`, flags, `--set`.
An unknown key is an error that names the nearest known one; a value of the wrong type names the
field, what was got and what is allowed.

What all commands share: a parser made from a config dataclass, logging, exit codes.

Exit codes: 0 done; 1 anything else; 2 bad usage or config; 3 too many clips quarantined;
4 cache does not match; 75 stopped by SIGTERM; 130 interrupted from the keyboard.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import logging
import os
import re
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from ..shards.errors import DeltatokError, Stopped, UsageError
from ..shards.interrupts import StopRequest

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


SHORT_FLAGS = {"num_windows": "--windows"}
"""Fields whose flag is shorter than their name; the long one works too."""
MAX_USAGE_LINES = 5
"""Of a usage that is printed behind an error."""
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Parser(argparse.ArgumentParser):
    """argparse, but a usage error is a UsageError like every other one."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting, so that one place prints errors and picks the exit code."""
        usage = self.format_usage().strip()
        if usage.count("\n") >= MAX_USAGE_LINES:  # the message would scroll out of sight
            usage = ""
        lines = [f"{message}{self._nearest(message)}", usage, f"try: {self.prog} --help"]
        raise UsageError("\n".join(filter(None, lines)))

    def _nearest(self, message: str) -> str:
        """The flag that an unknown one may have been meant for."""
        unknown = re.search(r"^unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions) if unknown else ()
        return f"; did you mean {near[0]}?" if near else ""


def run_command(body: Callable[[], None]) -> int:
    """Run one command's body; print its error, if any, and give the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "accelerate", "matplotlib", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        # From the first import on; what a run may not be torn out of takes the signal itself.
        with StopRequest(signals=(signal.SIGTERM,)) as stop, stop.at_once():
            body()
    except (DeltatokError, Stopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `deltatok-shards info DIR | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def run_subcommand(
    prog: str, kinds: Mapping[str, Callable[[list[str]], None]], usage: str, words: list[str]
) -> None:
    """Run the one of `kinds` that the first word names with the words after it."""
    if not words or words[0] in ("-h", "--help"):
        print(usage)
    elif words[0] in kinds:
        kinds[words[0]](words[1:])
    else:
        raise UsageError(f"{prog} {words[0]}: wanted one of {', '.join(kinds)}\n{usage}")


def example_help(*lines: str) -> dict[str, Any]:
    """What a parser is told to end its help with these example commands."""
    epilog = "\n  ".join(("example:" if len(lines) == 1 else "examples:", *lines))
    return {"epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}


def config_parser(prog: str, config_type: type, *, summary: str, example: str) -> Parser:
    """A parser with one flag for every top-level field of `config_type`, and --config, --set."""
    parser = Parser(prog=prog, description=summary, **example_help(example))
    add_config_flags(parser, config_type)
    return parser


def add_config_flags(parser: argparse.ArgumentParser, config_type: type) -> None:
    """Add --config, --set and a flag for each field; nested dataclasses are reached by --set."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same names")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.SUB=VALUE",
        help="any setting, also nested",
    )
    docs, hints = field_docs(config_type), typing.get_type_hints(config_type)
    # What must be given comes first, wherever in the dataclasses it stands.
    fields = sorted(dataclasses.fields(config_type), key=_has_default)
    for field in fields:
        hint, flags = hints[field.name], [f"--{field.name.replace('_', '-')}"]
        if field.name in SHORT_FLAGS:
            flags.insert(0, SHORT_FLAGS[field.name])
        text = f"{docs.get(field.name, '')}{shown_default(field)}".replace("%", "%%")
        if hint is bool:
            action: Any = argparse.BooleanOptionalAction
            parser.add_argument(*flags, dest=field.name, action=action, default=None, help=text)
        elif dataclasses.is_dataclass(hint):
            parser.epilog = f"{parser.epilog or ''}\n\n{nested_help(field, hint)}"
        else:
            many = typing.get_origin(hint) is tuple
            parser.add_argument(
                *flags,
                dest=field.name,
                nargs="+" if many else None,
                default=None,
                metavar=_choices(hint) or field.name.upper(),
                help=text,
            )


def shown_default(field: "dataclasses.Field[Any]") -> str:
    """The default in brackets, as one would type it; nothing where it is None."""
    if not _has_default(field):
        return " [required]"
    if field.default is None or field.default is dataclasses.MISSING:
        return ""
    if isinstance(field.default, tuple):
        items = (f"{item:.4g}" if isinstance(item, float) else str(item) for item in field.default)
        return f" [{' '.join(items) or 'none'}]"
    return f" [{field.default}]"


def nested_help(field: "dataclasses.Field[Any]", config_type: Any) -> str:
    """The settings of a config within a config, which --set reaches: name, meaning, default."""
    docs = field_docs(config_type)
    lines = [f"settings of {field.name}, by --set {field.name}.KEY=VALUE or a config file:"]
    for inner in dataclasses.fields(config_type):
        text = f"{docs.get(inner.name, '')}{shown_default(inner)}"
        indent = " " * 24
        wrapped = textwrap.fill(text, 80, initial_indent=indent, subsequent_indent=indent)
        name = f"  {inner.name}"
        fits = len(name) < len(indent) - 1
        lines.append(name + wrapped[len(name) :] if fits else f"{name}\n{wrapped}")
    return "\n".join(lines)


def _choices(hint: Any) -> str | None:
    """ "{a,b}" for a Literal, and "{true,false}" for a bool that may be None; else None."""
    inner = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return f"{{{','.join(map(str, inner))}}}"
    if inner == [bool]:
        return "{true,false}"
    return _choices(inner[0]) if len(inner) == 1 else None


def _has_default(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def config_from_arguments(config_type: type[Config], arguments: argparse.Namespace) -> Config:
    """The config that defaults, --config, flags and --set make together (later wins)."""
    values = read_yaml(Path(arguments.config)) if arguments.config else {}
    for field in dataclasses.fields(config_type):  # type: ignore[arg-type]
        given = getattr(arguments, field.name, None)
        if given is not None:
            values[field.name] = given
    apply_settings(values, arguments.set)
    return build_config(config_type, values, where=arguments.config or "command line")


def parse_config(
    config_type: type[Config], argv: Sequence[str], *, prog: str, summary: str, example: str
) -> Config:
    """Parse `argv` straight into a `config_type`."""
    parser = config_parser(prog, config_type, summary=summary, example=example)
    return config_from_arguments(config_type, parser.parse_args(argv))
