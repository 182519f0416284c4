"""What all commands share: flags made from config dataclasses, tables of subcommands, exit codes.

A YAML file maps 1:1 onto a config dataclass. Later wins: defaults, `--config FILE`, flags, `--set`.
An unknown key is an error that names the nearest known one. (jsonargparse 4.53 was tried instead:
it names no nearest key, takes neither `--videos A B` for a tuple nor `--no-fast`, and shows the
types of Python in help and errors.)

Exit codes: 0 done; 1 anything else; 2 bad usage or config; 3 too many clips quarantined;
4 cache does not match; 75 stopped by SIGTERM; 130 interrupted from the keyboard.
"""

import argparse
import ast
import dataclasses
import difflib
import importlib
import inspect
import itertools
import logging
import os
import re
import signal
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from ..shards.errors import DeltatokError, Stopped, UsageError
from ..shards.files import local_path, read_text
from ..shards.running.interrupts import StopRequest
from ..shards.schema import Place, load
from ..shards.stores.mirror import CACHE_DIR, CACHE_LIMIT
from .alive import SignOfLife

Config = TypeVar("Config")
PACKAGE = Path(__file__).resolve().parents[1]
"""Where configs/ lies, in a checkout and where the wheel is installed."""
ROOT = __name__.rpartition(".pipeline.")[0]
"""deltatok."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file ({} where it is empty); UsageError where it cannot be read.

    "configs/..." that is no file here is the one of the package, from whatever folder one works in.
    """
    try:
        text = read_text(local_path(path) if path.exists() else _packaged(local_path(path)))
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


SHORT_FLAGS = {"num_windows": "--windows", "num_winners": "--winners"}
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
    for noisy in ("httpx", "httpx2", "accelerate", "matplotlib", "fontTools"):
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


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command whose flags are the fields of a config dataclass.

    `config` and `run` are names, "package.module:name" below deltatok, so that a command imports
    only what it uses, and --help nearly nothing.
    """

    help: str
    """For the list of commands, a few words."""
    summary: str
    examples: tuple[str, ...]
    config: str
    """The dataclass."""
    run: str
    """What takes one; a text that it gives is printed."""
    done: str = ""
    """The last line: where the result lies, {field} standing for a field of the config."""
    positional: str | None = None
    """The field that is given without a flag."""
    notes: str = ""
    """Printed behind the examples."""

    def __call__(self, prog: str, words: Sequence[str]) -> None:
        """Parses the words, runs the command, and prints what came of it."""
        with SignOfLife("starting"):
            config = self.parse(prog, words)
            run = load_name(self.run)
        result = run(config)
        if isinstance(result, str):
            print(result)
        if self.done:
            print(self.done.format_map(vars(config)))

    def parse(self, prog: str, words: Sequence[str]) -> Any:
        """The config that the words, and the file that they may name, make."""
        config_type = load_name(self.config)
        arguments = self.parser(prog, config_type, words).parse_args(words)
        for name in (CACHE_DIR, CACHE_LIMIT):
            if getattr(arguments, name, None) is not None:
                os.environ[name] = getattr(arguments, name)  # for child processes, too
        return config_from_arguments(config_type, arguments)

    def parser(self, prog: str, config_type: type, words: Sequence[str]) -> Parser:
        """The parser of the command's flags."""
        parser = Parser(prog=prog, description=self.summary, **example_help(*self.examples))
        given = {word.partition("=")[0] for word in words}
        elsewhere = {"--config", f"--{self.positional}"} & given
        add_config_flags(parser, config_type, positional=None if elsewhere else self.positional)
        if takes_addresses(config_type):
            add_mirror_flags(parser)
        if self.notes:
            parser.epilog = f"{parser.epilog}\n\n{self.notes}"
        return parser


def load_name(name: str) -> Any:
    """What "package.module:name" below deltatok is."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"{ROOT}.{module}"), attribute)


def run_table(prog: str, commands: Mapping[str, Command], words: Sequence[str] | None) -> int:
    """Runs the one of `commands` that the first word names (of sys.argv, if None), with the words
    after it; gives the exit code."""
    words = sys.argv[1:] if words is None else words
    return run_command(lambda: _run_one(prog, commands, list(words)))


def _run_one(prog: str, commands: Mapping[str, Command], words: list[str]) -> None:
    if words and words[0] in commands:
        commands[words[0]](f"{prog} {words[0]}", words[1:])
        return
    width = max(map(len, commands))
    usage = [f"usage: {prog} {{{','.join(commands)}}} [--help] ...", ""]
    usage += [f"  {name:<{width}}  {command.help}" for name, command in commands.items()]
    usage += ["", "examples:", *(f"  {command.examples[0]}" for command in commands.values())]
    text = "\n".join(usage)
    if words[:1] in (["-h"], ["--help"]):
        print(text)
        raise SystemExit(0)
    near = difflib.get_close_matches(words[0], commands, n=1) if words else []
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(
        f"{prog} {' '.join(words[:1])}: wanted one of {', '.join(commands)}{hint}\n{text}"
    )


def example_help(*lines: str) -> dict[str, Any]:
    """What a parser is told to end its help with these example commands."""
    epilog = "\n  ".join(("example:" if len(lines) == 1 else "examples:", *lines))
    return {"epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}


def add_config_flags(
    parser: argparse.ArgumentParser, config_type: type, *, positional: str | None = None
) -> None:
    """Add --config, --set and a flag for each field; nested dataclasses are reached by --set.

    positional: the field that is given without a flag.
    """
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
        if field.name == positional:
            many = typing.get_origin(hint) is tuple
            metavar = field.name.upper()
            parser.add_argument(field.name, nargs="+" if many else None, metavar=metavar, help=text)
        elif hint is bool:
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


def takes_addresses(config_type: type) -> bool:
    """Whether a field is a cache, which may lie at an address."""
    hints = typing.get_type_hints(config_type, include_extras=True)
    return any(Place in (hint, *typing.get_args(hint)) for hint in hints.values())


def add_mirror_flags(parser: argparse.ArgumentParser) -> None:
    """--cache-dir and --cache-limit-gb, which stand for environment variables."""
    parser.add_argument(
        "--cache-dir",
        dest=CACHE_DIR,
        metavar="DIR",
        help="where shards of caches at addresses (s3://..., hf://...) are kept while they are "
        f"read or made [{CACHE_DIR}, else ~/.cache/deltatok]",
    )
    parser.add_argument(
        "--cache-limit-gb",
        dest=CACHE_LIMIT,
        metavar="GB",
        help="room for shards that were read; those not used for longest make room for others "
        f"[{CACHE_LIMIT}, else no limit]",
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
    return load(config_type, values, where=arguments.config or "command line")
